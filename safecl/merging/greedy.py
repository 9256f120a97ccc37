"""`greedy_soup`: averages those of many tuned models that do not lower the utility of the average.

    order the models by merit;  S = {the best}
    for each other model:  S = S + model  where merit(mean of S + model) >= merit(mean of S)

Source: Wortsman et al., Model soups, arXiv 2203.05482, recipe 1. Ours: merit is the utility of what passes the gate; a
model or average that does not pass has less merit than any that does. Without a gate merit is the utility alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safecl.config import ConfigError, RunConfig
from safecl.merging.choice import Measured
from safecl.merging.measuring import Measuring
from safecl.merging.models.opening import open_models
from safecl.merging.output.new_folder import NewFolder
from safecl.merging.registry import read_settings
from safecl.merging.run import check_parents
from safecl.merging.sweeps import Note, SweepReport, finish

KIND = "linear"
"""The average with weights 0 and 1, divided by their sum."""


def greedy_soup(
    tuned: Sequence[str | Path],
    *,
    config: RunConfig,
    out: str | Path,
    note: Note = lambda point: None,
    **settings: Any,
) -> SweepReport:
    """Make the greedy soup of tuned models, measured with what a run config measures.

    The folder `out` gets the table, the plot and, unless nothing passes the gate, the model. settings: those of
    MergeConfig. Raises ConfigError, with nothing written, where models, settings or data do not fit.
    """
    begin = time.monotonic()
    if not any(task.eval is not None for task in config.tasks):
        raise ConfigError("--pick greedy needs a task with `eval` in the config of --eval: it compares utilities")
    if len(tuned) < 2:
        raise ConfigError(f"soup needs 2 tuned models or more, and got {len(tuned)}: --tuned FOLDER, once for each")
    folder = NewFolder(Path(out).expanduser())
    check_parents(folder, tuned)
    folder.check_free()
    paths = [os.fspath(path) for path in tuned]
    weights = [[float(i == j) for j in range(len(paths))] for i in range(len(paths))]
    own = read_settings(KIND, {**settings, "weights": weights[0]})
    opened = open_models(KIND, own, base=None, tuned=paths, aligned=None, data=None)
    try:
        found, picked = _grow(Measuring.of(KIND, opened, config), settings, weights, note)
    finally:
        opened.close()
    passes = found[picked].gate is None or _merit(found[picked])[0]
    return finish(KIND, folder, found, picked if passes else None, {"tuned": paths}, settings, begin)


def _grow(
    work: Measuring, settings: dict[str, Any], units: Sequence[list[float]], note: Note
) -> tuple[list[Measured], int]:
    """Return all that was measured, and the index of the soup."""
    found: list[Measured] = []

    def measure(weights: list[float]) -> int:
        point = {"weights": weights}
        found.append(work.point(read_settings(KIND, {**settings, **point}), point))
        note(found[-1])
        return len(found) - 1

    alone = [measure(weights) for weights in units]
    best, *others = sorted(alone, key=lambda i: _merit(found[i]), reverse=True)
    for index in others:
        with_it = [a + b for a, b in zip(found[best].settings["weights"], units[index], strict=True)]
        trial = measure(with_it)
        if _merit(found[trial]) >= _merit(found[best]):
            best = trial
    return found, best


def _merit(point: Measured) -> tuple[bool, float]:
    utility = point.utility
    assert utility is not None, "there is a task"
    return point.gate is None or point.gate.passed, utility
