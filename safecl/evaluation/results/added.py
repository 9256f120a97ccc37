"""The results.json that `safecl eval` writes: a new evaluation is added to those that are there.

evaluations    the evaluations, as in the results.json of a run, the newest last
measurements   for each: when, on which model and with what it was measured, and the gate's verdict
gate           that of the newest evaluation
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.evaluation.provenance import SCHEMA
from safecl.evaluation.records import Privacy
from safecl.evaluation.results.moment import Evaluation
from safecl.storage.durable import replace_file
from safecl.storage.locks import RESULTS_LOCK, waiting_lock
from safecl.storage.records import read_record
from safecl.storage.run_records import Results, Version

RESULTS = "results.json"


def earlier_results(folder: Path) -> dict[str, Any]:
    """Return the results of earlier evaluations in the folder; empty without any.

    Raises ConfigError where the folder holds the results of a run, or ones that cannot be read or added to.
    """
    path = folder / RESULTS
    try:
        version = read_record(path, Version)
        if version is None:
            return {}
        if version.get("schema", SCHEMA) > SCHEMA:
            raise ConfigError(f"{path}: was written by a newer safecl, which can add to it")
        results = dict(read_record(path, Results) or {})
    except ConfigError as error:
        raise ConfigError(f"{error}; it is not overwritten, so choose another --output") from None
    if "methods" in results:
        raise ConfigError(f"{path}: is of a run, and would be overwritten; choose another --output")
    return results


def free_name(name: str, earlier: Mapping[str, Any]) -> str:
    """Return the name of a new evaluation: `name`, or `name 2`, ... where an earlier one has it."""
    taken = {evaluation["when"] for evaluation in earlier.get("evaluations", ())}
    numbers = (f"{name} {number}" for number in range(2, len(taken) + 3))
    return next(free for free in (name, *numbers) if free not in taken)


def add_results(
    folder: Path,
    name: str,
    evaluation: Evaluation,
    gate: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    privacy: Privacy,
) -> Evaluation:
    """Write the answers into outputs/ and add the evaluation to results.json. Rank 0 calls it.

    name: of the model; the evaluation gets the first name that is free now, since another process may have added one
    meanwhile. facts: has finished, model, safecl and provenance. Returns the evaluation under its name. Raises
    ConfigError where the folder cannot be written, or its results cannot be added to any more.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder / RESULTS_LOCK):
            earlier = earlier_results(folder)
            evaluation = replace(evaluation, when=free_name(name, earlier))
            results = _added(earlier, evaluation, gate, facts, privacy)
            evaluation.write_outputs(folder / "outputs", privacy)
            replace_file(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return evaluation


def _added(
    earlier: Mapping[str, Any],
    evaluation: Evaluation,
    gate: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    privacy: Privacy,
) -> dict[str, Any]:
    new = {"when": evaluation.when, **facts, "gate": gate}
    return {
        "schema": SCHEMA,
        **facts,
        "privacy": _strictest([privacy, earlier.get("privacy", privacy)]),
        "evaluations": [*earlier.get("evaluations", ()), evaluation.to_dict()],
        "measurements": [*_measurements(earlier), new],
        "gate": gate,
    }


def _measurements(earlier: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what is known of each earlier evaluation; a safecl before schema 1 kept the model and the gate alone."""
    if "measurements" in earlier or not earlier:
        return list(earlier.get("measurements", ()))
    known = {key: earlier.get(key) for key in ("safecl", "model", "gate")}
    return [{"when": evaluation["when"], **known} for evaluation in earlier["evaluations"]]


def _strictest(settings: Sequence[Privacy]) -> Privacy:
    order: tuple[Privacy, ...] = ("none", "hashed", "full")
    return min(settings, key=order.index)
