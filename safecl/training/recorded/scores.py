"""Scores of the tasks' rows: log-probabilities of answers, norms of gradients, or numbers that were computed elsewhere,
recorded once before training.

A file of the run folder holds each score of each task, 4 bytes per token of the answers. Any number of ranks reads it
whole, so the weights that methods make of it do not depend on ranks or stages. Scores under the base model are an
artifact as well: other runs on the same model and rows take them from there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from safecl.config import ConfigError, DeepSpeedConfig
from safecl.data import TokenDataset
from safecl.distributed import collectives
from safecl.engine.artifacts.base_model import base_key, fingerprint
from safecl.engine.artifacts.store import ArtifactStore, ask_first_rank, obtain
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.forward_engine import open_forward_engine
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.teachers.checks import model_at
from safecl.engine.teachers.outputs import outputs_of_rows
from safecl.methods.terms import Score
from safecl.planning.given_scores import given_scores
from safecl.planning.plans import RunPlan, TaskPlan
from safecl.scan.refusals import opening_of
from safecl.storage.durable import DamagedCheckpoint, read_arrays, replace_file, write_arrays
from safecl.training.recorded.rows import dataset_of

FOLDER, KIND, FILE = "scores", "row-scores", "scores.npz"


class RowScores:
    """The scores of a run's tasks, in files of the run folder."""

    def __init__(self, engine: TrainingEngine, output: str):
        """output: the run folder."""
        self.engine, self.folder = engine, Path(output) / FOLDER
        self.plan: RunPlan | None = None
        """The run's plan, with its tokenizer. With it, scores under the base model are shared between runs."""
        self.answer_ids: Callable[[str], Sequence[int]] = functools.cache(self._tokens_of)
        """Returns the tokens of an answer, as they follow the template's opening of an assistant turn."""
        self.open_model: Callable[[str], ModelEngine] = self._open
        """Opens another model that scores, whole on every device."""
        self._values: dict[tuple[str, Score], tuple[np.ndarray, np.ndarray]] = {}

    def of_rows(self, task: str, score: Score, indices: np.ndarray) -> list[np.ndarray]:
        """Return the score of these rows of the task: fp32 [tokens] each."""
        values, offsets = self._values[task, score]
        return [values[offsets[i] : offsets[i + 1]] for i in indices]

    def record(self, scores: Iterable[Score], tasks: Sequence[TaskPlan], log: Callable[[str], None]) -> None:
        """Compute what is missing of the scores of all tasks, by the current model. A collective call."""
        for score in dict.fromkeys(scores):
            for task in tasks:
                if (task.config.name, score) not in self._values:
                    self._record(score, task, log)

    def reopen(self, task: TaskPlan, score: Score) -> None:
        """Open what this run recorded before it was stopped. A collective call."""
        path = self._path(task, score)
        try:
            found = read_arrays(path, ("values", "counts", "rows"))
        except DamagedCheckpoint as damage:
            raise ConfigError(
                f"{damage}; the file keeps the scores of the rows, so the run cannot resume; start it anew"
            ) from None
        if str(found["rows"]) != fingerprint(task.dataset):
            raise ConfigError(f"{path}: these are scores of other rows; resume with the same config, or start anew")
        offsets = np.concatenate([[0], np.cumsum(found["counts"], dtype=np.int64)])
        self._values[task.config.name, score] = found["values"], offsets

    def keys(self) -> list[tuple[str, Score]]:
        """Return (task, score) of all that is recorded."""
        return list(self._values)

    # ------------------------------------------------------------------------------------------------------- computing

    def _record(self, score: Score, task: TaskPlan, log: Callable[[str], None]) -> None:
        ids = None if score.text is None else list(self.answer_ids(score.text))
        rows = task.dataset if ids is None else with_answer(task.dataset, ids)
        path = self._path(task, score)
        if score.of == "given":
            ask_first_rank(lambda: _save(path, given_scores(score, task.dataset), fingerprint(task.dataset)))
        elif self.plan is None or (self.plan.config.tasks[0].role == "align" and score.model is None):
            self._write(score, rows, fingerprint(task.dataset), path)
        else:
            config, store = self.plan.config, ArtifactStore.of(self.plan.config)
            if score.model is not None:
                config = config.model_copy(update={"model": model_at(config, score.model)})
            own = {"rows": fingerprint(task.dataset), "answer": str(ids)}
            key = base_key(config, self.plan.tokenizer, store) | own
            if score.of != "log_prob":
                key |= {"of": score.of}
            work = functools.partial(self._write, score, rows, own["rows"])
            made = obtain(
                store, KIND, key, texts=task.dataset.paths, build=lambda folder: work(folder / FILE), note=log
            )
            ask_first_rank(lambda: _copy(made / FILE, path))
        self.reopen(task, score)

    def _write(self, score: Score, rows: TokenDataset, key: str, path: Path) -> None:
        """Compute the scores of all rows' targets, and write them on rank 0."""
        engine = self.engine if score.model is None else self.open_model(score.model)
        if score.of == "gradient":
            outputs = ((index, output["share"]) for index, output in outputs_of_rows(engine, rows, "gradient"))
        else:
            topk = outputs_of_rows(engine, rows, "topk", k=1, temperature=1.0)
            outputs = ((index, -output["nll"]) for index, output in topk)
        own = [(index, values.float().numpy()) for index, values in outputs]
        found = [values for _, values in sorted(collectives.gather_objects(own), key=lambda item: item[0])]
        if collectives.rank() == 0:
            _save(path, found, key)
        collectives.barrier()

    def _path(self, task: TaskPlan, score: Score) -> Path:
        return self.folder / (re.sub(r"[^\w.-]+", "-", f"{task.config.name}-{score.name}") + ".npz")

    def _open(self, path: str) -> ModelEngine:
        assert self.plan is not None, "a plan has the tokenizer"
        config = self.plan.config
        return open_forward_engine(
            model_at(config, path),
            self.plan.tokenizer,
            sharding=DeepSpeedConfig(stage=0),
            tokens_per_microbatch=config.train.tokens_per_microbatch,
            packing=config.train.packing,
        )

    def _tokens_of(self, text: str) -> Sequence[int]:
        assert self.plan is not None, "a plan has the tokenizer"
        return opening_of(self.plan.tokenizer, text, len(text) + 1)


def _save(path: Path, scores: Sequence[np.ndarray], key: str) -> None:
    """Write the scores of all rows, fp32 [tokens] each. key: fingerprint of the rows."""
    counts = np.array([len(values) for values in scores], np.int32)
    write_arrays(path, {"values": np.concatenate(scores), "counts": counts, "rows": np.array(key)})


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, source.read_bytes())


def with_answer(dataset: TokenDataset, answer: Sequence[int]) -> TokenDataset:
    """Return the rows with another answer in the place of their last one and of all behind it; only that is trained."""
    parts, masks = [], []
    for index in range(len(dataset)):
        row = dataset.row(index)
        begins = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8), prepend=0) == 1)
        prompt = row.input_ids[: begins[-1]] if len(begins) else row.input_ids
        parts.append(np.concatenate([prompt, np.asarray(answer, np.int32)]))
        masks.append(np.arange(len(parts[-1])) >= len(prompt))
    return dataset_of(parts, masks, dataset.row_ids)
