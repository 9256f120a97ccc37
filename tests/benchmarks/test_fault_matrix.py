"""Every row of the fault matrix can be repeated by one command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import ROOT
from benchmarks.faults import matrix, sections
from benchmarks.faults.__main__ import MODULES, commands


def test_the_matrix_has_24_rows_whose_commands_name_sections_rows_and_tests_that_exist():
    found = commands()
    assert sorted(found) == list(range(1, 25)) and all(found.values())
    for words in [words for row in found.values() for words in row]:
        module, names = words[1], words[2:]
        if module == MODULES["section"]:
            assert set(names) <= set(sections.SECTIONS), names
        elif module == MODULES["row"]:
            assert set(names) <= set(matrix.ROWS), names
        else:
            assert module == "pytest"
            assert all((ROOT / name).exists() for name in names if name.startswith("tests/")), names


@pytest.mark.parametrize(("arguments", "code"), [(["--list"], 0), (["7", "23", "--list"], 0), (["25", "--list"], 2)])
def test_the_commands_are_listed_by_number(arguments, code):
    command = [sys.executable, "-m", "benchmarks.faults", "matrix", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    lines = done.stdout.splitlines()
    if arguments[:2] == ["7", "23"]:
        assert lines == [
            "7: python -m benchmarks.faults.sections layouts", "23: python -m benchmarks.faults.matrix retention",
        ]  # fmt: skip
    assert code == 0 or "there are 1 to 24" in done.stderr
