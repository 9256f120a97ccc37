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

from safecl.config import ConfigError, RunConfig
from safecl.merging.choice import Measured, best_that_passes, pareto_front
from safecl.merging.measuring import Measuring
from safecl.merging.models.opening import open_models
from safecl.merging.output.new_folder import NewFolder
from safecl.merging.output.pareto import PLOT, draw
from safecl.merging.points import Point, text_of
from safecl.merging.registry import read_settings
from safecl.merging.report import MergeReport
from safecl.merging.run import check_parents, merge, text_path
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
        work, found = Measuring.of(kind, opened, config), []
        for own, point in zip(configs, points, strict=True):
            found.append(work.point(own, point))
            note(found[-1])
    finally:
        opened.close()
    picked = best_that_passes(found) if pick == "gate" else None
    parents: dict[str, Any] = {"base": base, "tuned": paths, "aligned": aligned, "data": data}
    return finish(kind, folder, found, picked, parents, settings, begin)


def finish(
    kind: str,
    folder: NewFolder,
    found: Sequence[Measured],
    picked: int | None,
    parents: Mapping[str, Any],
    settings: Mapping[str, Any],
    begin: float,
) -> SweepReport:
    """Write the table and the plot, and with a pick the model. parents, settings: arguments of `merge`."""
    report = SweepReport(kind, os.fspath(folder.path), found, pareto_front(found), picked, time.monotonic() - begin)
    table = json.dumps(report.as_dict(), indent=2) + "\n"
    files = {TABLE: table.encode(), PLOT: draw(kind, found, report.front, picked)}
    if picked is None:
        _write(folder, files)
        return report
    point = found[picked].settings
    measured = f"`{text_of(point)}` was chosen from {len(found)} points; {TABLE} has what was measured."
    made = merge(kind, out=folder.path, **parents, **{**settings, **point}, files=files, measured=measured)
    return replace(report, seconds=time.monotonic() - begin, merge=made)


def _check(config: RunConfig, pick: str | None, points: Sequence[Point]) -> None:
    if not points:
        raise ConfigError("--sweep: no points")
    if pick == "gate" and (config.safety is None or config.safety.gate is None):
        raise ConfigError("--pick gate needs safety.gate in the config of --eval, e.g. gate: {max_asr: 0.05}")
    if pick == "gate" and not any(task.eval is not None for task in config.tasks):
        raise ConfigError("--pick gate needs a task with `eval` in the config of --eval: it takes the highest utility")


def _write(folder: NewFolder, files: Mapping[str, bytes]) -> None:
    try:
        partial = folder.begin(sum(map(len, files.values())))
        for name, content in files.items():
            write_file(partial / name, [content])
        folder.publish()
    finally:
        folder.abandon()
