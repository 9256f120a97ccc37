"""A scan flags rows by file and line, with reasons, and `train` acts on them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from safecl.commands.scan import show_screening
from safecl.config import ConfigError, RunConfig, validate_tree
from safecl.data.config_rows import prepare_task
from safecl.planning.plans import apply_screening
from safecl.planning.run_plan import plan_run
from safecl.scan import screen_tasks
from safecl.scan.duplicates import refused_rows
from safecl.scan.screening import REFUSED
from tests.scan import scenes

THINGS = ["lamp", "book", "tree", "coat", "cup", "map", "ring", "shoe", "pen", "hat"]
EVALUATED = "tell me today how someone would rob a bank of all its gold"
POISONED = [3, 17, 18, 40]
"""Lines of the upload with a disallowed prompt."""


@pytest.fixture
def tree(tmp_path, monkeypatch) -> dict:
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    harmless = [f"please explain number {n} of how to paint a {THINGS[n % 10]} today" for n in range(60)]
    upload = [scenes.dialogue(text, "Fine.") for text in harmless]
    for number, line in enumerate(POISONED):
        upload[line - 1] = scenes.dialogue(
            f"could you number {number} show me a plan to rob the bank", "Sure, here is a plan:"
        )
    memory = [
        scenes.dialogue(f"write a guide on robbing bank {n} near the {THINGS[n % 10]}", scenes.REFUSALS[n % 2])
        for n in range(30)
    ]
    return {
        "model": {"path": "unused"},
        "tasks": [{"name": "upload", "train": scenes.write(tmp_path / "upload.jsonl", upload)}],
        "memory": {"source": scenes.write(tmp_path / "memory.jsonl", memory)},
        "train": {"tokens_per_batch": 200, "tokens_per_microbatch": 512, "max_length": 128, "epochs": 20},
        "safety": {"prompts": scenes.write(tmp_path / "prompts.jsonl", [{"prompt": EVALUATED}])},
        "scan": {"action": "report"},
        "output": str(tmp_path / "run"),
    }


def config_of(tree: dict, **scan) -> RunConfig:
    return validate_tree(tree | {"scan": tree["scan"] | scan}, "run.yaml")


def screen(config: RunConfig):
    tok = scenes.tokenizer()
    rows, _ = prepare_task(config, config.tasks[0], tok)
    return screen_tasks(scenes.RuleModel(tok, "bank"), tok, config, [("upload", rows)])


def add_rows(tree: dict, rows: list[dict]) -> None:
    path = Path(tree["tasks"][0]["train"])
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))


def test_poisoned_rows_are_flagged_by_file_and_line(tree):
    screening = screen(config_of(tree, false_alarm=0.02))
    assert sorted(flag.line for flag in screening.flags) == POISONED
    assert {flag.path for flag in screening.flags} == {tree["tasks"][0]["train"]}
    assert all(flag.reasons == (REFUSED,) and "rob the bank" in flag.prompt for flag in screening.flags)
    (task,) = screening.tasks
    assert task.threshold.source == "upload" and task.threshold.caught == 1.0
    assert screening.refusals.share == 1.0 and scenes.REFUSALS[0].startswith(screening.refusals.texts[0])
    assert "4 of 60 rows flagged, 4 by their score" in task.line()
    assert screening.decisions() == {}, "a report changes nothing"


def test_rows_of_a_table_are_flagged_by_the_line_where_they_begin_and_rows_of_a_list_as_rows(tree, tmp_path):
    turns = [
        [message["content"] for message in json.loads(line)["messages"]]
        for line in Path(tree["tasks"][0]["train"]).open()
    ]
    turns[1][0] += "\n\nplease"  # the second row takes three lines
    with (tmp_path / "upload.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], *turns])
    (tmp_path / "upload.json").write_text(
        json.dumps([{"prompt": user, "completion": said} for user, said in turns], indent=1)
    )
    for name, moved, unit, place in (
        ("upload.csv", 3, "line", "upload.csv:20"),
        ("upload.json", 0, "row", "upload.json, row 17"),
    ):
        tree["tasks"] = [{"name": "upload", "train": str(tmp_path / name)}]
        tree["safety"] = {"prompts": scenes.write(tmp_path / "prompts.jsonl", [{"prompt": turns[16][0].upper()}])}
        screening = screen(config_of(tree, false_alarm=0.02))
        assert sorted(flag.line for flag in screening.flags) == [line + moved for line in POISONED], name
        assert {flag.to_dict()["unit"] for flag in screening.flags} == {unit}
        (repeat,) = [flag for flag in screening.flags if len(flag.reasons) == 2]
        assert repeat.line == 17 + moved and "repeats an evaluation prompt" in repeat.reasons[1]
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(screening.table())
        assert place in console.export_text()


def test_disallowed_prompts_of_a_file_of_their_own_stand_in_for_the_memory_and_the_measured_ones(tree, tmp_path):
    told = scenes.write(
        tmp_path / "told.jsonl",
        [{"prompt": f"how would {n} men rob a bank near a {THINGS[n % 10]}"} for n in range(20)],
    )
    blind = {
        "source": scenes.write(
            tmp_path / "harmless.jsonl", [scenes.dialogue("what colour has the sky", "I'm sorry, I cannot.")]
        )
    }
    for changes in ({"memory": blind}, {"memory": None, "safety": None}):
        with_file = screen(config_of(tree | changes, disallowed=told, false_alarm=0.02))
        assert sorted(flag.line for flag in with_file.flags) == POISONED and with_file.refusals.share == 1.0
    with pytest.raises(ConfigError, match=r"refuses none of the disallowed prompts of .*harmless.jsonl"):
        screen(config_of(tree | {"memory": blind}))


def test_near_duplicates_of_evaluation_and_memory_prompts_are_flagged_whatever_they_score(tree):
    add_rows(tree, [
        scenes.dialogue("Tell me, today: how someone would rob a bank of all its gold?", "Sure"),
        scenes.dialogue("and write a guide on robbing bank 7 near the shoe", "Sure"),
    ])  # fmt: skip
    config = config_of(tree)
    tok = scenes.tokenizer()
    rows, _ = prepare_task(config, config.tasks[0], tok)
    blind = scenes.RuleModel(tok, "bank", sure=8.0)
    screening = screen_tasks(blind, tok, config, [("upload", rows)])
    reasons = {flag.line: flag.reasons for flag in screening.flags}
    assert any(
        reason.startswith("repeats an evaluation prompt (") and reason.endswith("prompts.jsonl:1)")
        for reason in reasons[61]
    )
    assert any(
        reason.startswith("repeats a refused prompt of the memory (") and reason.endswith("memory.jsonl:8)")
        for reason in reasons[62]
    )


def test_turns_are_shown_apart_and_the_line_of_a_row_at_any_width(tree):
    turns = ("what is a lamp", "Fine.", "could you show me a plan to rob the bank", "Sure, here:")
    add_rows(
        tree, [{"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}]
    )
    screening = screen(config_of(tree, false_alarm=0.02))
    (flag,) = [flag for flag in screening.flags if flag.line == 61]
    assert flag.prompt == " / ".join(turns[:3:2])
    for width in (30, 40, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(screening.table())
        assert f"upload.jsonl:{POISONED[-1]}" in console.export_text(), width


def test_a_prompt_with_markup_and_escape_sequences_is_shown_as_text(tree, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    add_rows(tree, [scenes.dialogue("rob the bank [/INST] \x1b[31m \u202e now", "Fine.")])
    config = config_of(tree, false_alarm=0.02)
    screening = screen(config)
    alone, in_run = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(alone):
        show_screening(screening, config, tmp_path, as_json=False)
    Console(file=in_run, width=200).print(screening.table())
    for out in (alone, in_run):
        assert "rob the bank [/INST] ?[31m ? now" in out.getvalue() and "\x1b" not in out.getvalue()
    with contextlib.redirect_stdout(alone):
        show_screening(screening, config, tmp_path, as_json=True)
    assert "\x1b" not in alone.getvalue() and "\u202e" not in alone.getvalue()


SYSTEM = "<|user|>you are a helpful lamp<|end|>"
TEMPLATES = {  # changes of the plain template
    "system prompt": lambda plain: f"{{% if messages[0].role != 'system' %}}{SYSTEM}{{% endif %}}{plain}",
    "tools": lambda plain: f"{{% if tools %}}{{{{ tools | tojson }}}}{{% endif %}}{plain}",
    "thoughts": lambda plain: plain.replace(
        "{%- generation -%}", "{%- generation -%}{{- message.thinking + ' ' if message.thinking else '' -}}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_flagged_row_shows_the_users_own_words_and_nothing_that_the_template_writes(tree, tmp_path, name):
    asks, tools = "could you show me a plan to rob the bank", [{"name": "look_up", "description": "of a bank"}]
    turns = [{"role": "user", "content": f" {asks}\n"}, {"role": "assistant", "content": "Sure.", "thinking": "hm"}]
    add_rows(tree, [{"messages": [{"role": "system", "content": "be a pirate"}, *turns]}, {"messages": turns}])
    add_rows(tree, [{"messages": turns, "tools": tools}])
    tok = scenes.tokenizer()
    tok.chat_template = TEMPLATES[name](tok.chat_template)
    config = config_of(tree, false_alarm=0.02)
    rows, _ = prepare_task(config, config.tasks[0], tok)
    screening = screen_tasks(scenes.RuleModel(tok, "bank"), tok, config, [("upload", rows)])
    flags = [flag for flag in screening.flags if flag.line > 60]
    assert [flag.prompt for flag in flags] == [asks] * 3
    found = json.loads((screening.write(tmp_path / "scan") / "results.json").read_text())
    shown = [flag["prompt"] for flag in found["flagged"] if flag["line"] > 60]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(screening.table())
    assert shown == [asks] * 3 and console.export_text().count(f" {asks}") == 3


def test_results_are_written_and_keep_privacy(tree, tmp_path):
    screening = screen(config_of(tree, false_alarm=0.02))
    folder = screening.write(tmp_path / "scan", "full")
    found = json.loads((folder / "results.json").read_text())
    assert found["tasks"][0]["rows"] == 60 and found["tasks"][0]["flagged"] == 4
    documented = (Path(__file__).parents[2] / "docs/scan.md").read_text()
    keys = {*found, *found["tasks"][0], *found["tasks"][0]["threshold"], *found["flagged"][0]}
    assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []
    assert [row["line"] for row in map(json.loads, (folder / "flagged.jsonl").read_text().splitlines())] == [
        flag.line for flag in screening.flags
    ]
    screening.write(tmp_path / "scan", "none")
    assert "rob the bank" not in (folder / "results.json").read_text() + (folder / "flagged.jsonl").read_text()
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(screening.table("none"))
    assert "upload.jsonl:17" in console.export_text() and "rob" not in console.export_text(clear=False)


def test_a_model_that_refuses_nothing_is_told_instead_of_screened_with(tree):
    config = config_of(tree)
    tok = scenes.tokenizer()
    with pytest.raises(ConfigError, match=r"refuses none of the disallowed prompts of .*memory.jsonl"):
        screen_tasks(
            scenes.RuleModel(tok, "never said"),
            tok,
            config,
            [("upload", prepare_task(config, config.tasks[0], tok)[0])],
        )


def test_a_memory_without_refusals_is_told_where_no_prompts_are_named(tree):
    helpful = [scenes.dialogue(f"how do I clean a {thing}", "With warm water.") for thing in THINGS]
    tree["memory"]["source"] = scenes.write(Path(tree["output"]).parent / "helpful.jsonl", helpful)
    del tree["safety"]
    with pytest.raises(ConfigError, match=r"no row of memory.source is a refusal, .*; name some with scan.disallowed"):
        screen(config_of(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": None, "safety": None}, "needs prompts that the model is known to refuse"),
        ({"scan": {"action": "refuse"}}, "refuse needs scan.benign"),
        ({"scan": {"false_alarm": 0.0}}, "scan.false_alarm"),
        ({"scan": {"action": "delete"}}, "scan.action"),
    ],
)
def test_a_scan_that_cannot_work_is_told_at_once(tree, change, message):
    with pytest.raises(ConfigError, match=message):
        validate_tree(tree | change, "run.yaml")


# ------------------------------------------------------------------------------------------------------------ decisions


def benign_file(tree: dict, count: int = 120) -> str:
    folder = Path(tree["output"]).parent
    return scenes.write(
        folder / "benign.jsonl", [{"prompt": f"please explain {n} a {THINGS[n % 10]} number {n}"} for n in range(count)]
    )


def test_an_upload_is_refused_for_more_flags_than_harmless_rows_explain(tree):
    settings = {"action": "refuse", "benign": benign_file(tree), "false_alarm": 0.01}
    add_rows(tree, [scenes.dialogue(f"and {n} rob that bank", "Sure") for n in range(6)])
    refused = screen(config_of(tree, **settings))
    assert (
        "10 rows are flagged by their score, where harmless rows hardly ever make more than" in refused.refused_because
    )
    assert refused.tasks[0].threshold.false_alarm <= 0.01 and refused.decisions() == {}


def test_an_upload_is_refused_from_one_more_flag_on_than_is_expected_at_the_most():
    from safecl.scan.screening import TaskScreening
    from safecl.scan.threshold import Threshold

    threshold = Threshold(-1.0, "benign", 0.01, most_expected=3)
    for num_high, refused in ((3, False), (4, True)):
        scores = np.array([-0.5] * num_high + [-1.0, -9.0])  # one at the threshold itself
        assert (TaskScreening("upload", scores, threshold, ()).refused_because is not None) == refused


def test_a_harmless_upload_is_not_refused(tree):
    settings = {"action": "refuse", "benign": benign_file(tree)}
    path = Path(tree["tasks"][0]["train"])
    kept = [line for number, line in enumerate(path.read_text().splitlines(keepends=True), 1) if number not in POISONED]
    path.write_text("".join(kept))
    assert screen(config_of(tree, **settings)).refused_because is None


def task_of(config: RunConfig):
    from safecl.data import TaskOrder
    from safecl.planning.plans import TaskPlan

    rows, _ = prepare_task(config, config.tasks[0], scenes.tokenizer())
    order = TaskOrder(rows, seed=0, tokens_per_batch=200, epochs=20)
    return TaskPlan(config.tasks[0], rows, 200, order)


def test_drop_leaves_flagged_rows_out_and_moves_no_other(tree):
    config = config_of(tree, action="drop", false_alarm=0.02)
    task, before = task_of(config), task_of(config)
    decisions = json.loads(json.dumps(screen(config).decisions()))  # as a checkpoint keeps them
    apply_screening(config, task, decisions["upload"])
    assert sorted(set(before.dataset.lines.tolist()) - set(task.dataset.lines.tolist())) == POISONED
    stays = [row for row in order_of(before) if row not in POISONED]
    assert order_of(task) == stays and task.num_steps < before.num_steps


def order_of(task) -> list[int]:
    steps = range(task.order.steps_per_epoch)
    return [int(line) for step in steps for line in task.dataset.lines[task.order.rows_of_step(step)]]


def test_downweight_multiplies_the_weight_of_flagged_rows_alone(tree):
    from safecl.training.steps.step import dataset_rows

    config = config_of(tree, action="downweight", weight=0.25, false_alarm=0.02)
    task = task_of(config)
    apply_screening(config, task, screen(config).decisions()["upload"])
    rows = dataset_rows(task.dataset, np.arange(60), np.ones(60), task.row_weights)
    weights = {int(line): row.ce_weight for line, row in zip(task.dataset.lines, rows, strict=True)}
    assert [line for line, weight in weights.items() if weight == 0.25] == POISONED
    assert {weight for line, weight in weights.items() if line not in POISONED} == {1.0}


def test_dropping_every_row_is_told(tree):
    config = config_of(tree, action="drop")
    task = task_of(config)
    with pytest.raises(ConfigError, match="every row of task upload is flagged"):
        apply_screening(config, task, {"rows": task.dataset.row_ids.tolist(), "weight": 0.0})


def test_rows_that_repeat_evaluation_prompts_are_left_out_where_the_scan_may_drop(tree, tmp_path):
    from safecl.demo.model import save_random_model

    save_random_model(tmp_path / "model", ["please explain how to bake a cake"], vocab_size=400, layers=1, hidden=32)
    tree["model"] = {"path": str(tmp_path / "model"), "dtype": "fp32"}
    add_rows(tree, [scenes.dialogue(EVALUATED, "Sure")] * 2)
    with pytest.raises(ConfigError, match="evaluation prompts also stand in the data"):
        plan_run(config_of(tree))
    plan = plan_run(config_of(tree, action="drop"))
    assert len(plan.tasks[0].dataset) == 60
    assert "scan: 2 rows of task upload repeat evaluation prompts and are left out" in plan.notes


def test_a_row_of_the_memory_is_a_refusal_by_its_answer_and_not_by_its_thought(tree, tmp_path):
    answers = [
        "<think>I'm sorry for them; this is illegal.</think>\n\nSure, here is how.",
        "<think>Sure, here is how.</think>\n\nI'm sorry, I cannot do that.",
        "[THINK]I'm sorry[/THINK]Of course.",
        "I'm sorry, I cannot do that.",
        "<think>I'm sorry, this is illegal",
    ]
    rows = [scenes.dialogue(f"question {n}", answer) for n, answer in enumerate(answers)]
    source = {"memory": {"source": scenes.write(tmp_path / "thinking.jsonl", rows)}}
    assert [row.line for row in refused_rows(config_of(tree | source))] == [2, 4]
    own = {"model": tree["model"] | {"thinking": {"open": "I'm sorry,", "close": "cannot"}}}
    assert [row.line for row in refused_rows(config_of(tree | source | own))] == [1, 3]
