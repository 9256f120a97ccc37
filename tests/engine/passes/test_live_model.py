"""Under ZeRO-3 an evaluation gathers the weights once, where they fit, and not once per token; answers and training
stay the same."""

from __future__ import annotations

import pytest

from tests.engine import scenes


def answers_and_gathers(num_tokens: int, fits: bool, stage: int) -> dict:
    """Answers of two prompts, the number of all-gathers on the way, and the weights after one more step."""
    from unittest import mock

    import torch
    from torch.profiler import ProfilerActivity, profile

    from safecl.engine.passes import live_model
    from safecl.evaluation.answers.generate import generate_greedy

    run, task = scenes.make_run(
        scenes.run_config(memory=None, methods={"ema": {"decay": 0.9}}, deepspeed={"stage": stage})
    )
    run.train_step(task)
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    with mock.patch.object(live_model, "SHARE_FOR_WEIGHTS", 1e9 if fits else 0.0):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            with live_model.evaluating(run.engine, average=True, many_passes=True) as model:
                options = dict(max_new_tokens=num_tokens, eos_ids=(), pad_id=0, batch_size=2)
                answers = generate_greedy(model, prompts, **options)
    gathers = sum("allgather" in event.name for event in seen.events() if event.name.startswith("c10d::"))
    run.train_step(task)
    weights = torch.cat([value.view(-1) for value in scenes.state_of(run)["weights"].values()])
    return {"answers": answers, "gathers": gathers, "weights": weights}


@pytest.mark.parametrize("stage", [3])
def test_weights_are_gathered_once_per_evaluation_where_they_fit(rank_pool, stage):
    (few, *_), (many, *_), (each, *_) = (
        rank_pool(2).run(answers_and_gathers, num_tokens=tokens, fits=fits, stage=stage)
        for tokens, fits in ((2, True), (10, True), (10, False))
    )
    assert few["gathers"] == many["gathers"] < each["gathers"]
    assert many["answers"] == each["answers"] and [a[:2] for a in many["answers"]] == few["answers"]
    assert (many["weights"] == each["weights"]).all()
