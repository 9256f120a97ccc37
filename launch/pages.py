"""Puts the results of the GPU suite into the documentation.

    python launch/pages.py runs/gpu-suite      # keeps what was measured in benchmarks/results, and renews docs/gpu.md
    python launch/pages.py                     # renews docs/gpu.md from what is kept

A section that has run replaces what is kept of it; the others stay, each with its commit. A dry run is refused: its
figures are those of toy sizes on a CPU. `benchmarks/kernels/flat_table.py` and `benchmarks/planning/scaling.py` renew
the other pages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu_suite import SECTIONS, Result, table

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "gpu-suite.json"
PAGE = ROOT / "docs" / "gpu.md"
NOTHING = "Not measured yet."
DETAILS = {
    "head": ("head.json", "head-cuda.json"),
    "flat": ("flat.json", "flat-cuda.json"),
    "7b-step": ("step.json", "engine-step-7b-cuda.json"),
    "reference-offload": ("offload.json", "reference-cuda.json"),
    "teacher": ("teacher.json", "teacher-cuda.json"),
}
"""The file of a section in the suite's folder, and its name beside the kept results."""


def keep(folder: Path, kept: Path = KEPT) -> None:
    """Keep the results of a suite's folder, with the facts of its machine. Raises SystemExit for a dry run."""
    suite = json.loads((folder / "suite.json").read_text())
    if suite["dry"]:
        raise SystemExit(f"{folder}: a dry run; its figures say nothing about a GPU")
    suite["machine"] = json.loads((folder / "environment.json").read_text())
    for section in suite["sections"]:
        section["command"] = section["command"].replace(str(folder.absolute()), "runs/gpu-suite")
        if section["section"] in DETAILS:
            _copy_details(folder, kept.parent, *DETAILS[section["section"]])
    earlier = json.loads(kept.read_text())["sections"] if kept.is_file() else []
    suite["sections"] = merged(earlier, suite["sections"])
    kept.write_text(json.dumps(suite, indent=2) + "\n")


def _copy_details(folder: Path, results: Path, file: str, name: str) -> None:
    if (folder / file).is_file():
        (results / name).write_text((folder / file).read_text())


def merged(earlier: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sections in the suite's order, each from the later results that have it."""
    by_name = {one["section"]: one for one in [*earlier, *new]}
    return [by_name[section.name] for section in SECTIONS if section.name in by_name]


def text(kept: Path = KEPT) -> str:
    """Return the page's part: the machine, the commits and the table, or that nothing is measured."""
    if not kept.is_file():
        return NOTHING
    suite = json.loads(kept.read_text())
    machine, results = suite["machine"], [Result(**one) for one in suite["sections"]]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"])
    facts = f"{gpus}; torch {machine['torch']}, triton {machine['triton']}, deepspeed {machine['deepspeed']}."
    return "\n\n".join([facts, *_commits(results), table(results)]).rstrip()


def _commits(results: list[Result]) -> list[str]:
    """Say which sections were measured when, and at which commit, where that is known."""
    sections: dict[str, list[str]] = {}
    for result in results:
        if result.date:
            when = result.date[:10] + (f", commit {result.commit}" if result.commit else "")
            sections.setdefault(when, []).append(result.section)
    return ["; ".join(f"{when}: {', '.join(names)}" for when, names in sections.items()) + "."] if sections else []


def main() -> None:
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    sys.path.insert(0, str(ROOT))
    from benchmarks.harness import renew_page

    renew_page(PAGE, {"gpu": text()})


if __name__ == "__main__":
    main()
