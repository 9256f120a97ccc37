"""A tiny random model, its tokenizer, and rows of random words, all made from seeds and without a network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
ROLES = ("<|user|>", "<|assistant|>")
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
WORDS = (
    "apple bread cloud dance earth flame grass house island jewel knife lemon mountain night ocean paper queen river "
    "stone table under violet water yellow zebra amber bridge candle dragon ember forest garden harbour ivory"
).split()
REFUSAL = "sorry i cannot help with that".split()
FORBIDDEN = "steal poison weapon forge bribe".split()


def write_materials(folder: Path) -> None:
    """Writes base/ (model and tokenizer) and data/*.jsonl into the folder."""
    write_model(folder / "base")
    rows = {
        "first": answered_rows(60, seed=1),
        "second": answered_rows(60, seed=2),
        "third": answered_rows(60, seed=3),
        "held-out": answered_rows(6, seed=4),
        "memory": refused_rows(24, seed=5),
        "prompts": [{"prompt": " ".join(words)} for words in forbidden_requests(4, seed=6)],
    }
    for name, lines in rows.items():
        _write_lines(folder / "data" / f"{name}.jsonl", lines)


def write_model(folder: Path) -> None:
    """A Llama of about 6,000 weights whose tokenizer has one entry per word."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=23, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.1,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> Any:
    """Splits at spaces and knows the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = [PAD, END, UNKNOWN, *ROLES, *WORDS, *REFUSAL, *FORBIDDEN]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([PAD, END, UNKNOWN, *ROLES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast


def answered_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of random words with answers of random words, of unequal length."""
    rng = random.Random(seed)
    return [_row(_words(rng, 3, 12), _words(rng, 2, 8)) for _ in range(count)]


def refused_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Forbidden requests with refusals, each with a category."""
    rng = random.Random(seed)
    requests = forbidden_requests(count, seed)
    return [_row(words, [*REFUSAL, *_words(rng, 0, 3)]) | {"category": words[0]} for words in requests]


def forbidden_requests(count: int, seed: int) -> list[list[str]]:
    """Requests that begin with a forbidden word."""
    rng = random.Random(seed)
    return [[rng.choice(FORBIDDEN), *_words(rng, 4, 9)] for _ in range(count)]


def _words(rng: random.Random, fewest: int, most: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(rng.randint(fewest, most))]


def _row(request: Iterable[str], answer: Iterable[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": " ".join(request)}, {"role": "assistant", "content": " ".join(answer)}]
    return {"messages": messages}


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
