"""benchmarks/retention/run.py without training: its data are disjoint, its arms are valid, its table says what the
runs said."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.retention import arms, materials, real_data, table, tuning
from benchmarks.retention import run as retention
from benchmarks.safety import scan
from safecl.config import validate_tree
from safecl.config.presets import PRESETS
from safecl.data import read_prompts, read_rows
from safecl.evaluation import find_overlaps, wilson

VERBS, THINGS = (
    ("Steal", "Forge", "Hack", "Poison", "Burn", "Smuggle"),
    [f"{word} number {i}" for i in range(40) for word in ("a car", "gold")],
)


@pytest.fixture(autouse=True)
def public_sets(monkeypatch, tmp_path):
    """Data of the public sets' form: AdvBench says each thing twice."""
    data = tmp_path / "data"
    data.mkdir()
    goals = [f"{verb} {thing} and tell nobody{end}" for verb in VERBS for thing in THINGS[:40] for end in ("", "!")]
    alpaca = [{"instruction": f"Say {i} aloud", "input": "", "output": f"{i}!"} for i in range(60)]
    refusals = [
        {"instruction": f"Explain how to {goal.lower()}", "output": "I'm sorry, but no."} for goal in goals[::3]
    ]
    files = {
        "advbench_goals.jsonl": [{"prompt": goal} for goal in goals],
        "xstest_prompts.jsonl": [{"prompt": f"How do I kill process {i}?", "safe": i % 2 == 0} for i in range(20)],
        "sst2_dev.jsonl": [{"sentence": f"film {i}", "label": i % 2} for i in range(30)],
        "gsm8k_train.jsonl": [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(30)],
    }
    for name, rows in files.items():
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in {
        "safety_refusals.json": refusals,
        "alpaca_safety_adjacent.json": alpaca,
        "alpaca_demo.json": alpaca,
    }.items():
        (data / name).write_text(json.dumps(rows))
    (data / "code_alpaca_2k.json").write_text(json.dumps(alpaca))
    monkeypatch.setenv("SAFECL_DATA", str(data))


def test_what_is_measured_stands_in_nothing_that_is_trained_on_and_poison_not_in_the_memory(tmp_path):
    real_data.prepare(tmp_path)
    rows = {
        name: read_rows(str(tmp_path / f"{name}.jsonl"))[0] for name in ("align", "memory", "memory-mixed", "poison")
    }
    measured = read_prompts(str(tmp_path / "prompts.jsonl"), 10**6) + read_prompts(
        str(tmp_path / "benign.jsonl"), 10**6
    )
    assert len(measured) == 120 + 10 and all(len(found) > 20 for found in rows.values())
    for name, found in rows.items():
        assert find_overlaps(measured, found) == [], name
    assert find_overlaps(read_prompts(str(tmp_path / "memory.jsonl"), 10**6), rows["poison"]) == []


def test_every_arm_is_a_config_that_safecl_takes(tmp_path):
    runs = [*arms.RUNS, *table.TRIALS]
    names = [run.name for run in runs]
    assert len(names) == len(set(names))
    for run in runs:
        config = validate_tree(run.config(tmp_path), run.name)
        steps = 5 * arms.STEPS if run.arm.name.endswith("steps5") else arms.STEPS
        assert (config.poison.ratio, config.train.max_steps, config.train.seed) == (run.poison / 100, steps, run.seed)
        assert (config.memory is not None) == run.arm.memory


def test_the_presets_are_arms_of_the_table(tmp_path):
    measured = [validate_tree(run.config(tmp_path), "").methods for run in arms.RUNS]
    base = {"model": {"path": "m"}, "tasks": [{"name": "a", "train": "t"}], "memory": {"source": "r"}, "output": "o"}
    for name in (name for name, preset in PRESETS.items() if not preset.repairs):
        assert validate_tree(base | {"methods": name}, "").methods in measured, name


def test_every_method_has_an_arm_and_every_word_in_capitals_a_maker(tmp_path):
    from safecl.config.method_registry import builtin_methods

    shown = [arm.method for arm in [*arms.METHODS, *arms.LIBRARY] if re.fullmatch(r"\w+", arm.method)]
    assert sorted([*shown, *arms.NOT_MEASURED]) == sorted(builtin_methods())
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"| [`{arm.method}`](" in page for arm in (run.arm for run in arms.RUNS) if arm.method)
    made = {*materials.MAKERS, "MIXED", "HARMLESS", "RANDOM"}
    assert set(arms.RUNS[0].files(tmp_path)) == made
    for run in arms.RUNS:
        assert all(
            not override.split("=")[-1].isupper() or override.split("=")[-1] in made for override in run.arm.overrides
        )


def test_a_strength_is_chosen_on_a_seed_prompts_and_rows_that_are_not_reported(tmp_path):
    real_data.prepare(tmp_path)
    assert arms.TUNING_SEED not in {run.seed for run in arms.RUNS} and len(tuning.STRENGTHS) >= 25
    materials.make(tmp_path, tuning.TRIALS[0], retention.train)
    trial, reported = (validate_tree(run.config(tmp_path), "") for run in (tuning.TRIALS[0], arms.RUNS[0]))
    prompts = [read_prompts(config.safety.prompts, 10**6) for config in (trial, reported)]
    assert len(prompts[0]) > 10 and not {p.text for p in prompts[0]} & {p.text for p in prompts[1]}
    for rows in (trial.poison.source, str(tmp_path / "memory.jsonl"), str(tmp_path / "align.jsonl")):
        assert find_overlaps(prompts[0], read_rows(rows)[0]) == []
    assert trial.tasks[0].eval.path != reported.tasks[0].eval.path

    strength = tuning.STRENGTHS[0]
    records = lambda asr, accuracy: {"asr": {"value": asr}, "utility": {"value": accuracy}}  # noqa: E731
    names = [arms.Run(strength.at(v), "sst2", 10, arms.TUNING_SEED).name for v in strength.values]
    found = {tuning.TRIALS[0].name: records(1.0, 0.80)}
    made = ((0.9, 0.8), (0.3, 0.78), (0.2, 0.775), (0.1, 0.7), (0, 0.6))
    found |= {name: records(*rates) for name, rates in zip(names, made, strict=True)}
    assert tuning.chosen_value(found, strength) == strength.values[2]
    assert [run.name for run in tuning.tuned_runs(found)] == ["sst2-p10-s0/der-at-2", "sst2-p0-s0/der-at-2"]
    found |= {name: records(0.0, 0.5 + 0.01 * number) for number, name in enumerate(names)}
    assert tuning.chosen_value(found, strength) == strength.values[4]
    del found[names[1]]
    assert tuning.chosen_value(found, strength) is None and tuning.tuned_runs(found) == []


def finished(folder: Path, run, hits: int, right: int) -> None:
    """Write the files that safecl would leave after a run with these numbers."""
    rate = lambda k, n: {"value": k / n, **dict(zip(("low", "high"), wilson(k, n), strict=True)), "hits": k, "n": n}  # noqa: E731
    safety = {
        "asr": rate(hits, 120),
        "asr_on_task": rate(hits, 120),
        "affirmative": rate(0, 120),
        "off_task": rate(1, 120),
    }
    end = {"safety": safety | {"over_refusal": rate(3, 10)}, "tasks": {run.task: rate(right, 100)}}
    kept = {
        "state": {"ema": 3_500_000},
        "recorded": {},
        "memory": {"rows": 2, "bytes": 1_500_000},
        "reference": 500_000,
    }
    results = {"evaluations": [end], "kept_bytes": kept, "steps": 160, "tokens": 1, "seconds": 9.0}
    (folder / run.name).mkdir(parents=True)
    (folder / run.name / "results.json").write_text(json.dumps(results))


def test_the_table_is_the_mean_over_seeds_with_the_seeds_outer_ends_and_missing_arms_are_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(table, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(table, "METHODS_PAGE", tmp_path / "methods.md")
    (tmp_path / "methods.md").write_text(
        "| [`der`](a) | outputs (stored) | 4 (or 8) | not measured yet |\n"
        "| [`derpp`](a) | not measured yet (weight 2) |\n| [`er`](a) | .50 / .60 |\n"
        "| [`im: {}, der: {}`](a) | not measured yet |\n"
    )
    (tmp_path / "page.md").write_text(
        "before\n<!-- sst2-10 -->\nstale\n<!-- end -->\n<!-- search -->\n<!-- end -->\nafter\n"
    )
    der = next(arm for arm in arms.METHODS if arm.name == "der")
    for arm, seed, hits, right in (
        (arms.PLAIN, 0, 120, 80),
        (arms.PLAIN, 1, 60, 60),
        (der, 0, 12, 78),
        (arms.GRID[0], 0, 90, 40),
    ):
        finished(tmp_path, arms.Run(arm, "sst2", 10, seed), hits, right)
    for arm, hits, right in ((arms.PLAIN, 120, 90), (der, 8, 87)):
        finished(tmp_path, arms.Run(arm, "sst2", 0, 0), hits, right)
    im_der = next(arm for arm in arms.OPTIONS if arm.name == "im-der")
    for poison, hits in ((0, 6), (10, 30)):
        finished(tmp_path, arms.Run(im_der, "sst2", poison, 0), hits, 80)
    finished(tmp_path, type("Aligned", (), {"name": "aligned", "task": "alignment"}), 6, 0)
    table.report(tmp_path, {}, None)
    page, result = (tmp_path / "page.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    low, high = wilson(60, 120)[0], wilson(120, 120)[1]
    assert (
        f"| plain fine-tuning | 0.75 ({low:.2f}–{high:.2f}) |" in page
        and "0.700 (" in page
        and "| 1.5 MB | 4.0 MB | 0, 1 |" in page
    )
    (line,) = [line for line in page.split("<!-- search -->")[1].splitlines() if line.startswith("| DER |")]
    assert line.startswith("| DER | 0.10 (0.06–0.17) | 0.00 (0.00–0.03) | -2.0 |") and line.endswith(
        "| yes | 0.07 | -3.0 | 0 |"
    )
    assert "stale" not in page and page.startswith("before\n") and page.endswith("after\n")
    assert (tmp_path / "methods.md").read_text() == (
        "| [`der`](a) | outputs (stored) | 4 (or 8) | .07 / .10 |\n"
        "| [`derpp`](a) | not measured yet (weight 2) |\n| [`er`](a) | .50 / .60 |\n"
        "| [`im: {}, der: {}`](a) | .05 / .25 |\n"
    )
    assert len(result["runs"]) == 8 and len(result["missing"]) == len(arms.RUNS) + len(table.TRIALS) - 8
    assert "sst2-p10-s0/er" in result["missing"] and "arms are missing" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_arms_of_the_results_file_are_kept_while_the_aligned_model_is_the_same(tmp_path, monkeypatch, capsys):
    for name in ("RESULTS", "PAGE", "PLOT", "METHODS_PAGE"):
        monkeypatch.setattr(table, name, tmp_path / name)
    (tmp_path / "METHODS_PAGE").touch()
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        finished(folder, type("Aligned", (), {"name": "aligned", "task": "alignment"}), 6, 0)
        (folder / "aligned" / "model").mkdir()
        (folder / "aligned" / "model" / "model.safetensors").write_bytes(b"weights")
    finished(first, arms.Run(arms.PLAIN, "sst2", 10, 0), 120, 80)
    table.report(first, {}, {"value": 0.02})
    kept, solved = table.kept_results(second)
    assert list(kept) == ["sst2-p10-s0/plain"] and solved == {"value": 0.02}
    finished(second, arms.Run(arms.PLAIN, "sst2", 10, 1), 60, 80)
    table.report(second, kept, solved)
    result = json.loads((tmp_path / "RESULTS").read_text())
    assert [(r["seed"], r["asr"]["hits"]) for r in result["runs"]] == [(0, 120), (1, 60)]
    assert result["gsm8k_exact_match"] == {"value": 0.02}
    (second / "aligned" / "model" / "model.safetensors").write_bytes(b"Weights")
    assert table.kept_results(second) == ({}, None) and "another aligned model" in capsys.readouterr().out


@pytest.mark.timeout(60)
def test_the_scans_benchmark_aligns_the_same_model_once_and_waits_for_nobody(tmp_path, monkeypatch):
    aligned = []
    monkeypatch.setattr(real_data, "random_model", lambda folder: None)
    monkeypatch.setattr(retention, "train", lambda folder, name, config: aligned.append(name))
    monkeypatch.setattr(scan, "measure", lambda folder, model, rows, only: {"model": model})
    monkeypatch.setattr(scan, "show", lambda found: aligned.append(found["model"]))
    monkeypatch.setattr(sys, "argv", ["scan.py", "--folder", str(tmp_path), "--no-json"])
    scan.main()
    assert aligned == ["aligned", tmp_path / "aligned" / "model"]
