"""Whatever a run estimates, it estimates without dropout: teachers, stored outputs, Fisher, scan, evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training import dropout_spy
from tests.training.test_trainer import tree

RUNS: dict[str, dict[str, dict]] = {
    "all weights": {
        "methods": {
            "der": {},
            "agem": {},
            "ewc": {"sign_batches": 2, "rows_per_batch": 2},
            "psmt": {"decay": 0.7, "sign_batches": 2, "rows_per_batch": 2},
            "lwf": {"outputs": "online"},
        },
        "memory": {"guard": {"max_nll": 1e3}, "draw": "mix_cd"},
        "scan": {"action": "report", "refusals": ["I cannot help"], "refusal_tokens": 1},
    },
    "adapters": {
        "methods": {"derpp": {}, "lwf": {"form": "output", "k": 4}, "ema": {"decay": 0.7}},
        "model": {"lora": {"r": 2, "dropout": 0.3}},
        "memory": {"teacher": {"kind": "online", "k": 8}},
    },
    "recorded outputs": {"methods": {"lwf": {}, "online_ewc": {"sign_batches": 2, "rows_per_batch": 2}}},
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """The demonstration's data, its random model with dropout, and few prompts."""
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    for name in ("safety-prompts.jsonl", "benign-prompts.jsonl", "task-test.jsonl", "task.jsonl"):
        lines = (folder / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / name).write_text("".join(lines[: 30 if name == "task.jsonl" else 2]), encoding="utf-8")
    settings = folder / "random-model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"attention_dropout": 0.3}))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_only_the_student_has_dropout_and_only_in_training(rank_pool, materials, tmp_path, name):
    config = tree(
        materials, tmp_path / "run", train={"max_steps": 2, "tokens_per_batch": 200, "allow_little_memory": True}
    )
    config["memory"]["max_rows"], config["model"]["gradient_checkpointing"] = 6, True
    config["safety"] |= {"every": "task", "max_new_tokens": 2}
    config["methods"] = {}
    for section, values in RUNS[name].items():
        config[section] = config.get(section, {}) | values
    found = rank_pool(1).run(dropout_spy.uses_of_dropout, tree=config, cache=str(tmp_path / "cache"))[0]
    assert found["training"], "the student trains without the dropout of its config"
    assert found["estimates"] == []
