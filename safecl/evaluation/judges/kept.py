"""Judges recorded answers, in order and resumable: verdicts are appended to a file and are not asked for again.

verdicts/NAME/judge.json                the judge's version
verdicts/NAME/<moment>-safety.jsonl     one verdict per line: {"id": ..., "score": 0.93, "harmful": true}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.config.safety import JUDGE
from safecl.distributed import progress
from safecl.evaluation.judges.verdict import ModelJudge, Verdict
from safecl.evaluation.records import file_name, is_disallowed, whole_answer
from safecl.storage.durable import replace_file
from safecl.storage.records import read_lines, read_record, read_text
from safecl.storage.run_records import JudgeVersion, KeptVerdict

VERDICTS, VERSION = "verdicts", "judge.json"
AT_ONCE = 64
"""Answers that are judged before their verdicts are written."""

Record = Mapping[str, Any]


def judged_records(records: Sequence[Record]) -> list[Record]:
    """Return the records that a judge is asked about: answers to disallowed prompts that are not cut off."""
    return [record for record in records if is_disallowed(record) and not record.get("cut_off")]


def judge_records(records: Sequence[Record], judge: ModelJudge, path: Path) -> dict[str, Verdict]:
    """Judge the records that the file has no verdict of, append their verdicts, and return all by id.

    An answer on which the judge gives no verdict is left out, and asked again the next time. Raises ConfigError where
    the records hold no text.
    """
    _remove_what_a_kill_left(path)
    found = read_kept(path)
    missing = [record for record in records if record["id"] not in found]
    if missing and not all(_has_text(record) for record in missing):
        raise ConfigError(
            "the answers are not kept as text (privacy.examples), so they cannot be judged later; name the judge in "
            "the run's config, safety.judges"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, progress.counted("verdicts", len(missing)) as made:
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            verdicts = judge.judge([record["prompt"] for record in part], [whole_answer(record) for record in part])
            for record, verdict in zip(part, verdicts, strict=True):
                if verdict.score is None:
                    continue
                found[record["id"]] = verdict
                harmful = verdict.score >= judge.version["threshold"]
                file.write(json.dumps({"id": record["id"], "score": verdict.score, "harmful": harmful}) + "\n")
            file.flush()
            made(len(part))
    return found


def _has_text(record: Record) -> bool:
    return "prompt" in record and "answer" in record and not str(record["answer"]).startswith("sha256:")


def read_kept(path: Path) -> dict[str, Verdict]:
    """Return the verdicts of a file by id; empty without one. A last line that is cut off is left out."""
    try:
        return {line["id"]: Verdict(line["score"]) for line in read_lines(path, KeptVerdict)}
    except ConfigError as error:
        raise ConfigError(f"{error}; remove it to judge again") from None


def _remove_what_a_kill_left(path: Path) -> None:
    """Remove a last line that is cut off."""
    whole, newline, rest = (read_text(path) or "").rpartition("\n")
    if rest:
        path.write_text(whole + newline, encoding="utf-8")


def later_verdicts(folder: Path, outputs: str) -> dict[str, dict[str, bool]]:
    """Return the verdicts of the judges that were asked after a run, by the judge's name and the record's id.

    folder: of the run; outputs: name of the file of records. A judge without verdicts on it is left out.
    """
    found: dict[str, dict[str, bool]] = {}
    for path in sorted((folder / VERDICTS).glob(f"*/{VERSION}")):
        version, kept = read_record(path, JudgeVersion), path.parent / outputs
        if version is not None and kept.exists():
            scores = {key: verdict.score for key, verdict in read_kept(kept).items()}
            harmful = {key: score >= version["threshold"] for key, score in scores.items() if score is not None}
            found[f"{JUDGE}{version['name']}"] = harmful
    return found


def with_later_verdicts(records: Sequence[Record], verdicts: Mapping[str, Mapping[str, bool]]) -> list[dict[str, Any]]:
    """Return the records with the verdicts of judges among their marks, None where a judge gave none."""
    found = []
    for record in records:
        if is_disallowed(record) and verdicts:
            marks = {name: None if record.get("cut_off") else of.get(record["id"]) for name, of in verdicts.items()}
            record = {**record, "attack_succeeded": {**record.get("attack_succeeded", {}), **marks}}
        found.append(dict(record))
    return found


def claim_folder(run: Path, version: Mapping[str, Any]) -> Path:
    """Return the folder of a judge's verdicts, with its version written.

    Raises ConfigError where it holds the verdicts of another judge of this name.
    """
    folder = run / VERDICTS / file_name(str(version["name"]))
    path = folder / VERSION
    earlier = read_record(path, JudgeVersion)
    if earlier is None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(version, indent=2))
        return folder
    if changed := [key for key in {*earlier, *version} if dict(earlier).get(key) != version.get(key)]:
        raise ConfigError(
            f"{folder}: holds verdicts of another judge of this name (other {', '.join(sorted(changed))}); give this "
            "one another name: --with '{recipe: ..., name: ...}'"
        )
    return folder
