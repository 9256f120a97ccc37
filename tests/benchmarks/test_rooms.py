"""The rooms of benchmarks/: every benchmark that a text names is there and is started in the one form that works."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import ROOT

FOLDERS = ("benchmarks", "docs", "launch", "safecl", "tests")
SUFFIXES = (".json", ".md", ".py", ".sh", ".toml", ".yaml", ".yml")
BY_PATH = re.compile(r"\bpython3? benchmarks/")
PLACE = re.compile(r"\bbenchmarks/[\w/-]+\.(?:py|json)\b")
MODULE = re.compile(r"-m[ \",]+(benchmarks(?:\.\w+)+)")


def texts() -> Iterator[tuple[Path, str]]:
    """(path, text) of everything that may name a benchmark."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    for path in [*files, *ROOT.glob("*"), *ROOT.glob(".github/workflows/*"), ROOT / ".ci" / "run"]:
        if path.is_file() and (path.suffix in SUFFIXES or path.name in ("Makefile", "run")):
            yield path, path.read_text(encoding="utf-8")


def unknown(text: str) -> list[str]:
    """Return the benchmarks and results in a text that are not there, and commands in another form than `-m`."""
    missing = [place for place in PLACE.findall(text) if not (ROOT / place).is_file()]
    missing += [name for name in MODULE.findall(text) if not _is_module(name)]
    return missing + BY_PATH.findall(text)


def _is_module(name: str) -> bool:
    place = ROOT / name.replace(".", "/")
    return place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()


def test_every_benchmark_that_a_text_names_is_there_and_is_started_as_a_module():
    found = {str(path.relative_to(ROOT)): names for path, text in texts() if (names := unknown(text))}
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "python -m " + "benchmarks.kernels.nothing",
        '[sys.executable, "-m", "' + 'benchmarks.nothing"]',
        "see benchmarks" + "/flat.py",
        "python benchmarks" + "/kernels/flat.py",
        "benchmarks" + "/results/nothing.json",
    ],
)
def test_a_benchmark_that_is_not_there_or_is_started_by_its_path_is_found(text):
    assert unknown(text)


def test_no_benchmark_computes_paths_of_its_own_or_changes_where_python_looks():
    """`ROOT` says where the repository is, and `-m` puts it on the path."""
    files = set((ROOT / "benchmarks").rglob("*.py")) - {ROOT / "benchmarks" / "__init__.py"}
    assert len(files) > 40
    assert not [path for path in files if re.search(r"\b__file__\b|\bsys\.path\b", path.read_text())]


def test_every_folder_of_benchmarks_is_a_room_of_the_map():
    page = (ROOT / "docs" / "architecture.md").read_text().split("## The benchmarks\n")[1]
    rooms = {path.parent.name for path in (ROOT / "benchmarks").glob("*/*.py")}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == rooms
    assert all(importlib.util.find_spec(f"benchmarks.{room}").origin for room in rooms), "a room has an __init__.py"
