"""A verb says something before torch is loaded, and its process ends right after its last line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import pytest

from safecl.commands import spinner
from safecl.commands.verbs import options_first
from safecl.distributed.progress import counted
from safecl.distributed.verbosity import Level
from tests.report.folders import write_run
from tests.sweeping.folders import write_run as write_answers

FIRST_LINES = """
import json, sys
from safecl.commands import spinner

def announce(verb, what):
    print(verb, what, sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
    sys.exit(0)

spinner.announce = announce  # before the modules that import it by name
from safecl import cli

for arguments in json.loads(sys.argv[1]):
    try:
        cli.main(arguments)
    except SystemExit as ended:
        if ended.code:
            print(arguments, ended.code)
"""
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import of either fails

from safecl import cli
for arguments in json.loads(sys.argv[1]):
    try:
        cli.main(arguments)
    except SystemExit as ended:
        if ended.code:
            print(arguments, ended.code)
"""
LAST_LINE = """
import atexit, threading, time
from safecl.exits import end_process

class Slow:
    def __del__(self):
        print("taken apart")

kept = Slow()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("last line")
end_process(3)
"""


def output_of(code: str, *arguments: str, **environ: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=environ or None
    )
    return done.returncode, done.stdout.splitlines()


def test_the_first_line_comes_before_any_large_library_is_loaded(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: m}\ntasks: [{name: a, train: t.jsonl}]\noutput: runs/a\n")
    with_config = ["check", "train", "scan", "fisher"]
    others = [
        ["eval", "model"],
        ["judge", "run", "--with", "wildguard"],
        ["merge", "linear", "--tuned", "a", "-o", "out"],
        ["rebase", "--old-base", "a", "--new-base", "b", "--tuned", "c", "-o", "out"],
        ["sweep", "run.yaml", "train.seed=0,1"],
        ["compare", "a", "b", "--live"],
        ["report", "run"],
        ["env"],
    ]
    code, lines = output_of(FIRST_LINES, json.dumps([*([verb, str(config)] for verb in with_config), *others]))
    assert code == 0
    assert lines[: len(with_config)] == [f"{verb} {config} read, loading torch []" for verb in with_config]
    assert [line.split()[0] for line in lines[len(with_config) :]] == [arguments[0] for arguments in others]
    assert all(line.endswith(" []") for line in lines)


def test_verbs_that_read_what_was_measured_need_no_torch(tmp_path):
    measured = str(write_answers(tmp_path / "measured", 1, 30))
    run = str(write_run(tmp_path / "run"))
    limit = "safety.gate.max_asr=0.9"
    verbs = [["gate", measured, limit], ["gate", measured, measured, limit], ["compare", measured, measured]]
    code, lines = output_of(
        WITHOUT_TORCH,
        json.dumps(
            [*verbs, ["report", run, run, "-o", f"{run}/both.html"], ["report", run], ["status", run], ["cache", "ls"]]
        ),
    )
    assert code == 0 and any("safety gate passed" in line for line in lines), lines


def test_a_process_ends_with_what_is_registered_and_takes_nothing_apart():
    assert output_of(LAST_LINE) == (3, ["last line", "thread", "registered"])


def test_a_verb_that_works_long_says_so_in_a_log_and_not_with_quiet(monkeypatch, capsys):
    monkeypatch.setattr(spinner, "SECONDS", 0.05)
    said = threading.Event()
    monkeypatch.setattr(spinner.stderr, "print", lambda text, **_: (print(text, file=sys.stderr), said.set()))
    with spinner.working("measuring runs/a"):
        assert said.wait(10.0)
    line = capsys.readouterr().err.splitlines()[0]
    assert re.fullmatch(r"\d\d:\d\d:\d\d still measuring runs/a, for [\d.]+ s now", line)
    with counted("answers", 40) as made, counted("rows", 7) as inner, spinner.working("measuring runs/a"):
        inner(5)
        made(10)
        said.clear()
        assert said.wait(10.0) and said.clear() is None and said.wait(10.0)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"\S+ still measuring runs/a, for [\d.]+ s now: 10 of 40 answers, about [\d.]+ s left", line)
    said.clear()
    monkeypatch.setattr(spinner.verbosity, "level", Level.QUIET)
    with spinner.working("measuring runs/a"):
        assert not said.wait(0.3)


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["train", "x.yaml", "--quiet"], ["--quiet", "train", "x.yaml"]),
        (["train", "-v", "x.yaml", "--traceback"], ["-v", "--traceback", "train", "x.yaml"]),
        (["launch", "x.yaml", "--", "--quiet"], ["launch", "x.yaml", "--", "--quiet"]),
    ],
)
def test_options_of_every_verb_may_stand_behind_it(given, parsed):
    assert options_first(given) == parsed
