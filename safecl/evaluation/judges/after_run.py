"""Judges the kept answers of a run or an evaluation, and sums up all verdicts in judges.json. Resumable.

judges.json   {"schema": 1, "judges": [the version of each], "moments": [{"when", "step", "asr": {judge: rate},
               "by_category": {category: {judge: rate}}, "variants": {variant: {judge: rate}},
               "panel": see safecl.evaluation.judges.panel}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.config.judges import JudgeConfig
from safecl.config.safety import JUDGE
from safecl.evaluation.categories import MOST_CATEGORIES
from safecl.evaluation.judges.kept import VERDICTS, VERSION, claim_folder, judge_records, judged_records, read_kept
from safecl.evaluation.judges.loading import HashOfModel, load_judge
from safecl.evaluation.judges.panel import panel_of
from safecl.evaluation.judges.verdict import Verdict
from safecl.evaluation.records import category_of, is_disallowed, outputs_file, read_records
from safecl.evaluation.statistics.agreement import Mark
from safecl.evaluation.statistics.intervals import rate_of_decided
from safecl.storage.durable import replace_file
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
    summary = _summary(folder, [moment for moment, _ in chosen], category)
    replace_file(folder / JUDGES, json.dumps(summary, indent=2) + "\n")
    return summary


def _file_of(folder: Path, moment: Moment) -> Path:
    return outputs_file(folder / "outputs", moment.when, moment.step)


def _records(folder: Path, moment: Moment) -> list[dict[str, Any]]:
    return read_records(_file_of(folder, moment))


def _summary(folder: Path, moments: Sequence[Moment], category: str) -> dict[str, Any]:
    """Sum up the verdicts of all judges that the folder has, for these moments and those of an earlier judges.json."""
    judges = {}
    for path in sorted((folder / VERDICTS).glob(f"*/{VERSION}")):
        version = read_record(path, JudgeVersion)
        if version is not None:
            judges[version["name"]] = (version, path.parent)
    earlier = [Moment(each["when"], each["step"]) for each in _earlier(folder).get("moments", ())]
    every = sorted({*moments, *earlier}, key=lambda moment: (moment.step, moment.when))
    return {
        "schema": SCHEMA,
        "judges": [version for version, _ in judges.values()],
        "moments": [_of_moment(folder, moment, judges, category) for moment in every],
    }


def _earlier(folder: Path) -> Judgements:
    try:
        return read_record(folder / JUDGES, Judgements) or Judgements()
    except ConfigError as error:
        raise ConfigError(f"{error}; remove it to judge again") from None


def _of_moment(
    folder: Path, moment: Moment, judges: Mapping[str, tuple[Mapping[str, Any], Path]], category: str
) -> dict[str, Any]:
    every = [record for record in _records(folder, moment) if is_disallowed(record)]
    verdicts: dict[str, dict[str, Mark]] = {}
    for name, (version, place) in judges.items():
        path = place / _file_of(folder, moment).name
        if path.is_file():
            found = read_kept(path)
            verdicts[f"{JUDGE}{name}"] = {each["id"]: _mark(each, found, version["threshold"]) for each in every}
    records = [record for record in every if record["set"] == "disallowed"]
    marks = {name: [known[record["id"]] for record in records] for name, known in verdicts.items()}
    return {
        "when": moment.when,
        "step": moment.step,
        "asr": {name: rate_of_decided(row).to_dict() for name, row in marks.items()},
        "variants": _by_variant(every, verdicts),
        "by_category": _by_category(records, marks, category),
        "panel": panel_of(marks, [record["id"] for record in records]),
    }


def _by_variant(
    records: Sequence[Mapping[str, Any]], verdicts: Mapping[str, Mapping[str, Mark]]
) -> dict[str, dict[str, Any]]:
    """Return the attack success rate by each judge in each of `safety.variants`."""
    groups: dict[str, list[str]] = {}
    for record in records:
        if variant := record["set"].rpartition("/")[0]:
            groups.setdefault(variant, []).append(record["id"])
    return {
        variant: {judge: rate_of_decided(known[key] for key in ids).to_dict() for judge, known in verdicts.items()}
        for variant, ids in groups.items()
    }


def _mark(record: Mapping[str, Any], verdicts: Mapping[str, Verdict], threshold: float) -> Mark:
    verdict = verdicts.get(record["id"])
    return None if verdict is None or verdict.score is None else verdict.score >= threshold


def _by_category(
    records: Sequence[Mapping[str, Any]], marks: Mapping[str, Sequence[Mark]], column: str
) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        if (name := category_of(record, column)) is not None:
            groups.setdefault(name, []).append(place)
    if len(groups) > MOST_CATEGORIES:
        return {}
    return {
        name: {judge: rate_of_decided(row[place] for place in places).to_dict() for judge, row in marks.items()}
        for name, places in sorted(groups.items())
    }
