"""Write the measured tables of the flat kernels into docs/kernels.md, from the JSON in benchmarks/results/.

python -m benchmarks.kernels.flat_table
"""

from __future__ import annotations

import json
import re

from benchmarks import ROOT

PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"


def flat_tables(report: dict) -> str:
    """Return one table per case, then the ratios that must hold."""
    on_gpu = "gpu" in report["machine"]
    more = (
        f"triton {report['machine']['triton']}"
        if on_gpu
        else f"{report['threads']} threads, {report['instruction_set']}"
    )
    parts = [where(report["machine"], more)]
    for case in report["cases"].values():
        parts += [f"{case['title']}; {case['numel'] / 1e6:.0f} M elements, {case['kept']} rounds:"]
        rows = [
            f"| {name} | {row['ms']:.{1 + on_gpu}f} | {row['gb_per_s']:.{1 - on_gpu}f} | {row['of_copy']:.2f} | "
            f"{error(row['error'])} |"
            for name, row in case["rows"].items()
        ]
        parts += ["\n".join(["| | ms | GB/s | of copy | error |", "|---|---|---|---|---|", *rows])]
    rows = [
        f"| {case_of(r)} | {r['rival']} | {r['ratio']:.2f}x | {r['at_least']:.2f}x | {yes(r['met'])} |"
        for r in report["ratios"]
    ]
    return "\n\n".join(
        [*parts, "\n".join(["| case | rival | speed | at least | met |", "|---|---|---|---|---|", *rows])]
    )


def case_of(ratio: dict) -> str:
    """Return the name of a ratio's case, with the contender where it is not the first."""
    contender = ratio.get("contender", "fused")
    return ratio["case"] if contender == "fused" else f"{ratio['case']}, {contender}"


def engine_table(report: dict) -> str:
    s, errors = report["setting"], report["errors"]
    size = f"{s['parameters'] / 1e6:.0f} M parameters, {s['tokens']} tokens, {s['threads']} threads"
    what = f"{size}, {len(report['rounds'])} rounds"
    rows = [
        f"| {name} | {row['plain ms']:.0f} | {row['safecl ms']:.0f} | {row['ratio']:.2f}x | "
        f"{row['at_most']:.2f}x | {yes(row['met'])} |"
        for name, row in report["summary"].items()
    ]
    table = "\n".join(["| | plain, ms | EWC + EMA, ms | ratio | at most | met |", "|---|---|---|---|---|---|", *rows])
    first_step = (
        f"Errors of the first step: weights {errors['weights']:.0e} (against the other engine), "
        f"EMA {errors['ema']:.0e} (against fp64)."
    )
    return "\n\n".join([where(report["machine"], what), table, first_step])


def where(machine: dict, more: str) -> str:
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    commit = f", commit {machine['commit']}" if "commit" in machine else ""
    return f"{device}, torch {machine['torch']}, {more}; {machine['date']}{commit}."


def yes(met: bool) -> str:
    return "yes" if met else "**no**"


def error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


TABLES = {"flat-cpu": flat_tables, "flat-cuda": flat_tables, "engine-step-cpu": engine_table}


def filled(page: str) -> str:
    """Return the page with every table between its two marks renewed."""
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            text = table(json.loads(path.read_text()))
            page = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=text: f"{m[1]}\n{t}\n\n{m[2]}", page, flags=re.S
            )
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
    print(f"wrote {PAGE}")
