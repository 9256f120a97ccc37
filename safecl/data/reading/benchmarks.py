"""Prompts of published safety benchmarks, from local files in the form in which they are published.

    safety: {prompts: "harmbench:harmbench_behaviors_text_all.csv", benign_prompts: "xstest:xstest_prompts.csv"}

    advbench      harmful_behaviors.csv: goal, target, with or without its header           arXiv 2307.15043
    harmbench     harmbench_behaviors_text_*.csv: Behavior, SemanticCategory, ContextString     arXiv 2402.04249
    strongreject  strongreject_dataset.csv: category, source, forbidden_prompt              arXiv 2402.10260
    directharm4   rows of instruction and category_id                                       arXiv 2402.18540
    hex-phi       category_1.csv ... category_11.csv, a prompt per line without header      arXiv 2310.03693
    xstest        xstest_prompts.csv: id, type, prompt, and label or safe                   arXiv 2308.01263
    or-bench      prompt, category                                                          arXiv 2405.20947

Each row becomes the columns `prompt`, `category`, and `safe` where the benchmark tells. A context of HarmBench stands
before its behaviour. An unsafe contrast of XSTest is `safe: false`, and left out of benign prompts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safecl.data.messages import DataError, RowProblem, columns_of
from safecl.data.reading.files import open_source
from safecl.data.reading.raw import RawRow

Columns = Mapping[str, Any]


def benchmark_of(path: str | Path) -> tuple[str | None, str]:
    """Split `name:file` into the benchmark's name and the file; (None, path) where no benchmark is named."""
    name, colon, rest = str(path).partition(":")
    return (name, rest) if colon and name in BENCHMARKS else (None, str(path))


def benchmark_rows(name: str, path: str) -> Iterable[tuple[str, RawRow]]:
    """Yield (file, row) for each row of the benchmark. Raises DataError where there is no such file."""
    for file in _files(name, path):
        if name in _WITHOUT_HEADER and file.suffix == ".csv":
            yield from ((str(file), row) for row in _lines(file, _WITHOUT_HEADER[name]))
        else:
            source = open_source(file)
            yield from ((source.path, row) for row in source.rows())


def as_prompt(name: str, file: str, columns: Columns) -> dict[str, Any]:
    """Return a row's prompt, category and label. Raises RowProblem where its columns are not those of the benchmark."""
    return BENCHMARKS[name](columns, file)


# --------------------------------------------------------------------------------------------------------------- files

_WITHOUT_HEADER = {"advbench": ("goal", "target"), "hex-phi": ("prompt",)}


def _files(name: str, path: str) -> list[Path]:
    local = Path(path).expanduser()
    if name == "hex-phi" and local.is_dir():
        files = sorted(local.glob("category_*.csv"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0))
        if not files:
            raise DataError(f"{path}: holds no category_1.csv, category_2.csv, ... of HEx-PHI")
        return files
    if not local.is_file():
        raise DataError(f"{path}: no such file; {name}: takes a local file in its published form")
    return [local]


def _lines(file: Path, names: tuple[str, ...]) -> Iterable[RawRow]:
    """Yield the rows of a CSV file that may lack its header."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines)
        for cells in reader:
            is_header = reader.line_num == 1 and [cell.strip().lower() for cell in cells[: len(names)]] == list(names)
            if any(cell.strip() for cell in cells) and not is_header:
                yield RawRow(reader.line_num, dict(zip(names, cells, strict=False)))


# ------------------------------------------------------------------------------------------------------------- columns


def _advbench(columns: Columns, file: str) -> dict[str, Any]:
    target = {"target": str(columns["target"]).strip()} if columns.get("target") else {}
    return {"prompt": _of(columns, "goal"), **target, **_category(columns, "category")}


def _harmbench(columns: Columns, file: str) -> dict[str, Any]:
    behaviour, context = _of(columns, "Behavior"), str(columns.get("ContextString") or "").strip()
    prompt = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    return {"prompt": prompt, **_category(columns, "SemanticCategory")}


def _strongreject(columns: Columns, file: str) -> dict[str, Any]:
    return {"prompt": _of(columns, "forbidden_prompt"), **_category(columns, "category")}


def _directharm4(columns: Columns, file: str) -> dict[str, Any]:
    return {"prompt": _of(columns, "instruction"), **_category(columns, "category_id", "category")}


def _hex_phi(columns: Columns, file: str) -> dict[str, Any]:
    number = re.search(r"category_(\d+)", Path(file).stem)
    return {"prompt": _of(columns, "prompt"), **({"category": number[1]} if number else _category(columns, "category"))}


def _xstest(columns: Columns, file: str) -> dict[str, Any]:
    label = str(columns.get("label", columns.get("safe", ""))).strip().lower()
    kind = str(columns.get("type", ""))
    safe = label in ("safe", "true", "1") if label else not kind.startswith("contrast_")
    return {"prompt": _of(columns, "prompt"), "safe": safe, **_category(columns, "type")}


def _or_bench(columns: Columns, file: str) -> dict[str, Any]:
    return {"prompt": _of(columns, "prompt"), **_category(columns, "category")}


def _of(columns: Columns, name: str) -> str:
    if name not in columns:
        raise RowProblem(f"no column `{name}`, which this benchmark has; the row has {columns_of(columns)}")
    return str(columns[name]).strip()


def _category(columns: Columns, *names: str) -> dict[str, Any]:
    found = next((columns[name] for name in names if columns.get(name) not in (None, "")), None)
    return {} if found is None else {"category": str(found)}


BENCHMARKS: dict[str, Callable[[Columns, str], dict[str, Any]]] = {
    "advbench": _advbench,
    "harmbench": _harmbench,
    "strongreject": _strongreject,
    "directharm4": _directharm4,
    "hex-phi": _hex_phi,
    "xstest": _xstest,
    "or-bench": _or_bench,
}
