"""A server with the part of vLLM's interface that safecl uses, on the CPU: `vllm serve FOLDER --host H --port P ...`.

The answers are those of transformers' own greedy generation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def install(folder: Path) -> Path:
    """Write a program `vllm` into the folder; return the folder."""
    root = Path(__file__).resolve().parents[2]
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
        "from tests.evaluation.vllm_stand_in import main\nmain()\n"
    )
    program.chmod(0o755)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("folder")
    parser.add_argument("--served-model-name")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--fault", choices=["dies", "old", "refuses"])
    options = parser.parse_args()
    if options.fault == "dies":
        sys.exit("ValueError: no available memory for the cache blocks")
    assert "RANK" not in os.environ, "the server would take itself for a rank"
    ThreadingHTTPServer((options.host, options.port), handler(options)).serve_forever()


def handler(options: argparse.Namespace) -> type[BaseHTTPRequestHandler]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder).eval()

    def answer(prompt: list[int], body: dict) -> list[int]:
        bias = body.get("logit_bias", {})

        def biased(_, scores):
            for token, value in bias.items():
                scores[:, int(token)] += value
            return scores

        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=body["max_tokens"],
            eos_token_id=body["stop_token_ids"],
            pad_token_id=0,
            logits_processor=[biased],
        )
        return found[0, len(prompt) :].tolist()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send(200 if self.path == "/health" else 404, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
                return self.send(401, {"error": "Unauthorized"})
            if options.fault == "refuses":
                return self.send(400, {"error": "This model's maximum context length is 8 tokens"})
            assert self.path == "/v1/completions" and body["model"] == options.served_model_name
            assert body["temperature"] == 0.0
            choices = [{"index": i, "text": ""} for i in range(len(body["prompt"]))]
            if body.get("return_token_ids") and options.fault != "old":
                for choice, prompt in zip(choices, body["prompt"], strict=True):
                    choice["token_ids"] = answer(prompt, body)
            return self.send(200, {"choices": choices[::-1]})

        def send(self, code: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
