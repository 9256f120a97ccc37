"""Under ZeRO-3 an evaluation gathers the weights once, where they fit, or each layer once per token of all prompts;
answers and training stay the same."""

from __future__ import annotations

import pytest

from tests.engine import scenes

PROMPTS = {0: 5, 1: 4}
"""Prompts of each rank."""


def answers_and_gathers(num_tokens: int, evaluation: str, free: int | None = None) -> dict:
    """The answers of this rank's prompts, two of which make a batch; how often each matrix was gathered on the way; and
    the weights after one more step. free: bytes that the device has left."""
    from unittest import mock

    import torch

    from safecl.engine.passes import live_model
    from safecl.evaluation.answers.generate import generate_greedy

    torch.manual_seed(11)
    sharding = {"stage": 3, "evaluation": evaluation}
    run, task = scenes.make_run(scenes.run_config(memory=None, methods={"ema": {"decay": 0.9}}, deepspeed=sharding))
    for p in run.engine.module.parameters():
        p.ds_persist = False  # DeepSpeed keeps small parameters gathered
    run.engine.deepspeed.optimizer.persistent_parameters = []
    run.train_step(task)
    prompts = [[3 + i, 4, 5, *range(6, 6 + 2 * i)] for i in range(PROMPTS[run.engine.rank])]
    free_bytes = live_model.free_bytes if free is None else lambda device: free
    with mock.patch.object(live_model, "free_bytes", free_bytes), counting(run.engine.module) as gathers:
        with live_model.evaluating(run.engine, average=True, many_passes=True) as model:
            options = dict(max_new_tokens=num_tokens, eos_ids=(), pad_id=0, batch_size=2)
            answers = generate_greedy(model, prompts, **options)
    run.train_step(task)
    weights = torch.cat([value.view(-1) for value in scenes.state_of(run)["weights"].values()])
    return {"answers": answers, "gathers": sorted(set(gathers())), "weights": weights}


class counting:
    """Counts how often each matrix of the decoder's layers is gathered inside the block."""

    def __init__(self, module):
        self.originals = [(p, p.all_gather, p.all_gather_coalesced) for p in module.parameters()]
        self.counts = {id(p): 0 for name, p in module.named_parameters() if "layers." in name and "_proj" in name}

    def __enter__(self):
        for p, one, several in self.originals:
            p.all_gather, p.all_gather_coalesced = self.counted(one, p), self.counted(several, p)
        return self.counts.values

    def __exit__(self, *error: object) -> None:
        for p, one, several in self.originals:
            p.all_gather, p.all_gather_coalesced = one, several

    def counted(self, gather, own):
        def counted(parameters=None, *arguments, param_list=None, **options):
            asked = list(param_list or parameters or [own])
            for p in asked:
                if id(p) in self.counts:
                    self.counts[id(p)] += 1
            named = {"param_list": param_list} if param_list is not None else {}
            return gather(*(() if param_list is not None else (parameters,)), *arguments, **named, **options)

        return counted


def test_weights_are_gathered_once_per_evaluation_or_once_per_token_of_all_prompts(rank_pool):
    tokens = 6
    found = {
        name: rank_pool(2).run(answers_and_gathers, num_tokens=tokens, **options)
        for name, options in {
            "whole": {"evaluation": "whole"},
            "fits": {"evaluation": "auto", "free": 10**9},
            "streamed": {"evaluation": "streamed"},
            "does not fit": {"evaluation": "auto", "free": 10},
        }.items()
    }
    for rank, num_prompts in PROMPTS.items():
        one = {name: ranks[rank] for name, ranks in found.items()}
        assert one["whole"]["gathers"] == one["fits"]["gathers"] == [1]
        # DeepSpeed gathers ahead in the order of a training step, until a pass takes another.
        assert one["streamed"]["gathers"] == [tokens + 1]
        assert one["does not fit"]["gathers"] == [3 * tokens + 1]  # no room for more than a batch of two
        assert all(len(answers) == tokens for answers in one["whole"]["answers"])
        assert len(one["whole"]["answers"]) == num_prompts and len({*map(tuple, one["whole"]["answers"])}) > 1
        for name in ("fits", "streamed", "does not fit"):
            assert one[name]["answers"] == one["whole"]["answers"], name
            assert (one[name]["weights"] == one["whole"]["weights"]).all()


def test_a_row_takes_no_more_than_its_bound():
    """The count of a real pass, in fake mode, for several shapes and models."""
    from safecl.engine.passes.live_model import bytes_of_a_row
    from safecl.planning.costs.inference import inference_bytes
    from safecl.planning.passes import Inference

    for family in ("llama", "qwen", "gemma"):
        config = scenes.run_config()
        settings = scenes.tiny_model(family=family).config
        for width, new in ((8, 4), (64, 8), (20, 100)):
            rows = [inference_bytes(settings, config.model, Inference(count, width, new)) for count in (8, 24)]
            assert (rows[1] - rows[0]) / 16 <= bytes_of_a_row(settings, width, new, 4), (family, width, new)


@pytest.mark.parametrize(("room", "expected"), [(10**9, "whole"), (10**4, "streamed"), (None, "streamed")])
def test_the_plan_says_where_the_weights_are(room, expected):
    from safecl.planning.costs.device_memory import plan_memory
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.planned_model import PlannedModel
    from safecl.planning.passes import Inference, Passes

    config = scenes.run_config(deepspeed={"stage": 3})
    shape = ModelShape.of(PlannedModel.of(scenes.tiny_model()), config, Passes((2, 32), generated=Inference(2, 8, 4)))
    plan = plan_memory(shape, config, 2, room=room)
    assert plan.evaluation == expected
    (gathered,) = [i.nbytes for i in plan.items if i.what == "gathered weights" and i.moment == "evaluation"]
    assert gathered == 4 * shape.weights  # the tiny model is no larger than what stage 3 keeps gathered
    forced = scenes.run_config(deepspeed={"stage": 3, "evaluation": "streamed"})
    assert plan_memory(shape, forced, 2, room=10**9).evaluation == "streamed"
    assert plan_memory(shape, scenes.run_config(deepspeed={"stage": 2}), 2, room=10**9).evaluation is None
    assert plan_memory(shape, config, 1, room=10**9).evaluation is None
