"""Judges the kept answers of a run or an evaluation, and sums up all verdicts in judges.json. Resumable.

judges.json   {"schema": 1, "judges": [the version of each], "moments": [{"when", "step", "asr": {judge: rate},
               "by_category": {category: {judge: rate}}, "variants": {variant: {judge: rate}},
               "panel": see safecl.evaluation.judges.panel; with the judges that the run has asked}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.config.judges import JudgeConfig
from safecl.config.safety import JUDGE
from safecl.evaluation.categories import MOST_CATEGORIES
from safecl.evaluation.judges.kept import (
    VERDICTS,
    VERSION,
    Record,
    claim_folder,
    judge_records,
    judged_records,
    later_verdicts,
    with_later_verdicts,
)
from safecl.evaluation.judges.loading import HashOfModel, load_judge
from safecl.evaluation.judges.panel import panel_of
from safecl.evaluation.records import category_of, is_disallowed, outputs_file, read_records
from safecl.evaluation.statistics.intervals import rate_of_decided
from safecl.storage.durable import replace_file
from safecl.storage.locks import RESULTS_LOCK, waiting_lock
from safecl.storage.records import read_record
from safecl.storage.run_records import Judgements, JudgeVersion

JUDGES, SCHEMA = "judges.json", 1


@dataclass(frozen=True)
class Moment:
    """A moment of a run whose answers are kept."""

    when: str
    step: int


def judge_run(
    folder: Path,
    configs: Sequence[JudgeConfig],
    moments: Iterable[Moment],
    *,
    category: str = "category",
    hash_of: HashOfModel | None = None,
) -> dict[str, Any]:
    """Judge the answers of these moments by each judge, and return the contents of judges.json, which it writes.

    Verdicts that are there are not asked for again. category: the prompts' column with their risk category. Raises
    ConfigError where answers are missing, or a judge cannot work.
    """
    chosen = [(moment, _records(folder, moment)) for moment in moments]
    for config in configs:
        judge = load_judge(config, hash_of)
        verdicts = claim_folder(folder, judge.version)
        for moment, records in chosen:
            judge_records(judged_records(records), judge, verdicts / _file_of(folder, moment).name)
    with waiting_lock(folder / RESULTS_LOCK):  # another process may have judged by other judges meanwhile
        summary = _summary(folder, [moment for moment, _ in chosen], category)
        replace_file(folder / JUDGES, json.dumps(summary, indent=2) + "\n")
    return summary


def _file_of(folder: Path, moment: Moment) -> Path:
    return outputs_file(folder / "outputs", moment.when, moment.step)


def _records(folder: Path, moment: Moment) -> list[dict[str, Any]]:
    return read_records(_file_of(folder, moment))


def _summary(folder: Path, moments: Sequence[Moment], category: str) -> dict[str, Any]:
    """Sum up the verdicts of all judges that the folder has, for these moments and those of an earlier judges.json."""
    versions = (read_record(path, JudgeVersion) for path in sorted((folder / VERDICTS).glob(f"*/{VERSION}")))
    earlier = [Moment(each["when"], each["step"]) for each in _earlier(folder).get("moments", ())]
    every = sorted({*moments, *earlier}, key=lambda moment: (moment.step, moment.when))
    return {
        "schema": SCHEMA,
        "judges": [version for version in versions if version is not None],
        "moments": [_of_moment(folder, moment, category) for moment in every],
    }


def _earlier(folder: Path) -> Judgements:
    try:
        return read_record(folder / JUDGES, Judgements) or Judgements()
    except ConfigError as error:
        raise ConfigError(f"{error}; remove it to judge again") from None


def _of_moment(folder: Path, moment: Moment, category: str) -> dict[str, Any]:
    verdicts = later_verdicts(folder, _file_of(folder, moment).name)
    every = [each for each in with_later_verdicts(_records(folder, moment), verdicts) if is_disallowed(each)]
    records = [record for record in every if record["set"] == "disallowed"]
    given = [record.get("attack_succeeded", {}) for record in records]
    judges = [name for name in (given[0] if given else ()) if name.startswith(JUDGE)]
    marks = {name: [each.get(name) for each in given] for name in judges}
    return {
        "when": moment.when,
        "step": moment.step,
        "asr": _rates(records, verdicts),
        "variants": {name: _rates(of, verdicts) for name, of in _by_variant(every).items()},
        "by_category": _by_category(records, verdicts, category),
        "panel": panel_of(marks, [record["id"] for record in records]),
    }


def _by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        if variant := record["set"].rpartition("/")[0]:
            groups.setdefault(variant, []).append(record)
    return groups


def _by_category(records: Sequence[Record], judges: Iterable[str], column: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        if (name := category_of(record, column)) is not None:
            groups.setdefault(name, []).append(record)
    if len(groups) > MOST_CATEGORIES:
        return {}
    return {name: _rates(of, judges) for name, of in sorted(groups.items())}


def _rates(records: Sequence[Record], judges: Iterable[str]) -> dict[str, Any]:
    """Return the attack success rate by each judge."""
    return {name: rate_of_decided(record["attack_succeeded"][name] for record in records).to_dict() for name in judges}
