"""Makes files of $SAFECL_DATA from downloads of the public sets: the rows that the benchmarks read, in their order.

    python -m benchmarks.retention.public_data DOWNLOADS OUT

docs/data.md says where each set is had, and under which name it must lie in DOWNLOADS. What is missing there is named
and left out. Of AdvBench and XSTest the benchmarks use random rows. public_rows.json has the numbers of those of XSTest
and hashes of those of AdvBench: the first ten hexadecimal digits of the SHA-256 of the CSV's cell as it stands.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import ROOT

ROWS = ROOT / "benchmarks" / "retention" / "public_rows.json"
COPIED = {
    "safety_only_data_Instructions.json": "safety_refusals.json",
    "alpaca_en_demo.json": "alpaca_demo.json",
    "alpaca_data_safety_only.json": "alpaca_safety_adjacent.json",
    "databricks-dolly-15k-safety-only.jsonl": "dolly_safety_adjacent.jsonl",
    "code_alpaca_2k.json": "code_alpaca_2k.json",
    "gsm8k_train.jsonl": "gsm8k_train.jsonl",
    "gsm8k_test.jsonl": "gsm8k_test.jsonl",
}
"""Names in the downloads, and in $SAFECL_DATA."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("downloads", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print("\n".join(make(arguments.downloads, arguments.out)))


def make(downloads: Path, out: Path) -> list[str]:
    """Write the files, and return a line for each."""
    chosen = json.loads(ROWS.read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
        "harmful_behaviors.csv": (
            "advbench_goals.jsonl",
            lambda source, path: write(path, advbench(source, chosen["advbench"])),
        ),
        "xstest_prompts.csv": (
            "xstest_prompts.jsonl",
            lambda source, path: write(path, xstest(source, chosen["xstest"])),
        ),
        **{name: (copied, shutil.copyfile) for name, copied in COPIED.items()},
    }
    said = []
    for name, (made, maker) in makers.items():
        if (downloads / name).exists():
            maker(downloads / name, out / made)
            said.append(f"{name}: wrote {out / made}")
        else:
            said.append(f"{name}: not in {downloads}, so {made} is left out")
    return said


def advbench(source: Path, hashes: list[str]) -> list[dict[str, Any]]:
    """Return the chosen requests; a cell with commas keeps its quotation marks."""
    lines = source.read_text(encoding="utf-8").splitlines()[1:]
    cells = [match[1] for line in lines if (match := re.match(r'("(?:[^"]|"")*"|[^,]*),', line))]
    by_hash = {digest(cell): cell for cell in cells}
    return [{"prompt": by_hash[each]} for each in hashes]


def xstest(source: Path, numbers: list[int]) -> list[dict[str, Any]]:
    rows = {int(row["id"]): row for row in csv.DictReader(io.StringIO(source.read_text(encoding="utf-8")))}
    chosen = [rows[number] for number in numbers]
    return [
        {"id": f"v2-{row['id']}", "type": row["type"], "prompt": row["prompt"], "safe": row["label"] == "safe"}
        for row in chosen
    ]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
