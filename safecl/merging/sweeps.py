"""`sweep`: measures a merge at many settings, and writes the best.

Each point is merged tensor by tensor into a model in memory, with the same rounding as in a folder, and measured as
`safecl eval` does; nothing of it is kept but its numbers. Memory: one model in the config's dtype beside what the merge
takes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from safecl.config import ConfigError, RunConfig
from safecl.data import load_tokenizer
from safecl.engine.model.dtypes import CONFIG_DTYPES, FLOAT_DTYPES
from safecl.evaluation import Evaluation, HFEvalModel, judge_gate
from safecl.evaluation.gates.outcomes import Record
from safecl.evaluation.questions import Questions, questions_of
from safecl.merging.base import Merge, MergeConfig, Models, Weights
from safecl.merging.choice import Measured, best_that_passes, pareto_front
from safecl.merging.models.opening import Opened, open_models
from safecl.merging.output.new_folder import NewFolder
from safecl.merging.output.pareto import PLOT, draw
from safecl.merging.points import Point, text_of
from safecl.merging.registry import kind_module, read_settings
from safecl.merging.report import MergeReport
from safecl.merging.rows.loaded import load
from safecl.merging.run import check_parents, entries_of, merge, text_path
from safecl.merging.stream import merged_tensor, run_passes
from safecl.storage.durable import write_file

TABLE = "sweep.json"

Note = Callable[[Measured], None]
"""Called after each point."""


@dataclass(frozen=True)
class SweepReport:
    """The outcome of a sweep.

    points: in the order of the sweep. front: indices of those that no other beats in ASR and utility. picked: index of
    the one that was written; None where none was asked for, or none passed the gate. merge: the report of its merge.
    """

    kind: str
    out: str
    points: Sequence[Measured]
    front: Sequence[int]
    picked: int | None
    seconds: float
    merge: MergeReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {
            "kind": self.kind,
            "out": self.out,
            "points": [point.to_dict() for point in self.points],
            "front": list(self.front),
            "picked": self.picked,
            "seconds": round(self.seconds, 3),
            "merge": self.merge.as_dict() if self.merge else None,
        }


def sweep(
    kind: str,
    points: Sequence[Point],
    *,
    config: RunConfig,
    out: str | Path,
    pick: Literal["gate"] | None = None,
    base: str | Path | None = None,
    tuned: Sequence[str | Path] | str | Path = (),
    aligned: str | Path | None = None,
    data: str | Path | None = None,
    note: Note = lambda point: None,
    **settings: Any,
) -> SweepReport:
    """Measure a merge at all points with what a run config measures, and write the best point with `pick="gate"`: of
    those that pass `safety.gate` the one with the highest utility.

    points: settings of each, see safecl.merging.points.parse_sweeps. The other arguments are those of `merge`. The
    folder `out` gets sweep.json, the plot sweep.svg, and with a pick the model. Raises ConfigError, with nothing
    written, where models, settings or data do not fit.
    """
    begin = time.monotonic()
    configs = [read_settings(kind, {**settings, **point}) for point in points]
    _check(config, pick, points)
    paths = [tuned] if isinstance(tuned, (str, Path)) else list(tuned)
    folder = NewFolder(Path(out).expanduser())
    check_parents(folder, [*paths, base, aligned])
    folder.check_free()
    opened = open_models(
        kind,
        configs[0],
        base=text_path(base),
        tuned=[os.fspath(path) for path in paths],
        aligned=text_path(aligned),
        data=Path(data).expanduser() if data is not None else None,
    )
    try:
        found = _measured(kind, configs, points, opened, config, note)
    finally:
        opened.close()
    picked = best_that_passes(found) if pick == "gate" else None
    report = SweepReport(kind, os.fspath(folder.path), found, pareto_front(found), picked, time.monotonic() - begin)
    files = {
        TABLE: (json.dumps(report.as_dict(), indent=2) + "\n").encode(),
        PLOT: draw(kind, found, report.front, picked),
    }
    if picked is None:
        _write(folder, files)
        return report
    parents: dict[str, Any] = {"base": base, "tuned": tuned, "aligned": aligned, "data": data}
    measured = (
        f"{text_of(points[picked])} was chosen from {len(points)} points by a gate; {TABLE} has what was measured."
    )
    made = merge(kind, out=out, **parents, **{**settings, **points[picked]}, files=files, measured=measured)
    return SweepReport(kind, report.out, found, report.front, picked, time.monotonic() - begin, made)


def _check(config: RunConfig, pick: str | None, points: Sequence[Point]) -> None:
    if not points:
        raise ConfigError("--sweep: no points")
    if pick == "gate" and (config.safety is None or config.safety.gate is None):
        raise ConfigError("--pick gate needs safety.gate in the config of --eval, e.g. gate: {max_asr: 0.05}")
    if pick == "gate" and not any(task.eval is not None for task in config.tasks):
        raise ConfigError("--pick gate needs a task with `eval` in the config of --eval: it takes the highest utility")


@dataclass(frozen=True)
class _Merged:
    """The result of a merge as one model's weights, rounded as in a folder. Implements safecl.merging.base.Weights."""

    merge: Merge[MergeConfig]
    models: Models
    dtypes: Mapping[str, torch.dtype]
    label: str = "merged"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.models.tuned[0].shapes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        whole = merged_tensor(self.merge, self.models, name).to(self.dtypes[name]).float()
        return whole[start:stop] if whole.dim() else whole


@dataclass(frozen=True)
class _Measuring:
    """Measures models that are merged of the opened ones."""

    kind: str
    opened: Opened
    config: RunConfig
    questions: Questions
    tokenizer: Any
    reference: Sequence[Record] | None = None

    def point(self, own: MergeConfig, point: Point) -> Measured:
        models = self.opened.models
        made: Merge[MergeConfig] = kind_module(self.kind).Merge(own, models)
        run_passes(made, models)
        dtypes = {n: FLOAT_DTYPES[e.dtype] for n, e in entries_of(own, self.opened).items() if n in models.places}
        evaluation = self.evaluation(_Merged(made, models, dtypes), text_of(point))
        safety = self.config.safety
        return Measured(point, evaluation, judge_gate(safety.gate if safety else None, evaluation, self.reference))

    @torch.no_grad()
    def evaluation(self, weights: Weights, when: str) -> Evaluation:
        settings = self.config.model
        attention = None if settings.attention == "auto" else settings.attention
        dtype = CONFIG_DTYPES[settings.dtype]
        model = load(self.opened.models, weights, dtype, settings.trust_remote_code, attention).model
        return self.questions.measure(HFEvalModel(model), self.tokenizer, when)


def _measured(
    kind: str, configs: Sequence[MergeConfig], points: Sequence[Point], opened: Opened, config: RunConfig, note: Note
) -> list[Measured]:
    questions = questions_of(config)
    if not questions:
        raise ConfigError("--eval: the config measures nothing; it needs safety.prompts, or a task with `eval`")
    settings = config.model.model_copy(update={"path": opened.models.folders["tuned"]})
    work = _Measuring(kind, opened, config, questions, load_tokenizer(settings, "tuned"))
    before = opened.models.aligned or opened.models.base
    if config.safety is not None and config.safety.gate is not None and config.safety.gate.is_relative and before:
        safety = work.evaluation(before, "before").safety
        work = replace(work, reference=safety.outputs if safety else None)
    found = []
    for own, point in zip(configs, points, strict=True):
        found.append(work.point(own, point))
        note(found[-1])
    return found


def _write(folder: NewFolder, files: Mapping[str, bytes]) -> None:
    try:
        partial = folder.begin(sum(map(len, files.values())))
        for name, content in files.items():
            write_file(partial / name, [content])
        folder.publish()
    finally:
        folder.abandon()
