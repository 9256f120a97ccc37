"""A judge in a process of its own: `python -m safecl.evaluation.judges.worker JUDGE.json RECORDS.jsonl VERDICTS.jsonl`.

It appends a verdict per record, as kept.py does, and ends, which gives all its memory back. `judge_in_process` starts
it, without the launcher's variables: the process belongs to no process group.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safecl.config import ConfigError
from safecl.config.judges import JudgeConfig
from safecl.distributed.environment import without_launcher
from safecl.evaluation.judges.kept import Record, judge_records, read_kept
from safecl.evaluation.judges.verdict import Verdict
from safecl.evaluation.records import whole_answer

SECONDS = 0.5


def judge_in_process(
    config: JudgeConfig, records: Sequence[Record], waiting: Callable[[bool], bool] = bool
) -> list[Verdict]:
    """Judge records by a process of its own and return their verdicts in order.

    waiting: called every half second with True while the process works, and once with False. Raises ConfigError with
    the process's message where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="safecl-judge-") as name:  # only this user can read it
        folder = Path(name)
        (folder / "judge.json").write_text(config.model_dump_json(exclude_unset=False), encoding="utf-8")
        asked = ({"id": each["id"], "prompt": each["prompt"], "answer": whole_answer(each)} for each in records)
        lines = map(json.dumps, asked)
        (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
        _run(folder, waiting, config.title)
        found = read_kept(folder / "verdicts.jsonl")
    return [found.get(record["id"], Verdict(None)) for record in records]


def _run(folder: Path, waiting: Callable[[bool], bool], title: str) -> None:
    names = ("judge.json", "records.jsonl", "verdicts.jsonl")
    command = [sys.executable, "-m", __name__, *(str(folder / name) for name in names)]
    with (folder / "errors").open("w+") as errors:
        with subprocess.Popen(command, env=without_launcher(), stdout=subprocess.DEVNULL, stderr=errors) as process:
            while _works(process):
                waiting(True)
        waiting(False)
        errors.seek(0)
        if process.returncode != 0:
            said = errors.read().strip().splitlines()
            raise ConfigError(said[-1] if said else f"judge {title}: its process ended with {process.returncode}")


def _works(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _main(judge: str, records: str, verdicts: str) -> int:
    from safecl.evaluation.judges.loading import load_judge

    try:
        loaded = load_judge(JudgeConfig.model_validate_json(Path(judge).read_text(encoding="utf-8")))
        lines = Path(records).read_text(encoding="utf-8").splitlines()
        judge_records([json.loads(line) for line in lines], loaded, Path(verdicts))
    except (ConfigError, OSError, RuntimeError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
