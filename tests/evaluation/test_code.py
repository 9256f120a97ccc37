"""pass@1: HumanEval-style problems, and programs that run where they can only compute."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from safecl.config import ConfigError, EvalConfig
from safecl.data import DataError, prompt_ids
from safecl.evaluation import evaluate_task
from safecl.evaluation.answers.texts import messages_of
from safecl.evaluation.code import confined, sandbox
from safecl.evaluation.code.problems import program_of, read_problems
from safecl.evaluation.code.sandbox import PASSED, RunLimits, check_sandbox, run_program
from tests.evaluation.models import ScriptedModel, byte_tokenizer

PROBLEM = {
    "task_id": "toy/0",
    "prompt": 'import math\n\n\ndef area(r):\n    """Return the area of a circle."""\n',
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert abs(candidate(2) - 12.566) < 0.01\n",
}
LIMITS = RunLimits(seconds=1, memory=256)


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import math, re, json, random, threading\nassert math.sqrt(9) == 3", PASSED),
        ("t = __import__('threading').Thread(target=print)\nt.start()\nt.join()", PASSED),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "killed"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
        ("x = bytearray(2**30)", "MemoryError"),
        ("while True:\n    pass", "time"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import socket\nsocket.socketpair()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os\nos.fork()", "PermissionError"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))", "ValueError"),
        ("import os\nassert 'HOME' not in os.environ and 'SECRET' not in os.environ", PASSED),
    ],
)
def test_a_program_can_compute_and_nothing_else(monkeypatch, program, outcome):
    monkeypatch.setenv("SECRET", "token")
    assert run_program(program, LIMITS) == outcome


CHANGES = [
    "open({0!r}, 'w')",
    "open({0!r}, 'a')",
    "os.unlink({0!r})",
    "os.rename({0!r}, {1!r})",
    "os.mkdir({1!r})",
    "os.truncate({0!r}, 0)",
    "os.chmod({0!r}, 0)",
    "os.symlink({0!r}, {1!r})",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_changes_no_file(tmp_path, change):
    there = tmp_path / "there"
    there.write_text("kept")
    program = "import os\n" + change.format(str(there), str(tmp_path / "new"))
    assert run_program(program, LIMITS) == "PermissionError"
    assert there.read_text() == "kept" and [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_program_that_waits_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(RunLimits, "by_the_clock", property(lambda limits: 0.5))
    assert run_program("import time\ntime.sleep(60)", LIMITS) == "time"


def test_nothing_is_run_where_a_limit_does_not_hold(monkeypatch, tmp_path):
    check_sandbox.cache_clear()
    monkeypatch.setattr(sandbox, "TRIALS", {"write a file": "1/0"})
    with pytest.raises(
        ConfigError, match=r"a program could write a file here \(ZeroDivisionError\); use another metric"
    ):
        check_sandbox()
    script = tmp_path / "confined.py"
    script.write_text('import os, sys\nos.write(int(sys.argv[1]), b\'{"refused": "no filter of calls"}\')\n')
    monkeypatch.setattr(sandbox, "CONFINED", script)
    with pytest.raises(ConfigError, match="programs cannot be confined here: no filter of calls"):
        check_sandbox()


# --------------------------------------------------------------------------------------------------------------- filter


def decided(machine: str, number: int, arguments: tuple[int, ...] = (), *, architecture: int | None = None) -> int:
    """Run the filter as the kernel would, on one call of a process with the id 77."""
    words = {0: number, 4: confined.ARCHITECTURES[machine][1] if architecture is None else architecture}
    for place, value in enumerate(arguments):
        words[16 + 8 * place], words[20 + 8 * place] = value & 0xFFFFFFFF, value >> 32
    program, at, accumulator = confined.filter_of(machine, 77), 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == confined.RETURN:
            return value
        if code == confined.LOAD:
            accumulator = words.get(value, 0)
        else:
            holds = accumulator == value if code == confined.EQUAL else bool(accumulator & value)
            at += if_true if holds else if_false


ALLOW, REFUSE = confined.ALLOW, confined.FAIL


@pytest.mark.parametrize(
    ("machine", "openat", "clone", "prlimit", "ioctl", "tgkill", "socket", "execve", "unlinkat"),
    [("x86_64", 257, 56, 302, 16, 234, 41, 59, 263), ("aarch64", 56, 220, 261, 29, 131, 198, 221, 35)],
)
def test_the_filter_decides_alike_on_both_architectures(
    machine, openat, clone, prlimit, ioctl, tgkill, socket, execve, unlinkat
):
    assert decided(machine, openat, (0, 0, 0o2000000)) == ALLOW  # O_RDONLY | O_CLOEXEC
    for flags in (1, 2, 0o100, 0o1000, 0o20000000):
        assert decided(machine, openat, (0, 0, flags)) == REFUSE | 13
    assert decided(machine, clone, (0x3D0F00,)) == ALLOW and decided(machine, clone, (17,)) == REFUSE | 1
    assert decided(machine, 435) == REFUSE | 38
    assert decided(machine, prlimit, (0, 7, 0)) == ALLOW
    assert decided(machine, prlimit, (0, 7, 5)) == decided(machine, prlimit, (0, 7, 1 << 32)) == REFUSE | 1
    assert decided(machine, ioctl, (0, 0x5401)) == ALLOW and decided(machine, ioctl, (0, 0x5412)) == REFUSE | 25
    assert decided(machine, tgkill, (77,)) == ALLOW and decided(machine, tgkill, (78,)) == REFUSE | 1
    for number in (socket, execve, unlinkat, 425, 0x40000000):
        assert decided(machine, number) == REFUSE | 1
    assert decided(machine, openat, architecture=0x40000003) == confined.KILL  # calls of 32-bit programs


# ------------------------------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize(
    "answer",
    [
        "    return math.pi * r * r\n",
        "return math.pi * r ** 2",
        "    return math.pi * r * r\n\nprint(area(3))\n\nThis is the area.",
        "Here it is:\n\n```python\ndef area(r):\n    return math.pi * r * r\n```\nThis works for all numbers.",
        "```\nimport math\ndef area(r):\n    return math.pi * r * r\n",
        PROBLEM["prompt"] + PROBLEM["canonical_solution"],
    ],
)
def test_code_is_taken_out_of_answers_of_all_forms(answer):
    assert run_program(program_of(answer, PROBLEM), LIMITS) == PASSED


def test_problems_are_read_in_their_published_form_and_others_are_refused_by_line(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(PROBLEM) + "\n" + json.dumps(PROBLEM | {"task_id": "toy/1"}) + "\n")
    settings = EvalConfig(path=str(path), metric="pass@1", run_code=True)
    rows = read_problems(settings)
    assert [row.tags["task_id"] for row in rows] == ["toy/0", "toy/1"] and PROBLEM["prompt"].strip() in rows[
        0
    ].messages[0].content
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "def f():", "completion": "x"}) + "\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1: a problem for pass@1 .* lacks entry_point, test"):
        read_problems(settings.model_copy(update={"path": str(bad)}))


def test_running_code_must_be_asked_for():
    with pytest.raises(ValidationError, match="runs programs that the model writes; set run_code: true"):
        EvalConfig(path="p", metric="pass@1")


def test_pass_at_1_is_the_share_of_problems_whose_tests_pass(tmp_path):
    tokenizer, end = byte_tokenizer(), "<end>"
    path = tmp_path / "problems.jsonl"
    second = PROBLEM | {"task_id": "toy/1", "prompt": "def twice(x):\n", "entry_point": "twice", "test": TWICE}
    path.write_text(json.dumps(PROBLEM) + "\n" + json.dumps(second) + "\n")
    settings = EvalConfig(path=str(path), metric="pass@1", run_code=True, run_seconds=5)
    rows = read_problems(settings)
    script = {
        tuple(prompt_ids(tokenizer, messages_of(row))): tokenizer(f"{answer}{end}", add_special_tokens=False)[
            "input_ids"
        ]
        for row, answer in zip(rows, ("return math.pi * r * r", "return x + 2"), strict=True)
    }
    found = evaluate_task(ScriptedModel(script, len(tokenizer)), tokenizer, settings, rows)
    assert (found.value.hits, found.value.n) == (1, 2)
    assert [record["outcome"] for record in found.outputs] == ["passed", "AssertionError"]
    assert found.outputs[0]["tags"] == {"task_id": "toy/0"} and list(found.details) == ["truncated"]


TWICE = "def check(candidate):\n    assert candidate(5) == 10\n"


def test_the_confined_process_imports_the_standard_library_alone():
    text = Path(confined.__file__).read_text()
    assert "import safecl" not in text and "from safecl" not in text
