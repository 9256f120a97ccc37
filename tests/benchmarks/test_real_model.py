"""benchmarks/real_model/run.py without training: its parts are disjoint, its arms are valid, its tables say what was
measured."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from benchmarks.real_model import arms, data, readings, table
from benchmarks.real_model import judge as judging
from benchmarks.real_model import run as real_model
from safecl.config import EvalConfig, validate_tree
from safecl.config.presets import PRESETS
from safecl.data import read_prompts, read_rows
from safecl.evaluation import find_overlaps, wilson


@pytest.fixture(autouse=True)
def public_sets(monkeypatch, tmp_path):
    """Data of the public sets' form."""
    folder = tmp_path / "data"
    folder.mkdir()
    word = lambda: "".join(random.Random(next(numbers)).choices("abcdefghij", k=6))  # noqa: E731
    numbers = itertools.count()
    goals = [" ".join(word() for _ in range(7)) for _ in range(300)]  # no two of them overlap
    alpaca = [{"instruction": f"Say {i} aloud", "input": "", "output": f"{i}!"} for i in range(60)]
    refusals = [{"instruction": " ".join(word() for _ in range(7)), "output": "I'm sorry, but no."} for _ in range(40)]
    safe = [{"prompt": f"How do I kill process {i}?", "safe": True, "type": f"type {i % 3}"} for i in range(40)]
    for name, rows in {"advbench_goals": [{"prompt": goal} for goal in goals], "xstest_prompts": safe}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in {
        "safety_refusals": refusals, "alpaca_safety_adjacent": alpaca, "alpaca_demo": alpaca, "code_alpaca_2k": alpaca
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(rows))
    monkeypatch.setenv("SAFECL_DATA", str(folder))


def test_what_chooses_is_not_what_is_reported_and_neither_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data, "own_answers", lambda model, texts, length: [("It is harmless. Really", False)] * len(texts)
    )
    data.prepare(tmp_path)
    align = read_rows(str(data.alignment_rows(tmp_path, tmp_path)))[0]
    memory = [read_prompts(str(path), 10**6) for path in data.memory_prompts(tmp_path)]
    parts = {name: read_prompts(str(tmp_path / name), 10**6) for name in data.MEASURED}
    attacker = read_rows(str(tmp_path / "attacker.jsonl"))[0]
    assert [len(found) for found in parts.values()] == [100, 15, 60, 10] and len(attacker) > 20
    for name, prompts in parts.items():
        others = {p.text for other, found in parts.items() if other != name for p in found}
        assert not others & {p.text for p in prompts}, name
        assert find_overlaps(prompts, align + attacker) == [], name
        assert not {p.text for p in prompts} & {p.text for found in memory for p in found}, name
    assert find_overlaps([p for found in memory for p in found], attacker) == []
    assert {row.messages[-1].content for row in align} >= {"It is harmless."}  # a cut answer ends with its sentence


def test_every_arm_is_a_config_that_safecl_takes_and_every_preset_is_an_arm(tmp_path):
    names = [run.name for run in arms.RUNS]
    assert len(names) == len(set(names))
    configs = {run: validate_tree(run.config(tmp_path), run.name) for run in arms.RUNS}
    for run, config in configs.items():
        assert (config.poison.ratio, config.train.seed, config.memory is not None) == (
            run.poison / 100, run.seed, run.arm.memory
        )  # fmt: skip
        assert ("tuning" in config.safety.prompts) is (run.seed == arms.TUNING or run.arm is arms.STEERED)
        assert (config.tasks[0].name, config.tasks[0].max_rows) == (run.task.name, arms.NUM_ROWS)
        assert EvalConfig.model_validate(run.task.test(tmp_path, run.seed)).metric == run.task.metric
    for name, preset in ((name, preset) for name, preset in PRESETS.items() if not preset.repairs):
        (reported,) = [
            run
            for run in arms.RUNS
            if (run.arm.name, run.poison, run.seed, run.task) == (name, 10, arms.REPORTED, arms.SST2)
        ]
        assert configs[reported].methods.keys() == preset.methods.keys()
        assert configs[reported].train.loss_mean == preset.sections.get("train", {}).get("loss_mean", "tokens")


def test_the_tables_show_what_was_measured_and_the_file_names_what_is_missing(tmp_path, capsys):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(
        "before\n<!-- real -->\nold\n<!-- end -->\nbetween\n<!-- real-tuning -->\nold\n<!-- end -->\nafter\n"
    )
    table.report(tmp_path, page=page, results=results)
    assert (
        page.read_text().count("Not measured yet: `python -m benchmarks.real_model.run`.") == 2
        and "old" not in page.read_text()
    )
    rate = lambda k, n: {"value": k / n, **dict(zip(("low", "high"), wilson(k, n), strict=True)), "hits": k, "n": n}  # noqa: E731
    safety = {name: rate(3, 100) for name in table.RATES} | {"over_refusal": rate(20, 63)}
    found = {"evaluations": [{"safety": safety, "tasks": {"sst2": rate(170, 200) | {"metric": "label_accuracy"}}}]}
    run = arms.RUNS[0]
    for folder in (tmp_path / run.name / "measured", tmp_path / f"aligned-s{arms.REPORTED}"):
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(found))
    (tmp_path / run.name / "cpu-seconds.json").write_text('{"cpu_seconds": 200.4, "peak_bytes": 4900000000}')
    cost = {"memory_bytes": 3_000_000, "recorded_bytes": 200_000}
    kept = {"state": {"ema": 538_000_000}, "reference": 269_000_000}
    (tmp_path / run.name / "results.json").write_text(json.dumps({"cost": cost, "kept_bytes": kept}))
    (tmp_path / run.name / "distance.json").write_text('{"kl": {"value": 0.5}, "chat_perplexity": {"value": 12.34}}')
    table.report(tmp_path, page=page, results=results)
    said = json.loads(results.read_text())
    assert said["missing"] == [other.name for other in arms.RUNS[1:]] and "are missing" in capsys.readouterr().out
    assert (
        "| preset `strict` | 10 % | 0.03 (0.01–0.08) | 0.03 (0.01–0.08) | 0.32 (0.22–0.44) | 0.850 ("
        in page.read_text()
    )
    assert ") | 0.50 | 12.3 | 200 | 3.2 MB | 807.0 MB | 4.9 GB |" in page.read_text()
    assert "| the aligned model | – |" in page.read_text() and page.read_text().count("Not measured yet") == 1


def test_records_are_kept_with_their_alignment_and_the_runs_of_the_folder_go_before_them(tmp_path, monkeypatch):
    kept = [record(arms, arm, 0.5) for arm in (arms.STRICT, arms.PLAIN)]
    rates = {f"aligned-s{arms.REPORTED}": {"asr": 0.0}}
    written = {"aligned_sha256": "theirs", "aligned": rates, "runs": kept, "other_alignments": {"third": {}}}
    results = tmp_path / "results.json"
    results.write_text(json.dumps(written))
    found = table.kept_results(data.SMOLLM2, results)
    assert found.alignments == {"theirs": rates, "third": {}}
    assert [each.pop("aligned") for each in found.records.values()] == ["theirs"] * 2
    assert found.records == {"sst2-p10-s0/strict": kept[0], "sst2-p10-s0/plain": kept[1]}
    here = record(arms, arms.PLAIN, 0.9)
    monkeypatch.setattr(table, "is_done", lambda folder, run: run.arm is arms.PLAIN)
    monkeypatch.setattr(table, "record", lambda folder, run: here)
    done, missing = table.finished(tmp_path, arms.RUNS[:3], found.records)
    assert done == [kept[0] | {"aligned": None}, here | {"aligned": None}] and missing == [arms.RUNS[2]]
    assert real_model._missing(arms.RUNS[:3], found.records) == [arms.RUNS[2]]
    assert table.kept_results(data.SMOLLM2, tmp_path / "none.json") == table.NOTHING


def test_a_table_marks_the_runs_that_started_from_another_alignment():
    rates = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("asr", "complied", "over_refusal", "utility")}
    costs = {"memory_bytes": 0, "state_bytes": 0, "peak_bytes": None}
    runs = [record(arms, arm, 0.5) | rates | costs | {"title": arm.title} for arm in (arms.STRICT, arms.PLAIN)]
    measured = {f"aligned-s{arms.REPORTED}": rates}
    alone = {"aligned_sha256": "ours", "aligned": measured, "runs": [run | {"aligned": "ours"} for run in runs]}
    assert "†" not in table.table(alone, arms.SST2)
    mixed = alone | {"other_alignments": {"theirs": measured}}
    mixed["runs"] = [runs[0] | {"aligned": "theirs"}, runs[1] | {"aligned": "ours"}]
    lines = table.table(mixed, arms.SST2).splitlines()
    assert [line.split(" |")[0] for line in lines if "†" in line and line.startswith("|")] == [
        "| the aligned model †",
        "| preset `strict` †",
    ]
    assert lines[-1] == table.OTHERS_TOLD


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_the_committed_results_name_every_arm_that_they_do_not_have(name):
    model = data.MODELS[name]
    committed = json.loads(table.results_of(model).read_text())
    there = {f"{run['task']}-p{run['poison']}-s{run['seed']}/{run['arm']}" for run in committed["runs"]}
    wanted = [*table.runs_of(model), *table.further_runs(committed["runs"])]
    assert there | set(committed["missing"]) == {run.name for run in wanted}


def test_a_base_model_learns_to_chat_before_it_is_aligned_and_has_files_of_its_own(tmp_path, monkeypatch):
    trained = []

    def train(folder: Path, name: str, config: dict) -> None:
        checked = validate_tree(config, name)
        trained.append((name, Path(checked.model.path), checked.tasks[0].role, read_rows(checked.tasks[0].train)[0]))
        (folder / name / "model").mkdir(parents=True)

    monkeypatch.setattr(real_model, "train", train)
    monkeypatch.setattr(data, "fetch", lambda folder, model: folder / model.name)
    monkeypatch.setattr(data, "own_answers", lambda model, texts, length: [(f"{model.name}.", True)] * len(texts))
    for name, parents in (("smollm2", ["smollm2"]), ("gemma", ["gemma3", "chat/model"])):
        folder, trained[:] = tmp_path / name, []
        assert real_model.align(folder, data.MODELS[name]) == folder / "aligned"
        assert [model for _, model, _, _ in trained] == [folder / parent for parent in parents]
        assert [role for _, _, role, _ in trained] == ["task"] * (len(parents) - 1) + ["align"]
        said = {row.messages[-1].content for row in trained[-1][3]}
        assert f"{Path(parents[-1]).name}." in said, "the contrast rows are the answers of the model that is aligned"
    prompts = [prompt for name in data.MEASURED for prompt in read_prompts(str(tmp_path / "gemma" / name), 10**6)]
    assert data.SMOLLM2.folder != data.GEMMA.folder and len(prompts) > 100
    page = tmp_path / "page.md"
    page.write_text("<!-- real -->\nkept\n<!-- end -->\n<!-- gemma -->\nold\n<!-- end -->\n")
    table.report(tmp_path / "none", data.GEMMA, page, tmp_path / "gemma.json")
    assert page.read_text() == (
        "<!-- real -->\nkept\n<!-- end -->\n"
        "<!-- gemma -->\nNot measured yet: `python -m benchmarks.real_model.run --model gemma`.\n<!-- end -->\n"
    )
    said = json.loads((tmp_path / "gemma.json").read_text())
    assert said["model"] == "Gemma-3-270M" and said["missing"] == [run.name for run in arms.FEWER_RUNS]


def test_a_judge_has_a_column_once_it_has_judged_the_kept_answers(tmp_path, capsys):
    from tests.commands.test_judge import write_judged_run
    from tests.evaluation.judges.models import TEMPLATE, save_classifier, save_guard

    measured = tmp_path / arms.RUNS[0].name / "measured"
    write_judged_run(measured)
    classifier = save_classifier(tmp_path / "classifier")
    judge = judging.judge_of(str(classifier))
    assert (judge.kind, judge.title) == ("classifier", "classifier")
    with pytest.raises(SystemExit, match="recipe: llama-guard-3, model: "):
        judging.judge_of(str(save_guard(tmp_path / "guard")))
    assert judging.judge_of("wildguard").kind == "guard"
    judge.template = TEMPLATE
    assert judging.rates_of(measured) == {}
    judging.judge_all([tmp_path / "not-yet", measured], judge)
    judging.judge_all([measured], judge)
    assert capsys.readouterr().out.count("judged") == 1, "once"
    found = judging.rates_of(measured)
    assert found["judge:classifier"]["value"] == 0.5  # every second answer has the word

    rate = {"value": 0.5, "low": 0.4, "high": 0.6}
    rates = dict.fromkeys(("asr", "complied", "over_refusal", "utility"), rate)
    result = {"runs": [], "aligned": {f"aligned-s{arms.REPORTED}": rates}, "command": ""}
    assert "harmful" not in table.table(result, arms.SST2)
    result["aligned"][f"aligned-s{arms.REPORTED}"] |= {"judged": found}
    head, _, line = table.table(result, arms.SST2).splitlines()
    place = head.split("|").index(" harmful by classifier ")
    assert line.split("|")[place].startswith(" 0.50 (") and line.count("|") == head.count("|")


# ------------------------------------------------------------------------------------------------------------ readings


def record(arms, arm, asr: float, accuracy: float = 0.86, poison: int = 10, seed: int = 0) -> dict:
    rate = lambda value: {"value": value, "low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05)}  # noqa: E731
    own = {"task": "sst2", "arm": arm.name, "poison": poison, "seed": seed, "cpu_seconds": 200.0}
    return own | {"asr": rate(asr), "complied": rate(asr), "utility": rate(accuracy)}


def test_the_best_methods_are_those_with_the_lowest_rate_near_plain_accuracy_once_all_are_measured():
    rates = {arm: (1.0 - 0.05 * number, 0.86) for number, arm in enumerate(arms.METHODS)}
    low, weak = arms.METHODS[-1], arms.METHODS[-2]
    rates[weak] = (0.0, 0.82)  # four points below plain fine-tuning
    found = [record(arms, arms.PLAIN, 1.0), *(record(arms, arm, *rate) for arm, rate in rates.items())]
    assert readings.best(found[:-1], 10) == [] == readings.best(found, 0)
    best = readings.best(found, 10)
    assert best == [low, *arms.METHODS[-3:-6:-1]] and weak not in best
    further = readings.further_runs(found)
    assert [(run.arm, run.poison, run.seed) for run in further] == [(arm, 10, seed) for arm in best for seed in (2, 3)]
    assert not set(further) & set(arms.RUNS)
    said = readings.missing_sentence({"runs": found, "missing": ["a", "b"]})
    assert said.startswith(
        f"2 of {len(found) + 2} arms are not measured yet. With 10 % poison the four best methods are "
    )
    assert best[0].title in said and said.endswith("On clean rows the four best methods are not measured yet.")


def test_each_arm_is_measured_to_its_end_before_the_next_and_further_seeds_come_last(tmp_path, monkeypatch):
    order, done = [], set()
    distance = lambda folder, model, task, path: order.append(f"distance {model.parent.name}")  # noqa: E731
    monkeypatch.setattr(real_model, "train_and_measure", lambda folder, run: order.append(run.name) or done.add(run))
    monkeypatch.setattr(real_model, "measure_distance", distance)
    monkeypatch.setattr(table, "is_done", lambda folder, run: run in done)
    monkeypatch.setattr(table, "record", lambda folder, run: record(arms, run.arm, 0.5, poison=run.poison))
    for run in arms.RUNS[:3]:
        (tmp_path / run.name / "model").mkdir(parents=True)
    done.add(arms.RUNS[1])  # by an earlier process, which was stopped then
    real_model.train_all(tmp_path, arms.RUNS[:3], float("inf"))
    first, second, third = (run.name for run in arms.RUNS[:3])
    names = [f"distance {run.arm.name}" for run in arms.RUNS[:3]]
    assert order == [first, names[0], names[1], third, names[2]] and second not in order
    assert table.wanted(tmp_path, arms.RUNS) == arms.RUNS
    done.update(run for run in arms.RUNS if (run.task, run.seed) == (arms.SST2, arms.REPORTED))
    assert len(table.wanted(tmp_path, arms.RUNS)) == len(arms.RUNS) + 2 * 2 * arms.NUM_BEST
    found, missing = table.finished(tmp_path, arms.RUNS)
    assert len(found) + len(missing) == len(table.wanted(tmp_path, arms.RUNS))


def test_clean_rows_with_a_preset_come_before_the_controller():
    order = [run.name for run in arms.RUNS]
    assert order.index("sst2-p0-s0/balanced") < min(i for i, name in enumerate(order) if "controller" in name)


def test_the_tuned_control_is_the_lowest_rate_within_three_points_when_the_grid_is_whole():
    table = readings.control_table([record(arms, arms.PLAIN, 1.0, 0.88, poison=0)])
    assert table.count("not measured yet") == len(arms.CONTROLS) + 1 and "| as in the other arms | 1.00 |" in table
    found = [record(arms, arms.PLAIN, 1.0, 0.88, poison=0)]
    found += [record(arms, arm, 0.9 - 0.1 * i, 0.88 - 0.01 * i, poison=0) for i, arm in enumerate(arms.CONTROLS)]
    assert readings.control_table(found).endswith(f"The tuned control is {arms.CONTROLS[3].title}.")


def test_the_published_order_stands_beside_what_was_measured(tmp_path):
    by_name = {arm.name: arm for arm in arms.METHODS}
    nothing = readings.order_table([], tmp_path / "none.json")
    assert nothing.count("not measured yet") == len(readings.ORDER) + 2
    merge = {"kind": "safe_lora", "reported": [record(arms, arms.PLAIN, 0.06) | {"accuracy": {"value": 0.645}}]}
    (tmp_path / "merges.json").write_text(json.dumps({"merges": [merge]}))
    found = [record(arms, by_name[name], asr) for name, asr in (("lisa", 0.95), ("der", 0.89), ("agem", 1.0))]
    said = readings.order_table(found, tmp_path / "merges.json")
    assert (
        "| DER | at most 5.9 | 89 (84–94) | 0.860 |" in said
        and "| SafeLoRA | at least 24.4 | 6 (1–11) | 0.645 |" in said
    )
    assert (
        "Of 6 measured pairs: 1 in the published order, 3 in the other (SafeLoRA below Lisa, SafeLoRA below DER, "
        "SafeLoRA below A-GEM), 2 not told apart. LwF: not measured yet."
    ) in said
