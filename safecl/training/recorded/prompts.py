"""Prompts of the memory with the aligned model's hidden state behind each, for terms that keep these states.

They are chosen and recorded once, before the first task that methods act on: the first refused rows in the order of a
hash of (seed, row). A file of the run folder holds them, so all ranks know all, and a resumed run has the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from safecl.config import ConfigError
from safecl.data import Row
from safecl.data.order import keyed_hash
from safecl.distributed import collectives
from safecl.engine.artifacts.memory_rows import REFUSAL
from safecl.engine.passes.step_rows import HIDDEN, Distillation, StepRow
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.outputs import outputs_of_rows
from safecl.methods.terms import PromptTerm
from safecl.planning.memory_kinds import kind_of
from safecl.storage.durable import DamagedCheckpoint, read_arrays, write_arrays
from safecl.training.recorded.rows import dataset_of
from safecl.training.replay_memory import ReplayMemory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "anchors"


@dataclass(frozen=True)
class _Pool:
    """Prompts, and the hidden state at the last token of each."""

    prompts: list[np.ndarray]  # int32 [length] each
    states: np.ndarray  # fp32 [prompts, H]


class PromptAnchors:
    """The prompts of a run's prompt terms, by the term's name."""

    def __init__(self, engine: TrainingEngine, output: str):
        """output: the run folder."""
        self.engine, self.folder = engine, Path(output) / FOLDER
        self._pools: dict[str, _Pool] = {}

    def rows_of_step(self, term: PromptTerm, step: int) -> list[StepRow]:
        """Return the term's prompts in a global step, each with its distance. Not a collective call."""
        pool = self._pools[term.name]
        count = min(term.prompts, len(pool.prompts))
        return [_step_row(term, pool, (step * count + i) % len(pool.prompts), count) for i in range(count)]

    def names(self) -> list[str]:
        """Return the names of the terms that have prompts."""
        return list(self._pools)

    def record(
        self,
        term: PromptTerm,
        memory: ReplayMemory,
        tokenizer: PreTrainedTokenizerBase | None,
        seed: int,
        log: Callable[[str], None],
    ) -> None:
        """Choose the prompts of the term from the memory and record the current model's states, unless it has some
        already. A collective call. tokenizer: to tell refusals; without one every row counts as refused."""
        if term.name in self._pools:
            return
        prompts = _choose(memory, tokenizer, term.pool, seed)
        rows = dataset_of(prompts, [np.zeros(len(p), bool) for p in prompts], np.arange(len(prompts)))
        own = [
            (index, output["hidden"][-1].float().numpy())
            for index, output in outputs_of_rows(self.engine, rows, "hidden", tokens="all")
        ]
        states = np.stack([state for _, state in sorted(collectives.gather_objects(own), key=lambda item: item[0])])
        if collectives.rank() == 0:
            lengths = np.array([len(p) for p in prompts])
            parts = {"tokens": np.concatenate(prompts), "lengths": lengths, "states": states}
            write_arrays(self._path(term.name), parts)
        collectives.barrier()
        self.reopen(term.name)
        log(f"{term.name}: recorded the hidden state behind {len(prompts)} prompts of the memory")

    def reopen(self, name: str) -> None:
        """Read what this run has recorded. A collective call where ranks share the folder."""
        try:
            found = read_arrays(self._path(name), ("tokens", "lengths", "states"))
        except DamagedCheckpoint as damage:
            raise ConfigError(
                f"{damage}; the file keeps the recorded prompts, so the run cannot resume; start it anew"
            ) from None
        self._pools[name] = _Pool(np.split(found["tokens"], np.cumsum(found["lengths"])[:-1]), found["states"])

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _step_row(term: PromptTerm, pool: _Pool, number: int, count: int) -> StepRow:
    prompt = pool.prompts[number]
    row = Row(number, prompt, np.zeros(len(prompt), bool))
    distance = Distillation(
        HIDDEN,
        term.weight / count,
        term=term.name,
        load=functools.partial(torch.from_numpy, pool.states[number : number + 1]),
        tokens="last",
    )
    return StepRow(term.name, len(prompt), 0, lambda: (row, None), distillations=(distance,))


def _choose(
    memory: ReplayMemory, tokenizer: PreTrainedTokenizerBase | None, wanted: int, seed: int
) -> list[np.ndarray]:
    """Return the first `wanted` refused prompts (of all rows, where none is a refusal) in the order of a hash; the same
    on every rank, whatever rows a rank holds."""
    for only_refusals in (True, False) if tokenizer is not None else (False,):
        own: list[tuple[int, int, np.ndarray]] = []
        for order, key, row in _own_rows(memory, seed):
            if len(own) == wanted:
                break
            prompt = _prompt_of(row)
            if len(prompt) and not (only_refusals and tokenizer and kind_of(row, tokenizer) != REFUSAL):
                own.append((order, key, prompt))
        if found := sorted(collectives.gather_objects(own), key=lambda item: item[:2])[:wanted]:
            return [prompt for _, _, prompt in found]
    raise ConfigError("memory.source: no row has a prompt, so there is none whose hidden state could be kept")


def _own_rows(memory: ReplayMemory, seed: int) -> Iterator[tuple[int, int, Row]]:
    """Yield (order, key, row) of this rank's rows of the memory, in the order of a hash."""
    rows = [row for row in memory.all_rows() if row.rank == collectives.rank()]
    keys = np.array([row.key for row in rows], np.uint64)
    orders = keyed_hash(keys, "prompts", seed)
    for place in np.argsort(orders, kind="stable"):
        yield int(orders[place]), int(keys[place]), rows[place].load()[0]


def _prompt_of(row: Row) -> np.ndarray:
    """The tokens before the row's first answer."""
    answers = np.flatnonzero(row.loss_mask)
    return np.array(row.input_ids[: answers[0]] if len(answers) else row.input_ids, np.int32)
