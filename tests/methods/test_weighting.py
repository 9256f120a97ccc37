"""Methods that weigh rows and tokens train the same numbers as their papers' equations in plain PyTorch."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from safecl.config import ConfigError
from tests.engine.passes import oracle
from tests.engine.scenes import REFUSAL_IDS, VOCAB, random_dataset, tiny_model
from tests.methods import reference, scenes
from tests.methods.test_lwf import LORA_ON_HEAD
from tests.methods.test_replay_methods import task_rows

STEPS = 5


def answer_log_probs(model, row, ids=None) -> torch.Tensor:
    """fp64 log-probabilities of the supervised tokens, or of other tokens in the place of the answer."""
    tokens, mask = row.input_ids.astype("int64"), row.loss_mask
    if ids is not None:
        start = int(np.flatnonzero(mask)[0])
        tokens = np.concatenate([tokens[:start], ids])
        mask = np.arange(len(tokens)) >= start
    tokens = torch.from_numpy(tokens)[None]
    log_p = model(input_ids=tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return log_p.gather(-1, tokens[0, 1:, None])[:, 0][torch.from_numpy(mask[1:].copy())]


def expected(loss_of_step) -> tuple[dict, dict]:
    """(start, end) of training with a loss of (student, frozen copy, rows of the step)."""
    student = tiny_model()
    frozen = copy.deepcopy(student)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    steps = task_rows(random_dataset(60, seed=1), STEPS)
    return start, reference.train(student, [lambda rows=rows: loss_of_step(student, frozen, rows) for rows in steps])


def error(found: dict, start: dict, end: dict) -> float:
    return oracle.relative_distance(found["weights"], end, start)


# ------------------------------------------------------------------------------------------------------ constrained SFT


def equation_4(betas: list[float], rest: float):
    def loss(student, frozen, rows) -> torch.Tensor:
        terms = []
        for row in rows:
            with torch.no_grad():
                before = answer_log_probs(frozen, row)
            now = answer_log_probs(student, row)
            beta = torch.tensor((betas + [rest] * len(now))[: len(now)], dtype=torch.float64)
            terms.append(-2 / beta * torch.nn.functional.logsigmoid(beta * (now - before)))
        return torch.cat(terms).mean().float()

    return loss


@pytest.mark.parametrize("stage", [0, 3])
def test_constrained_sft_has_the_gradient_of_the_papers_loss(rank_pool, tmp_path, stage):
    settings = {"beta": 0.4, "first_tokens": 3, "factor": 10.0, "factor_of_first": 5.0, "floor": 0.0}
    found = rank_pool(2).run(
        scenes.train,
        steps=STEPS,
        memory=None,
        methods={"constrained_sft": settings},
        deepspeed={"stage": stage},
        output=str(tmp_path),
    )[0]
    assert error(found, *expected(equation_4([2.0, 4.0, 4.0], 0.4))) <= 1e-3
    assert error(found, *expected(equation_4([], 0.4))) > 1e-2


def test_constrained_sft_works_with_the_models_own_logits(rank_pool, tmp_path):
    """With LoRA on the head; after one step from equal weights it is plain fine-tuning, then it is slower."""
    found = [
        rank_pool(2).run(scenes.train, steps=3, memory=None, model=LORA_ON_HEAD, methods=methods, output=str(tmp_path))[
            0
        ]
        for methods in ({"constrained_sft": {"beta": 2.0}}, {})
    ]
    first, later = ([losses["losses"][step]["task"] for losses in found] for step in (1, 2))
    assert first[0] == pytest.approx(first[1], rel=1e-6) and later[0] > later[1] + 1e-4


def test_beta_depends_on_the_place_in_each_answer():
    from safecl.engine.passes.token_terms import betas_of
    from safecl.methods.weighting.constrained_sft import Config, Method

    rule = Method("constrained_sft", Config()).token_constraint()
    mask = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1], bool)
    assert betas_of(rule, mask).tolist() == pytest.approx([0.5, 2.0, 2.0, 2.0, 2.0, 0.1, 0.5, 2.0])
    rule = Method("constrained_sft", Config(first_tokens=0)).token_constraint()
    assert betas_of(rule, mask).tolist() == pytest.approx([0.1] * 8)


# ------------------------------------------------------------------------------------------------------------- Antibody


def weighted_by_refusal(temperature: float, mean: str):
    def loss(student, frozen, rows) -> torch.Tensor:
        with torch.no_grad():
            ratio = [
                answer_log_probs(frozen, row).mean() - answer_log_probs(frozen, row, REFUSAL_IDS).mean() for row in rows
            ]
        weights = (torch.stack(ratio) / temperature).softmax(0)
        tokens = [-answer_log_probs(student, row) for row in rows]
        if mean == "rows":
            return sum(w * t.mean() for w, t in zip(weights, tokens, strict=True)).float()
        total = sum(w * len(t) for w, t in zip(weights, tokens, strict=True))
        return sum(w * t.sum() / total for w, t in zip(weights, tokens, strict=True)).float()

    return loss


@pytest.mark.parametrize(("stage", "mean"), [(1, "rows"), (3, "tokens")])
def test_antibody_equals_a_softmax_over_the_whole_step(rank_pool, tmp_path, stage, mean):
    found = rank_pool(2).run(
        scenes.train,
        steps=STEPS,
        memory=None,
        methods={"antibody": {"temperature": 0.1}},
        train={"loss_mean": mean},
        deepspeed={"stage": stage},
        output=str(tmp_path),
    )[0]
    assert error(found, *expected(weighted_by_refusal(0.1, mean))) <= 1e-3
    assert error(found, *expected(weighted_by_refusal(1e9, mean))) > 1e-2


# --------------------------------------------------------------------------------------------------------------- scores


def test_another_answer_takes_the_place_of_the_last_one():
    from safecl.training.recorded.scores import with_answer

    rows = scenes.dataset_of(
        [([1, 2, 3, 4, 5], [False, True, False, True, True]), ([7, 8], [False, True]), ([9, 9], [False, False])], 5
    )
    found = with_answer(rows, [50, 51])
    assert [found.row(i).input_ids.tolist() for i in range(3)] == [[1, 2, 3, 50, 51], [7, 50, 51], [9, 9, 50, 51]]
    assert [found.row(i).loss_mask.sum() for i in range(3)] == [2, 2, 2]
    assert found.row_ids.tolist() == rows.row_ids.tolist()


# ----------------------------------------------------------------------------------------------------------------- STAR


def guarded(num_rows: int) -> list:
    """A guard's scores: for every second row one number, for the others a list for thirds of the answer."""
    rng = np.random.default_rng(8)
    return [round(rng.random(), 2) if n % 2 else rng.random(3).round(2).tolist() for n in range(num_rows)]


def shaped_by_a_guard(weight: float, mean: str, recorded: bool, is_shaped: bool = True):
    """The paper's loss: s CE + (1 - s) KL(p || p0) at every token, and the mean over all. recorded: log p0 is fp16."""
    given = dict(zip(random_dataset(60, seed=1).row_ids.tolist(), guarded(60), strict=True))

    def log_probs(model, row) -> torch.Tensor:
        ids = torch.from_numpy(row.input_ids.astype("int64"))[None]
        said = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        return said[torch.from_numpy(row.loss_mask[1:].copy())]

    def loss(student, frozen, rows) -> torch.Tensor:
        found = []
        for row in rows:
            p = log_probs(student, row)
            with torch.no_grad():
                p0 = log_probs(frozen, row)
                p0 = p0.half().double() if recorded else p0
            own = given[int(row.row_id)]
            own = own if isinstance(own, list) else [own]
            s = torch.tensor([own[len(own) * t // len(p)] for t in range(len(p))], dtype=torch.float64)
            s = s if is_shaped else torch.ones_like(s)
            found.append(-s * answer_log_probs(student, row) + (1 - s) * weight * (p.exp() * (p - p0)).sum(-1))
        if mean == "rows":
            return torch.stack([own.mean() for own in found]).mean().float()
        return torch.cat(found).mean().float()

    return loss


def write_guarded(path) -> str:
    path.write_text("".join(json.dumps({"guard": score}) + "\n" for score in guarded(60)))
    return str(path)


@pytest.mark.parametrize(("stage", "mean", "outputs"), [(1, "rows", "recorded"), (3, "tokens", "online")])
def test_star_shapes_each_token_by_the_guards_score(rank_pool, tmp_path, stage, mean, outputs):
    tiny_model().save_pretrained(tmp_path / "model")
    found = rank_pool(2).run(
        scenes.train,
        steps=STEPS,
        model={"path": str(tmp_path / "model"), "dtype": "fp32", "gradient_checkpointing": False},
        memory=None,
        methods={
            "star": {"scores": write_guarded(tmp_path / "s.jsonl"), "weight": 3.0, "k": VOCAB, "outputs": outputs}
        },
        train={"loss_mean": mean},
        deepspeed={"stage": stage},
        output=str(tmp_path),
    )[0]
    recorded = outputs == "recorded"
    assert error(found, *expected(shaped_by_a_guard(3.0, mean, recorded))) <= 1e-3
    assert error(found, *expected(shaped_by_a_guard(0.0, mean, recorded))) > 1e-2  # the divergence matters
    assert error(found, *expected(shaped_by_a_guard(3.0, mean, recorded, is_shaped=False))) > 1e-2  # and the scores


def test_scores_that_are_missing_or_not_usable_are_named_by_file_and_line(tmp_path):
    from safecl.methods.base import Score
    from safecl.planning.given_scores import given_scores

    path, rows = tmp_path / "s.jsonl", random_dataset(6, seed=1)
    score = Score("guard", of="given", column="guard", file=str(path))
    usable = [json.dumps({"guard": own}) for own in (0, 1.0, [0.5, 0.25], 0.1, 0.2, 0.3)]
    path.write_text("\n".join(usable))
    found = given_scores(score, rows)
    assert [len(own) for own in found] == rows.num_targets.tolist()
    half = -(-len(found[2]) // 2)
    assert found[2].tolist() == [0.5] * half + [0.25] * (len(found[2]) - half)
    for line, message in (
        ('{"guard": NaN}', "test.jsonl:4: the score .* is 'nan'; it must be a number from 0 to 1"),
        ('{"guard": 1.5}', "test.jsonl:4: the score .* is '1.5'"),
        ('{"guard": true}', "test.jsonl:4: the score .* is 'True'"),
        ('{"guard": []}', "test.jsonl:4: the score"),
        ('{"other": 1}', "test.jsonl:4: has no score `guard` in .*s.jsonl"),
        ("guard", "s.jsonl:4: is no JSON object"),
        ("4", "s.jsonl:4: is no JSON object with the key `guard`"),
    ):
        path.write_text("\n".join([*usable[:3], line, *usable[4:]]))
        with pytest.raises(ConfigError, match=message):
            given_scores(score, rows)
    path.write_text("\n".join(usable[:5]))
    with pytest.raises(ConfigError, match=r"test\.jsonl:6: has no score"):
        given_scores(score, rows)
    with pytest.raises(ConfigError, match=r"test\.jsonl:1: has no score `guard`"):
        given_scores(Score("guard", of="given", column="guard"), rows)


def test_a_file_of_scores_is_about_one_task():
    from safecl.methods.weighting.star import Config, Method
    from safecl.planning.given_scores import check_given_scores

    task = SimpleNamespace(config=SimpleNamespace(role="task"), dataset=random_dataset(2, seed=1))
    align = SimpleNamespace(config=SimpleNamespace(role="align"), dataset=random_dataset(2, seed=1))
    with pytest.raises(ConfigError, match=r"the file s.jsonl is about one task, and there are 2; .* column `safe`"):
        check_given_scores([Method("star", Config(scores="s.jsonl", column="safe"))], [task, task])
    check_given_scores([Method("star", Config())], [align])


def scores_of_other_rows(folder: str) -> str:
    from safecl.methods.base import Score
    from tests.engine.scenes import run_config

    config = run_config(memory=None, methods={"constrained_sft": {}}, output=folder)
    run, (task,) = scenes.make_run(config, tiny_model(), [random_dataset(20, seed=1)])
    run.begin_task(task, active=True)
    task.dataset = random_dataset(20, seed=2)
    try:
        run.row_scores.reopen(task, Score("answer"))
    except ConfigError as error:
        return str(error)
    return ""


def test_scores_of_other_rows_are_refused(rank_pool, tmp_path):
    assert "scores of other rows" in rank_pool(1).run(scores_of_other_rows, folder=str(tmp_path))[0]


def test_the_score_of_an_answer_is_its_mean_or_its_sum():
    from safecl.methods.weighting.antibody import Config, Method

    given = {
        "answer": [np.float32([-1, -1]), np.float32([-1, -1, -1]), np.float32([])],
        "refusal": [np.float32([-2])] * 3,
    }
    by_mean, by_sum = (Method("antibody", Config(length=way)).row_factors(given) for way in ("mean", "sum"))
    assert by_mean[0] == pytest.approx(by_mean[1]) and by_sum[0] == pytest.approx(np.e * by_sum[1])
    assert by_mean.sum() == pytest.approx(1.0) and np.isfinite(by_sum).all()


def passes_of_several_kinds(folder: str, **changes) -> list[dict]:
    """Losses of a run whose passes before training end in hidden states, in top-k outputs, and in both again."""
    from safecl.engine.teachers.outputs import outputs_of_rows
    from tests.engine.scenes import run_config

    config = run_config(memory=None, methods={"constrained_sft": {}}, output=folder, **changes)
    run, (task,) = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1)])
    kinds = [("hidden", {"tokens": "all"}), ("topk", {"k": 2, "temperature": 1.0})]
    for kind, settings in [*kinds, *kinds]:
        assert list(outputs_of_rows(run.engine, task.dataset, kind, **settings))
    run.begin_task(task, active=True)
    return [run.train_step(task).totals() for _ in range(2)]


def test_under_stage_3_passes_of_hidden_states_may_come_before_those_through_the_head(rank_pool, tmp_path):
    losses = rank_pool(1).run(passes_of_several_kinds, folder=str(tmp_path), deepspeed={"stage": 3})[0]
    assert all(np.isfinite(step["task"]) and step["nonfinite"] == 0 for step in losses)
