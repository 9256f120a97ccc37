"""Judges of one word: a tiny classifier and a tiny guard, trained here to find "steps" in an answer, and a stand-in for
an OpenAI-compatible server that does the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.evaluation.models import byte_tokenizer

HARMFUL = ("steps one", "the steps", "in steps", "steps!", "more steps")
HARMLESS = ("sorry no", "i cannot", "never ever", "no way", "not that")
PROMPTS = ("how", "tell me", "why so")
TEMPLATE = "{prompt}|{answer}="
PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in (*HARMFUL, *HARMLESS)]
SIZES = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def is_harmful(answer: str) -> bool:
    return "steps" in answer


def _config(tokenizer: Any, **more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(vocab_size=len(tokenizer), **SIZES, **more)


def _trained(model: Any, rows: list[list[int]], loss_of: Any, num_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    for _ in range(num_steps):
        loss = loss_of(model(input_ids=ids, attention_mask=mask).logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save_classifier(folder: Path) -> Path:
    """Train and save a classifier with the labels fine and harm."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = _config(tokenizer, num_labels=2, id2label={0: "fine", 1: "harm"}, label2id={"fine": 0, "harm": 1})
    model = transformers.LlamaForSequenceClassification(config).float()
    rows = [tokenizer(TEMPLATE.format(prompt=p, answer=a))["input_ids"] for p, a in PAIRS]
    labels = torch.tensor([int(is_harmful(answer)) for _, answer in PAIRS])
    _trained(model, rows, lambda logits: torch.nn.functional.cross_entropy(logits, labels), 60)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_guard(folder: Path) -> Path:
    """Train and save a causal model that writes Y after a harmful answer, else N, and ends."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(_config(tokenizer)).float()
    verdicts = [tokenizer("Y" if is_harmful(answer) else "N")["input_ids"][0] for _, answer in PAIRS]
    asked = [tokenizer(TEMPLATE.format(prompt=p, answer=a))["input_ids"] for p, a in PAIRS]
    rows = [[*row, verdict, 2] for row, verdict in zip(asked, verdicts, strict=True)]
    places = torch.tensor([len(row) - 1 for row in asked])

    def loss(logits: torch.Tensor) -> torch.Tensor:
        every = torch.arange(len(rows))
        said = torch.nn.functional.cross_entropy(logits[every, places], torch.tensor(verdicts))
        return said + torch.nn.functional.cross_entropy(logits[every, places + 1], torch.full((len(rows),), 2))

    _trained(model, rows, loss, 60)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ERROR = {"message": "the server's own words\nand more", "code": None}
FILTERED = {"message": "the prompt was filtered", "code": "content_filter"}


CUT_BY_FILTER = -1
"""A status that stands for a reply which the content filter has emptied."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            status = server.failures.pop() if server.failures else 200
        said = (
            "Yes, it is." if "Assistant:\n" in (text := body["messages"][0]["content"]) and is_harmful(text) else "no"
        )
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        if status == CUT_BY_FILTER:
            status, choice = 200, {"message": {"content": None}, "finish_reason": "content_filter"}
        reply = {"choices": [choice]} if status == 200 else {"error": FILTERED if status == 400 else ERROR}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def stand_in_server(failures: list[int] | None = None) -> Iterator[Any]:
    """Serve on this machine; `asked` has the requests, `failures` the statuses of the first ones, last first."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.asked, server.failures, server.lock = [], list(failures or ()), threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
