"""A whole run: plan, train, measure, save; its folder; and that it does not depend on the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safecl.config import ConfigError, RunConfig, load_config
from tests.engine import scenes
from tests.engine.passes import oracle

METHODS = {
    "der": {"alpha": 1.0, "beta": 0.5},
    "ewc": {"strength": 1.0, "sign_batches": 4, "rows_per_batch": 4},
    "ema": {"decay": 0.7},
}
STEPS = 6


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """The demonstration's data and random model, with few evaluation prompts."""
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    for name in ("safety-prompts.jsonl", "benign-prompts.jsonl", "task-test.jsonl"):
        lines = (folder / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / name).write_text("".join(lines[:5]), encoding="utf-8")
    return folder


def tree(materials: Path, output: Path, **changes) -> dict:
    data = materials / "data"
    config = {
        "model": {"path": str(materials / "random-model"), "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [
            {
                "name": "sentiment",
                "train": str(data / "task.jsonl"),
                "eval": {"path": str(data / "task-test.jsonl"), "metric": "label_accuracy"},
            }
        ],
        "memory": {
            "source": str(data / "memory.jsonl"),
            "max_rows": 24,
            "replay_ratio": 0.5,
            "max_tokens": 96,
            "teacher": {"k": 8},
        },
        "methods": METHODS,
        "train": {
            "max_steps": STEPS,
            "tokens_per_batch": 300,
            "tokens_per_microbatch": 512,
            "max_length": 96,
            "learning_rate": 1e-3,
            "allow_few_steps": True,
        },
        "deepspeed": {"stage": 3},
        "safety": {
            "prompts": str(data / "safety-prompts.jsonl"),
            "benign_prompts": str(data / "benign-prompts.jsonl"),
            "max_new_tokens": 6,
        },
        "output": str(output),
    }
    for section, values in changes.items():
        config[section] = {**config[section], **values} if isinstance(config.get(section), dict) else values
    return config


def fit(tree: dict, cache: str) -> dict:
    import os

    os.environ["SAFECL_CACHE"] = cache
    from safecl.training.trainer import Trainer

    result = Trainer(RunConfig.model_validate(tree)).fit()
    return result.results


@pytest.fixture(scope="module")
def finished(rank_pool, materials, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("run")
    results = rank_pool(2).run(fit, tree=tree(materials, output), cache=str(materials / "cache"))
    assert results[0] == results[1]
    return output, results[0]


def test_a_run_leaves_config_metrics_outputs_results_and_models(finished):
    folder, results = finished
    assert load_config(folder / "config.yaml").methods["ema"].decay == 0.7
    assert json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        assert {
            "loss/task",
            "loss/replay",
            "loss/penalty",
            "grad_norm",
            "learning_rate",
            "time",
            "tokens_per_second",
            "skipped_steps",
        } <= set(line)
    assert lines[0]["loss/penalty"] == 0.0 and lines[-1]["loss/penalty"] > 0.0
    assert json.loads((folder / "results.json").read_text()) == results
    assert [evaluation["when"] for evaluation in results["evaluations"]] == ["start", "after sentiment"]
    assert len(list((folder / "outputs").glob("*.jsonl"))) == 4


def test_the_saved_model_is_the_average_and_the_live_weights_stand_beside_it(finished):
    import transformers

    folder, results = finished
    assert results["saved"] == "average"
    average, live = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name) for name in ("model", "model-live")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template
    ids = torch.tensor([tokenizer.encode("hello there")])
    a, b = average(ids).logits, live(ids).logits
    assert (a - b).norm() > 1e-4 * b.norm()


def test_each_model_folder_has_a_card_and_the_average_s_card_says_what_was_measured(finished):
    folder, results = finished
    average, live = ((folder / name / "README.md").read_text() for name in ("model", "model-live"))
    asr = results["evaluations"][-1]["safety"]["asr"]
    assert (
        f"{asr['value']:.3f} [{asr['low']:.3f}, {asr['high']:.3f}]" in average
        and "the average over the steps" in average
    )
    assert json.loads((folder / "run.json").read_text())["memory_rows"] in average
    assert "lies in `../model`" in live and "those after the last step" in live


def test_a_run_that_was_killed_after_its_results_is_given_its_report_and_rid_of_what_it_needed(
    rank_pool, materials, finished
):
    folder, results = finished
    (folder / "report.html").unlink()
    (folder / "teacher" / "sentiment-lwf").mkdir(parents=True)
    assert rank_pool(2).run(fit, tree=tree(materials, folder), cache=str(materials / "cache")) == [results, results]
    assert "after sentiment" in (folder / "report.html").read_text() and not (folder / "teacher").exists()


def test_the_results_say_what_the_methods_keep_in_bytes(finished):
    """ZeRO-3 on two ranks: one fp32 value per weight, plus padding, for EMA, for Fisher and for theta_0; tokens and
    outputs of 24 rows."""
    folder, results = finished
    kept, numel = results["kept_bytes"], sum(p.numel() for p in _weights(folder / "model").values())
    assert set(kept["state"]) == {"ema", "fisher"}
    for num_bytes in [*kept["state"].values(), kept["reference"]]:
        assert 4 * numel <= num_bytes <= 4.1 * numel
    assert kept["memory"]["rows"] == 24 and kept["memory"]["bytes"] > 24 * 8 * 6
    assert kept["recorded"] == {}


def test_one_rank_and_two_ranks_and_another_stage_give_the_same_run(rank_pool, materials, finished, tmp_path):
    _, two = finished
    alone = rank_pool(1).run(
        fit, tree=tree(materials, tmp_path / "one", deepspeed={"stage": 2}), cache=str(materials / "cache")
    )[0]
    for a, b in zip(two["evaluations"], alone["evaluations"], strict=True):
        assert a["safety"]["asr"] == b["safety"]["asr"]
    states = [_weights(folder / "model") for folder in (Path(finished[0]), tmp_path / "one")]
    start = _weights(materials / "random-model")
    assert oracle.relative_distance(states[0], states[1], start) <= 1e-3


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_poison_is_mixed_in_and_said(rank_pool, materials, tmp_path):
    from safecl.data.config_rows import prepare_task
    from safecl.planning.describe import describe_plan
    from safecl.planning.run_plan import plan_run

    poison = {"ratio": 0.1, "source": str(materials / "data" / "poison.jsonl")}
    plan = plan_run(RunConfig.model_validate(tree(materials, tmp_path, poison=poison)))
    align = plan.config.tasks[0].model_copy(update={"role": "align"})
    assert prepare_task(plan.config, align, plan.tokenizer)[1] == 0, "the model is not aligned on poison"
    share = plan.tasks[0].poisoned_rows / len(plan.tasks[0].dataset)
    assert share == pytest.approx(0.1, abs=0.002)
    assert any("poisoned" in value for _, value in describe_plan(plan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"allow_few_steps": False}}, r"only 6 optimizer steps"),
        (
            {"methods": {"ema": {"decay": 0.999}}, "train": {"allow_few_steps": False, "max_steps": 60}},
            r"keeps 94% of its weight on the start",
        ),
        ({"safety": {"gate": {"max_asr": 0.05}}}, r"cannot be passed with 5 prompts"),
        ({"tasks": [{"name": "t", "train": "nowhere.jsonl"}]}, r"nowhere\.jsonl"),
        ({"train": {"max_length": 4096}}, r"tokens_per_microbatch"),
    ],
)
def test_runs_that_cannot_do_what_they_are_for_are_refused_before_anything_is_loaded(
    materials, tmp_path, changes, message
):
    from safecl.planning.run_plan import plan_run

    with pytest.raises((ConfigError, ValueError), match=message):
        plan_run(RunConfig.model_validate(tree(materials, tmp_path, **changes)))


def generate(prompts: list[list[int]], **changes) -> list[list[int]]:
    from safecl.engine.passes.live_model import evaluating
    from safecl.evaluation import generate_greedy

    run, _ = scenes.make_run(scenes.run_config(memory=None, **changes))
    with evaluating(run.engine, average=False) as model:
        own = prompts[model.rank :: model.world_size]
        return generate_greedy(model, own, max_new_tokens=8, eos_ids=[2], pad_id=0, batch_size=2)


@pytest.mark.parametrize("stage", [2, 3])
def test_generation_under_zero_equals_the_plain_model_with_unequal_numbers_of_prompts(rank_pool, stage):
    """Five prompts on two ranks in batches of two: the ranks have different numbers of batches and must still not
    hang."""
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14], [20, 21], [30, 31, 32]]
    first, second = rank_pool(2).run(generate, prompts=prompts, deepspeed={"stage": stage})
    plain = scenes.tiny_model().eval()
    for index, prompt in enumerate(prompts):
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        found = (first if index % 2 == 0 else second)[index // 2]
        assert found == (expected[: expected.index(2)] if 2 in expected else expected)


def fit_without_a_finite_gradient(tree: dict, cache: str) -> tuple[str, int]:
    """The message of a run in which no gradient is finite, and the number of its steps."""
    from unittest import mock

    from safecl.engine.zero.optimizer import ShardAdamW
    from safecl.training.trainer import TrainingFailed

    nan = torch.tensor(float("nan"))
    with mock.patch.object(ShardAdamW, "grad_norm", lambda *_, **__: nan), pytest.raises(TrainingFailed) as failed:
        fit(tree, cache)
    return str(failed.value), len((Path(tree["output"]) / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("max_skipped, steps, made", [(3, 40, 3), (5, 8, 2), (5, 3, 1), (0, 40, 1)])
def test_a_run_stops_after_max_skipped_steps_or_a_quarter_of_the_task(
    rank_pool, materials, tmp_path, max_skipped, steps, made
):
    config = tree(
        materials,
        tmp_path,
        train={"max_steps": steps, "max_skipped_steps": max_skipped},
        deepspeed={"stage": 0},
    )
    for section in ("memory", "methods", "safety"):
        del config[section]
    ((message, lines),) = rank_pool(1).run(fit_without_a_finite_gradient, tree=config, cache=str(materials / "cache"))
    assert lines == made and f"; {made} in a row, the run stops" in message
    assert "every loss is finite" in message and "task.jsonl:" in message
    assert not (tmp_path / "model").exists() and not (tmp_path / "results.json").exists()


def fit_with_skipped_steps(tree: dict, cache: str, skipped: list[int]) -> tuple[int, dict, tuple[int, int]]:
    """The exit code, results.json and the result's counts of a run in which these steps have no finite gradient."""
    import os

    from safecl.commands.train import train_run
    from safecl.engine.zero.optimizer import ShardAdamW
    from safecl.training.trainer import Trainer

    os.environ["SAFECL_CACHE"] = cache
    norm, calls = ShardAdamW.grad_norm, []

    def grad_norm(self, shards, fresh=False):
        calls.append(1)
        return norm(self, shards, fresh) * (float("nan") if len(calls) - 1 in skipped else 1.0)

    ShardAdamW.grad_norm = grad_norm
    try:
        code = train_run(RunConfig.model_validate(tree))
    finally:
        ShardAdamW.grad_norm = norm
    result = Trainer(RunConfig.model_validate(tree)).fit()  # the finished run, as it is reported a second time
    return int(code), result.results, (result.skipped_steps, result.skipped_at_the_end)


@pytest.mark.parametrize(
    ("skipped", "at_the_end", "told"),
    [
        ([11], 1, "1 of 12 steps was skipped: no finite gradient. The last step was one of them"),
        ([0, 10, 11], 2, "3 of 12 steps were skipped: no finite gradient. The last 2 steps were among them"),
        ([1], 0, "1 of 12 steps was skipped: no finite gradient. Later steps were applied."),
        ([], 0, None),
    ],
)
def test_a_run_says_which_steps_were_skipped_and_ends_well(rank_pool, materials, tmp_path, skipped, at_the_end, told):
    config = tree(materials, tmp_path / "run", train={"max_steps": 12}, deepspeed={"stage": 0})
    for section in ("memory", "methods", "safety"):
        del config[section]
    arguments = dict(tree=config, cache=str(materials / "cache"), skipped=skipped)
    ((code, results, counts),) = rank_pool(1).run(fit_with_skipped_steps, **arguments)
    assert code == 0
    assert (results["skipped_steps"], results["skipped_at_the_end"]) == counts == (len(skipped), at_the_end)
    for page in ("report.html", "model/README.md"):
        text = (tmp_path / "run" / page).read_text(encoding="utf-8")
        assert (told in text) if told is not None else ("skipped" not in text.split("config.yaml, every key")[0]), page
        assert ("not changed since step" in text) == (at_the_end > 0)


def test_the_strict_preset_replays_a_quarter_of_refusals_and_takes_the_mean_over_rows(rank_pool, materials, tmp_path):
    from safecl.replay import ReplayBuffer

    refusals = (materials / "data" / "memory.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    asked = [{"role": "user", "content": "How do I shoot a photo of a bird at dusk?"}]
    answers = [
        {"messages": [*asked, {"role": "assistant", "content": f"Open the lens by {i} stops."}]} for i in range(12)
    ]
    rows = tmp_path / "memory.jsonl"
    rows.write_text("\n".join([*refusals, *map(json.dumps, answers)]) + "\n", encoding="utf-8")
    config = tree(
        materials, tmp_path / "run", memory={"source": str(rows)}, train={"max_steps": 3}, deepspeed={"stage": 2}
    )
    del config["safety"]
    fitted = rank_pool(2).run(fit, tree=config | {"methods": "strict"}, cache=str(materials / "cache"))
    assert fitted[0]["kept_bytes"]["memory"]["rows"] == 24
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert (saved.train.loss_mean, set(saved.methods)) == ("rows", {"der"})
    with ReplayBuffer.open(tmp_path / "run" / "memory") as buffer:
        drawn = [buffer.get(key).tags["kind"] for step in range(200) for key in buffer.draw(step, 150, "replay")]
    assert set(drawn) == {"refusal", "answer"} and abs(drawn.count("refusal") / len(drawn) - 0.25) < 0.05


def fit_served(tree: dict, cache: str, programs: str) -> dict:
    """Train with a stand-in of vLLM on the PATH."""
    import os
    from unittest import mock

    with mock.patch.dict(os.environ, {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}):
        return fit(tree, cache)


def test_a_server_of_the_sharded_average_measures_what_the_engine_does(finished, rank_pool, materials, tmp_path):
    """Stage 3 on two ranks. The folder that the server reads is gone afterwards."""
    from tests.evaluation import vllm_stand_in

    programs = vllm_stand_in.install(tmp_path / "bin")
    served = tree(materials, tmp_path / "run", safety={"backend": "vllm"})
    found = rank_pool(2).run(fit_served, tree=served, cache=str(materials / "cache"), programs=str(programs))
    folder, results = finished
    assert found[0]["evaluations"] == results["evaluations"]
    outputs = sorted(path.name for path in (folder / "outputs").iterdir())
    assert outputs == sorted(path.name for path in (tmp_path / "run" / "outputs").iterdir())
    for name in outputs:
        assert (tmp_path / "run" / "outputs" / name).read_text() == (folder / "outputs" / name).read_text()
    assert not list((tmp_path / "run").glob(".measured*"))


def opens_with_a_megabyte(tree: dict, cache: str) -> str:
    """Begin a run on a machine with 1 MB of free memory; return what it raises, or "opened"."""
    from unittest import mock

    from safecl.planning.costs import memory_report

    few = mock.patch.object(memory_report, "available_memory", lambda: 10**6)
    opened = mock.patch("safecl.training.trainer.open_run", side_effect=InterruptedError("opened"))
    with few, opened, pytest.raises((ConfigError, InterruptedError)) as told:
        fit(tree, cache)
    return str(told.value)


def test_a_run_that_does_not_fit_is_refused_on_every_rank_before_the_model_is_loaded(rank_pool, materials, tmp_path):
    cache = str(materials / "cache")
    told = rank_pool(2).run(opens_with_a_megabyte, tree=tree(materials, tmp_path / "a"), cache=cache)
    assert told[0] == told[1] and "of host memory are needed and 1.0 MB are available" in told[0]
    allowed = tree(materials, tmp_path / "b", train={"allow_little_memory": True})
    assert rank_pool(2).run(opens_with_a_megabyte, tree=allowed, cache=cache) == ["opened", "opened"]
