"""Folders of runs that somebody else has written: each value of their JSON files takes wrong forms, and files are
links, pipes, too deep or too large. Verbs that read them refuse by name, or show what is there."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from safecl.commands.judging.judge import moments_of, print_found
from safecl.commands.report import print_table
from safecl.config import ConfigError
from safecl.evaluation import Evaluation, results_table
from safecl.evaluation.gates.folders import judge_folder
from safecl.evaluation.judges import after_run
from safecl.launching.status import status_of
from safecl.report.comparison import comparison_page, read_runs
from safecl.report.folder import read_run
from safecl.report.run import run_report
from safecl.sweeping.collecting import read_numbers
from safecl.terminal import Terminal, fact
from tests.report import folders

HOSTILE = "\x1b[31m\u202e[/INST]"
WRONG = (
    None,
    "<script>alert(1)</script>",
    HOSTILE,
    -1,
    10**400,
    1e308,
    "[/red][bold",
    "x" * 5000,
    [],
    {},
    [None],
    {"a": []},
    True,
)
LIMITS = ["safety.gate.max_asr=0.5", "safety.gate.max_over_refusal=0.5"]


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    """Every place of a JSON value, outer ones first; of lists the first two items."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*at, key))


def replaced(value: object, at: tuple, new: object, remove: bool = False) -> object:
    if not at:
        return new
    whole = copy.deepcopy(value)
    inner = whole
    for key in at[:-1]:
        inner = inner[key]
    if remove:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return whole


def answer(kind: str, number: int) -> dict:
    marks = {"keyword:gcg": False} if kind == "disallowed" else {}
    return {
        "id": f"{kind}-{number}", "set": kind, "prompt": f"p {number}", "answer": "no", "tags": {"category": "a"},
        "finished": True, "off_task": None, "affirmative": False, "complied": False, "cut_off": False,
        "refused": {"keyword:gcg": True, "prefix:xstest": False}, "attack_succeeded": marks,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run of two tasks with everything that the verbs read."""
    where = tmp_path_factory.mktemp("foreign") / "run"
    tasks = folders.task("t", 4) | folders.task("u", 6)
    moments = [
        Evaluation("start", 0, folders.safety(1, over_refused=3), tasks),
        Evaluation("after t", 4, folders.safety(3, over_refused=3), tasks),
        Evaluation("after u", 8, folders.safety(5, over_refused=9), tasks),
    ]
    gate = folders.gate(5, 0.4, "passed")
    folders.write_run(
        where,
        gate=gate,
        moments=moments,
        provenance=folders.provenance(),
        finished="2026-01-31T12:00:00Z",
        events=[folders.event()],
        weight_drift={"layer 0": {"relative": 0.01, "absolute": 0.5}},
    )
    lines = [json.dumps(answer(kind, i)) for kind in ("disallowed", "benign") for i in range(40)]
    for path in (where / "outputs").iterdir():
        path.write_text("\n".join(lines) + "\n")
    (where / "run.json").write_text(json.dumps({"config": {"methods": {"der": {}}}, "versions": {"safecl": "0.1.0"}}))
    (where / "ranks.json").write_text(json.dumps({"hosts": ["h", "i"], "tasks": {"t": 4, "u": 4}}))
    (where / "rank_speeds.jsonl").write_text(json.dumps({"slowest": "rank 1", "stragglers": ["rank 1"]}) + "\n")
    panel = {"cohen_kappa": {"a and b": 0.5}, "krippendorff_alpha": 0.4, "disagreements": ["disallowed-1"]}
    asr = {"judge:a": folders.share(3).to_dict()}
    judged = {"schema": 1, "judges": [{"name": "a", "threshold": 0.5}]}
    parts = {"by_category": {"fraud": asr}, "variants": {"prefill-5": asr}}
    judged |= {"moments": [{"when": "start", "step": 0, "asr": asr, **parts, "panel": panel}]}
    (where / "judges.json").write_text(json.dumps(judged))
    verdicts = where / "verdicts" / "b"
    verdicts.mkdir(parents=True)
    (verdicts / "judge.json").write_text(json.dumps({"name": "b", "threshold": 0.5}))
    scores = [json.dumps({"id": f"disallowed-{i}", "score": i / 40, "harmful": i > 20}) for i in range(40)]
    (verdicts / "000008-after-u-safety.jsonl").write_text("\n".join(scores) + "\n")
    (where / "scan").mkdir()
    scanned = {"task": "t", "flagged": 2, "rows": 9, "threshold": {"source": "benign", "false_alarm": 0.01}}
    (where / "scan" / "results.json").write_text(json.dumps({"action": "drop", "tasks": [scanned], "notes": ["n"]}))
    return where


def read_all(run: Path, prints: bool = False) -> list[str]:
    """Read a folder as `report`, `gate`, `status`, `judge` and a sweep do. Returns the messages of refusals.

    prints: print the tables, too.
    """
    refusals = []
    for verb in (
        lambda: run_report(read_run(run)),
        lambda: comparison_page(read_runs([run, run])),
        lambda: [judge_folder(run, overrides=LIMITS).gate.verdict],
        lambda: status_of(run).facts,
        lambda: [read_numbers(run).verdict],
        lambda: [judge_again(run)],
        *([lambda: printed(run)] if prints else []),
    ):
        try:
            shown = verb()
        except ConfigError as error:
            shown = [str(error)]
            refusals += shown
        assert not isinstance(shown, str) or "<script>alert" not in shown, "a page holds a script"
        text = shown if isinstance(shown, str) else " ".join(str(part) for line in shown for part in _parts(line))
        assert "\x1b" not in text and "\u202e" not in text, text
    return refusals


def printed(run: Path) -> list[str]:
    """Print the tables of `report` and `eval`, and the facts of `status`."""
    out = io.StringIO()
    terminal, found = Terminal(file=out, width=120), read_run(run)
    if found.evaluations:
        print_table(terminal, [found, found])
        terminal.print(results_table(found.evaluations))
    for label, text in status_of(run).facts:
        terminal.print(fact(label, text))
    return [out.getvalue()]


def judge_again(run: Path) -> str:
    """Return what `judge` says of the verdicts that are kept; judges.json stays as it is."""
    said = io.StringIO()
    with mock.patch.object(after_run, "replace_file"):
        found = after_run.judge_run(run, [], moments_of(read_run(run), every_moment=True))
    print_found(Terminal(file=said, width=200), found)
    return said.getvalue()


def _parts(line: object) -> tuple:
    return line if isinstance(line, tuple) else (line,)


def test_a_sound_folder_is_read_by_every_verb(folder):
    assert "attack" in run_report(read_run(folder)).lower() and read_numbers(folder).values
    assert judge_folder(folder, overrides=LIMITS).gate.verdict and status_of(folder).steps == 8
    assert comparison_page(read_runs([folder, folder])) and "refusal" in printed(folder)[0]
    assert all(part in judge_again(folder) for part in ("judge:b", "after u"))


FILES = ("results.json", "run.json", "ranks.json", "judges.json", "scan/results.json", "verdicts/b/judge.json")
LINES = (
    "metrics.jsonl",
    "rank_speeds.jsonl",
    "outputs/000008-after-u-safety.jsonl",
    "verdicts/b/000008-after-u-safety.jsonl",
)


def spoilt(sound: object, some: int) -> Iterator[object]:
    """Yield the value with each of its places wrong in turn; in each of `some` places in a row with another wrong
    form, so that with 1 every place takes every form."""
    for number, at in enumerate(places(sound)):
        forms = [replaced(sound, at, wrong) for wrong in WRONG]
        forms += [replaced(sound, at, None, remove=True)] if at else []
        yield from forms[number % some :: some]


@pytest.mark.parametrize("some", [pytest.param(1, marks=pytest.mark.long), 6])
@pytest.mark.parametrize("name", FILES)
def test_every_value_in_wrong_forms_is_shown_or_refused(folder, tmp_path, name, some):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    refusals = []
    for value in spoilt(json.loads((folder / name).read_text()), some):
        text = json.dumps(value)
        (run / name).write_text(text)
        refusals += read_all(run, prints=json.dumps(HOSTILE)[1:-1] in text)
    assert any(f"{name}: " in line and "safecl did not write it so" in line for line in refusals)


@pytest.mark.parametrize("name", LINES)
def test_every_value_of_a_line_in_wrong_forms_is_shown_or_refused(folder, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    first, _, rest = (folder / name).read_text().partition("\n")
    refusals = []
    for value in spoilt(json.loads(first), 2):
        line = json.dumps(value)
        (run / name).write_text(f"{line}\n{rest}")
        refusals += read_all(run, prints=json.dumps(HOSTILE)[1:-1] in line)
    assert any(name in line and "safecl did not write it so" in line for line in refusals)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_another_place(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def a_deep_list(path: Path) -> None:
    path.write_text("[" * 100_000 + "\n")


def bytes_that_are_no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00{\n")


def a_large_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("hurt", [a_pipe, a_link_to_another_place, a_deep_list, bytes_that_are_no_text, a_large_file])
@pytest.mark.parametrize("name", [*FILES, *LINES, "config.yaml", "exit_code"])
def test_a_file_that_is_made_to_hurt_is_refused_by_name(folder, tmp_path, name, hurt):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / name).unlink(missing_ok=True)
    hurt(run / name)
    said = read_all(run)
    harmless = name in ("config.yaml", "exit_code") and hurt in (a_deep_list, bytes_that_are_no_text)
    assert harmless or any(name in line for line in said), said
