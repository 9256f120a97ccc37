"""The auditor's part of a page: when, on what, and with what a run was made and measured, each as (name, value)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from safecl.report.folder import ReportedRun

Facts = list[tuple[str, str]]
_NOT_RECORDED = "not recorded by the safecl that made this run"


def sections_of(run: ReportedRun) -> list[tuple[str, Facts]]:
    """Return the facts by section; sections without any are left out."""
    facts = run.results["provenance"] or {}
    found = [
        ("What and when", _what(run, facts)),
        ("Data", list(_data(run, facts))),
        ("Poison and screening", list(_poison(run, facts))),
        ("Measured with", list(_measured_with(run, facts))),
        ("Software", [(name, str(value)) for name, value in run.versions.items()]),
    ]
    return [(title, rows) for title, rows in found if rows]


def _what(run: ReportedRun, facts: Mapping[str, Any]) -> Facts:
    results = run.results
    base, model = facts.get("base_model") or {}, facts.get("model") or {}
    seeds = facts.get("seeds") or {"train": run.section("train").get("seed")}
    rows = [
        ("finished", results["finished"] or (_NOT_RECORDED if run.kind != "unfinished" else "not yet")),
        ("folder", run.name),
        ("base model", base.get("path") or run.section("model").get("path") or results.get("model")),
        ("hash of its weights", _hash(base.get("xxh3_128"))),
        ("hash of the model's weights", _hash(model.get("xxh3_128"))),
        ("methods", run.methods_text),
        ("seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items() if seed is not None)),
    ]
    if run.kind != "evaluation":
        rows.append(("steps", f"{results['steps']:,}, {results['tokens']:,} tokens through the model"))
    for each in results.get("measurements", ()):
        digest = ((each.get("provenance") or {}).get("model") or {}).get("xxh3_128")
        parts = [each["model"], _hash(digest), each.get("finished")]
        rows.append((f"evaluation {each['when']}", ", ".join(part for part in parts if part)))
    if results["world_size"]:
        rows.append(("ranks", str(results["world_size"])))
    return [(name, str(value)) for name, value in rows if value]


def _hash(digest: str | None) -> str | None:
    return f"XXH3-128 {digest}" if digest else None


def _data(run: ReportedRun, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for task in facts.get("data") or ():
        role = " (alignment)" if task["role"] == "align" else ""
        rows = f"{task['rows']:,} rows trained on of {task['rows_in_file']:,} in the file"
        cut = f", {task['truncated']:,} of them shortened to train.max_length" if task["truncated"] else ""
        yield f"task {task['task']}{role}", f"{task['file']}, {rows}{cut}; XXH3-128 of the rows {task['xxh3_128']}"
    if not facts.get("data"):
        for task in run.settings.get("tasks") or ():
            yield f"task {task['name']}", str(task["train"])
    memory = facts.get("memory")
    if memory:
        yield "memory", f"{memory['file']}, {memory['rows']:,} rows; XXH3-128 of the rows {memory['xxh3_128']}"
    elif not facts and run.section("memory").get("source"):
        yield "memory", str(run.section("memory")["source"])


def _poison(run: ReportedRun, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if run.kind == "evaluation":
        return
    data = [task for task in facts.get("data") or () if task["poisoned"]]
    mixed = ", ".join(f"{task['poisoned']:,} rows in task {task['task']}" for task in data)
    ratio = run.section("poison").get("ratio") or 0
    yield "poison mixed in", mixed or (f"a share of {ratio:g}" if ratio else "none")
    action = facts.get("screened", run.section("scan").get("action") if run.section("scan") else None)
    yield "screen of the rows", f"scan with action {action}" if action else "none: this run did not screen its rows"
    for line in run.scans:
        yield "", line


def _measured_with(run: ReportedRun, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = facts.get("measured_with") or {}
    for prompts in found.get("prompts") or ():
        rates = "over-refusal" if prompts["set"] == "benign" else "attack success, openings, compliance, off-task"
        name = f"{prompts['set']} prompts"
        yield name, f"{prompts['file']}, n = {prompts['n']}, for {rates}; SHA-256 of the prompts {prompts['sha256']}"
    scorer = found.get("scorer") or run.section("safety").get("scorer")
    if scorer and (run.kind != "evaluation" or found.get("scorer")):
        version = run.versions.get("safecl") or run.results.get("safecl", "")
        yield "scorers", f"{scorer} for the headline; the keyword lists are those of safecl {version}"
    judges = [*(found.get("judges") or ()), *run.judged.get("judges", ())]
    for judge in judges:
        yield f"judge {judge['name']}", ", ".join(f"{key} {value}" for key, value in judge.items() if key != "name")
    if template := found.get("chat_template"):
        yield "chat template", f"{template['from']}; SHA-256 {template['sha256']}"
    if generation := found.get("generation"):
        yield "answers", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in generation.items())
