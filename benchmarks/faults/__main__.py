"""The fault matrix of docs/reliability.md: runs the commands of its rows, by their numbers.

    python -m benchmarks.faults matrix            # all 24 rows, one after the other; many hours
    python -m benchmarks.faults matrix 7 12       # only these
    python -m benchmarks.faults matrix --list     # print the commands, and run nothing

Exits with code 1 if a command did.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys

from benchmarks import ROOT

PAGE = ROOT / "docs" / "reliability.md"
MODULES = {"section": "benchmarks.faults.sections", "row": "benchmarks.faults.matrix"}


def commands() -> dict[int, list[list[str]]]:
    """Return the commands of each row of the page's table, without the interpreter."""
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {int(number): _commands_of(cell) for number, cell in rows}


def _commands_of(cell: str) -> list[list[str]]:
    found = []
    for part in cell.split("; "):
        kind, names = part.split(" ")[0].rstrip("s"), re.findall("`([^`]+)`", part)
        if kind in MODULES:
            found.append(["-m", MODULES[kind], *names])
        else:
            found += [["-m", *shlex.split(name)] for name in names]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("matrix", choices=["matrix"], help="the fault matrix")
    parser.add_argument("rows", nargs="*", type=int, metavar="NUMBER", help="rows of the matrix; all by default")
    parser.add_argument("--list", action="store_true", help="print the commands")
    options = parser.parse_args()
    known, bad = commands(), False
    if unknown := [number for number in options.rows if number not in known]:
        parser.error(f"no row {unknown[0]}; there are 1 to {max(known)}")
    for number in options.rows or known:
        for words in known[number]:
            print(f"{number}: python {shlex.join(words)}", flush=True)
            bad |= not options.list and subprocess.run([sys.executable, *words], cwd=ROOT).returncode != 0
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
