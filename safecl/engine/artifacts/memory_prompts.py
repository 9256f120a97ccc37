"""The rows of a memory that names prompts (`memory.prompts`): the aligned model writes them before the run, once.

Generative replay by the aligned model itself (GR-SAP, arXiv 2603.10243). The rows lie in the store of artifacts, where
`safecl memory build` puts them, so all runs on that model with those prompts share them.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.config import RunConfig
from safecl.data import Prompt, load_tokenizer
from safecl.data.config_rows import memory_prompts
from safecl.data.templates.thinking import check_thinking
from safecl.distributed import collectives
from safecl.distributed.watchdog import watched
from safecl.engine.artifacts.base_model import base_key
from safecl.engine.artifacts.memory_rows import (
    ANSWER,
    KIND,
    REFUSAL,
    ROWS,
    MemoryRows,
    RowSettings,
    key_of_rows,
    memory_rows,
    row_of,
)
from safecl.engine.artifacts.store import ArtifactStore, Key, ask_first_rank
from safecl.engine.passes.forward_engine import ForwardEngine, forward_engine_of
from safecl.evaluation import check_disjoint
from safecl.evaluation.questions import read_safety_prompts
from safecl.evaluation.scoring.judges import load_scorer
from safecl.storage.model_records import ModelRecords

REFUSES, ANSWERS = "I cannot help with that. ", "This is how it is done. "
"""Sentences of rows that are not written yet."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class _Asked:
    """The prompts of a config, and the place of their rows in the store."""

    tokenizer: Any
    disallowed: Sequence[Prompt]
    benign: Sequence[Prompt]
    settings: RowSettings
    store: ArtifactStore
    base: Key

    @classmethod
    def of(cls, config: RunConfig) -> _Asked:
        """Read the prompts. A collective call. Raises ConfigError, also for prompts of the evaluation among them."""
        assert config.memory is not None
        tokenizer, answers = load_tokenizer(config.model, records=ModelRecords.of(config)), config.memory.answers
        check_thinking(tokenizer)
        load_scorer(answers.scorer)
        disallowed, benign = memory_prompts(config.memory)
        measured = read_safety_prompts(config.safety)
        check_disjoint([*measured[0], *measured[1]], [*disallowed, *benign])
        store = ArtifactStore.of(config)
        settings = RowSettings(answers.scorer, answers.max_new_tokens, answers.batch_size)
        return cls(tokenizer, disallowed, benign, settings, store, base_key(config, tokenizer, store))

    def found(self) -> Path | None:
        """The file of the rows in the store; None where it is not there."""
        key = key_of_rows(self.tokenizer, self.base, self.disallowed, self.benign, self.settings)
        folder = self.store.find(KIND, key)
        return None if folder is None else folder / ROWS

    def __str__(self) -> str:
        return f"{len(self.disallowed):,} disallowed and {len(self.benign):,} benign prompts"


def with_memory_rows(
    config: RunConfig, note: Note, before: Callable[[RunConfig], object] = lambda expected: None
) -> RunConfig:
    """Return the config with the rows of its memory, which the model writes where the store has none. A collective
    call, which starts the process group; nothing is done for a memory that has rows.

    before: called first where rows must be written, with a config whose rows are as long as they may become, so that
    mistakes elsewhere are found before the model answers. Raises ConfigError, also where the model refuses nothing.
    """
    if config.memory is None or not config.memory.awaits_rows:
        return config
    collectives.init_distributed()
    with watched(Path(config.output), "preparation"):
        asked = _Asked.of(config)
        if ask_first_rank(asked.found) is None:
            with _expected(config, asked) as expected:
                before(expected)
            note(f"memory: the model answers {asked}, once for all runs on it")
        made = _write(config, asked, note)
    kept = ", ".join(f"{count:,} {category or 'without a category'}" for category, count in made.kept.most_common())
    left_out = "".join(f"; left out: {count:,} {reason}" for reason, count in made.left_out.items())
    note(f"memory: {made.kept.total():,} rows written by the model ({kept}){left_out}")
    return _with_rows(config, made.rows)


def _write(config: RunConfig, asked: _Asked, note: Note) -> MemoryRows:
    engines: list[ForwardEngine] = []

    def opened() -> ForwardEngine:
        engines.append(forward_engine_of(config, asked.tokenizer, note))
        return engines[0]

    try:
        return memory_rows(
            opened, asked.tokenizer, asked.store, asked.base, asked.disallowed, asked.benign, asked.settings, note
        )
    finally:
        for engine in engines:
            engine.close()


@dataclass(frozen=True)
class Prospect:
    """The plan for the prompts of a memory, in words. written: their rows are in the store."""

    text: str
    written: bool


@contextlib.contextmanager
def with_known_or_expected_rows(config: RunConfig) -> Iterator[tuple[RunConfig, Prospect | None]]:
    """Yield the config with the rows of its memory, without writing any, and what becomes of the prompts: for `safecl
    check`. None where the memory has rows of its own.

    Rows that are not in the store are as long as they may become, and lie in a folder that goes with the block.
    """
    if config.memory is None or not config.memory.awaits_rows:
        yield config, None
        return
    asked = _Asked.of(config)
    if (rows := asked.found()) is not None:
        yield _with_rows(config, rows), Prospect(f"{asked}, answered by the model in {rows.parent}", written=True)
        return
    num_tokens = asked.settings.max_new_tokens * (len(asked.disallowed) + len(asked.benign))
    with _expected(config, asked) as expected:
        text = (
            f"{asked}; safecl train lets the model answer them first, at most {num_tokens:,} tokens. Until then all "
            "answers are counted, at their greatest length"
        )
        yield expected, Prospect(text, written=False)


@contextlib.contextmanager
def _expected(config: RunConfig, asked: _Asked) -> Iterator[RunConfig]:
    """Yield the config with rows as they are when the model answers every prompt as at length as it may."""

    def longest(sentence: str) -> str:
        num_tokens = max(1, len(asked.tokenizer(sentence, add_special_tokens=False)["input_ids"]))
        return sentence * (asked.settings.max_new_tokens // num_tokens + 1)

    rows = [row_of(prompt, longest(REFUSES), REFUSAL) for prompt in asked.disallowed]
    rows += [row_of(prompt, longest(ANSWERS), ANSWER) for prompt in asked.benign]
    with tempfile.TemporaryDirectory(prefix="safecl-") as folder:
        path = Path(folder) / ROWS
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        yield _with_rows(config, path)


def _with_rows(config: RunConfig, rows: Path) -> RunConfig:
    assert config.memory is not None
    return config.model_copy(update={"memory": config.memory.with_written(rows)})
