"""Puts the results of the GPU suite into the documentation.

    python launch/pages.py runs/gpu-suite      # keeps suite.json in benchmarks/results, and renews docs/gpu.md
    python launch/pages.py                     # renews docs/gpu.md from what is kept

A dry run is refused: its figures are those of toy sizes on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpu_suite import Result, table

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "gpu-suite.json"
PAGE = ROOT / "docs" / "gpu.md"
NOTHING = "Not measured yet."


def keep(folder: Path, kept: Path = KEPT) -> None:
    """Keep the results of a suite's folder, with the facts of its machine. Raises SystemExit for a dry run."""
    suite = json.loads((folder / "suite.json").read_text())
    if suite["dry"]:
        raise SystemExit(f"{folder}: a dry run; its figures say nothing about a GPU")
    suite["machine"] = json.loads((folder / "environment.json").read_text())
    for section in suite["sections"]:
        section["command"] = section["command"].replace(str(folder.absolute()), "runs/gpu-suite")
    kept.write_text(json.dumps(suite, indent=2) + "\n")


def text(kept: Path = KEPT) -> str:
    """Return the page's part: the machine and the table, or that nothing is measured."""
    if not kept.is_file():
        return NOTHING
    suite = json.loads(kept.read_text())
    machine = suite["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    facts = f"{gpus}; torch {machine['torch']}, triton {machine['triton']}, deepspeed {machine['deepspeed']}."
    return f"{facts}\n\n{table([Result(**one) for one in suite['sections']])}".rstrip()


def main() -> None:
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from harness import renew_page

    renew_page(PAGE, {"gpu": text()})


if __name__ == "__main__":
    main()
