"""Steps and phases on the memory, and weights and hidden states that are moved, against an independent loop in
fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safecl.data.order import keyed_hash
from tests.engine.passes import oracle
from tests.methods import every_method, reference
from tests.methods.fp64_scene import STEPS, Scene, Weights, dot

# ------------------------------------------------------------------------------------- steps and phases on the memory


def test_lisa_alternates_and_pulls_to_the_end_of_the_other_phase(compare):
    scene, anchors = Scene(), {}
    memory = scene.draws("lisa", share=1.0)
    rows = [memory[step] if step % 2 == 0 else scene.task[step] for step in range(STEPS)]
    anchors.update(memory=scene.start, task=scene.start, pulled=None)

    def switch(step: int) -> None:
        here = {name: p.detach().clone() for name, p in scene.model.named_parameters()}
        on_memory = step % 2 == 0
        if step > 0:
            anchors["task" if on_memory else "memory"] = here
        anchors["pulled"] = (anchors["task"] if on_memory else anchors["memory"]) if step >= 0.1 * STEPS else None

    def pull(params: Weights) -> Weights:
        return {n: 3.0 * (p - anchors["pulled"][n]) for n, p in params.items()} if anchors["pulled"] else {}

    end = scene.train(rows, before=switch, pull=pull)
    compare(end, scene.start, lisa={"cycle": 2, "share": 0.5, "rho": 3.0})


def test_lisa_takes_the_papers_cycle_or_a_tenth_of_a_short_task():
    from safecl.methods.rehearsal.lisa import Config

    def on_memory(num_steps: int, **settings) -> list[int]:
        return [step for step in range(num_steps) if Config(**settings).is_on_memory(step, num_steps)]

    assert on_memory(20_000)[:101] == [*range(100), 1000]
    assert on_memory(100) == list(range(0, 100, 10))
    assert on_memory(60, share=0.2, cycle=10)[:4] == [0, 1, 10, 11]
    assert on_memory(5) == [0, 2, 4]


def corrected(scene: Scene, name: str, at: int, mix: float) -> None:
    """Two steps of a burst at the weights that there are, with moments of their own."""
    losses = []
    for number in range(2):
        memory = scene.draw(at, f"corrective_replay {name} {number}")
        task = scene.task[(STEPS - 1 - number) % STEPS]
        losses.append(
            lambda memory=memory, task=task: (
                reference.mean_nll(scene.model, memory) + mix * reference.mean_nll(scene.model, task)
            )
        )
    reference.train(scene.model, losses)


def test_corrective_replay_trains_the_memory_at_the_end_and_corrects_the_average(compare):
    scene = Scene()
    average = dict(scene.start)

    def follow(step: int, old: Weights) -> None:
        for name, p in scene.model.named_parameters():
            average[name] = 0.8 * average[name] + 0.2 * p.detach()

    scene.train(after=follow)
    scene.move(lambda name, p: average[name])
    corrected(scene, "end", STEPS, mix=0.5)
    end = {name: p.detach() for name, p in scene.model.named_parameters()}
    found = compare(end, scene.start, 2, {"ema": end}, corrective_replay={"steps": 2, "mix": 0.5}, ema={"decay": 0.8})
    assert "exp_avg" not in found["state"], "AdamW starts afresh after a burst"


def test_corrective_replay_acts_when_the_memorys_loss_has_risen(compare):
    """The burst comes after step 1; AdamW then starts afresh."""
    scene = Scene()
    rows = scene.draws("corrective_replay")
    before = scene.nll(rows[0])
    parts = scene.task[:2], scene.task[2:]
    scene.train(parts[0])
    assert scene.nll(rows[1]) > 1.01 * before
    corrected(scene, "1", 1, mix=0.0)
    end = scene.train(parts[1])
    compare(end, scene.start, corrective_replay={"steps": 2, "at_end": False, "every": 2, "limit": 1.01})


# ---------------------------------------------------------------------------------------------------------- refreshing


def normal_draw(step: int, name: str, size: torch.Size) -> torch.Tensor:
    """The noise of a tensor in a step: the Box-Muller transform of the two halves of each element's hash."""
    bits = keyed_hash(np.arange(size.numel(), dtype=np.uint64), reference.SEED, step, "refresh", name)
    first, second = bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)
    normal = np.sqrt(-2 * np.log((first + 0.5) / 2**32)) * np.cos(2 * np.pi * second / 2**32)
    return torch.from_numpy(normal).view(size)


def test_refresh_goes_uphill_on_the_steps_rows_before_the_step(compare):
    scene = Scene()
    keys = scene.memory.keys()
    known = [scene.memory.get(key).row for key in keys]
    fisher = oracle.fisher(scene.model, known, keys, reference.SEED, **every_method.FISHER)
    mean = sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())

    def unlearn(step: int) -> None:
        g = scene.gradient(scene.task[step])

        def moved(name: str, p: torch.Tensor) -> torch.Tensor:
            uphill = p.norm() / g[name].norm() * g[name] + 0.5 * normal_draw(step, name, p.shape)
            return p + 0.02 * uphill / (1 + 0.1 * fisher[name] / mean)

        scene.move(moved)

    end = scene.train(before=unlearn)
    compare(end, scene.start, refresh={"delta": 0.02, "sigma": 0.5, "fisher_weight": 0.1, **every_method.FISHER})


def test_a_step_that_begins_at_moved_weights_updates_the_old_ones_with_the_gradient_there(compare):
    scene = Scene()

    def at_the_worst_point(step: int, grads: Weights) -> Weights:
        before = {name: p.detach().clone() for name, p in scene.model.named_parameters()}
        scene.move(lambda name, p: p + 0.3 / dot(grads, grads) ** 0.5 * grads[name])
        there = scene.gradient(scene.task[step])
        scene.move(lambda name, p: before[name])
        return there

    end = scene.train(transform=at_the_worst_point)
    assert oracle.relative_distance(end, Scene().train(), scene.start) > 0.02
    compare(end, scene.start, **{"tests.methods.sharpness_aware": {"rho": 0.3}})


# ------------------------------------------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("checkpointed", [pytest.param(False, marks=pytest.mark.long), True])
def test_vaccine_takes_its_step_where_attention_outputs_have_moved_the_worst_way(rank_pool, tmp_path, checkpointed):
    scene, rho = Scene(), 20.0
    layers = [layer.self_attn for layer in scene.model.model.layers]

    def at_the_worst_point(step: int, grads: Weights) -> Weights:
        outputs: list[torch.Tensor] = []  # in the order of rows and layers, as in every pass
        hooks = [layer.register_forward_hook(lambda m, i, out: outputs.append(out[0])) for layer in layers]
        loss = reference.mean_nll(scene.model, scene.task[step])
        gradients = torch.autograd.grad(loss, outputs)
        norm = torch.stack([(g**2).sum() for g in gradients]).sum().sqrt()
        moves = iter([rho * g / norm for g in gradients])
        for hook in hooks:
            hook.remove()
        hooks = [layer.register_forward_hook(lambda m, i, out: (out[0] + next(moves), *out[1:])) for layer in layers]
        found = scene.gradient(scene.task[step])
        for hook in hooks:
            hook.remove()
        assert oracle.relative_distance(found, grads) > 0.05
        return found

    end = scene.train(transform=at_the_worst_point)
    found = rank_pool(2).run(
        every_method.train,
        method="vaccine",
        folder=str(tmp_path),
        model={"gradient_checkpointing": checkpointed},
        deepspeed={"stage": 3},
    )[0]
    assert oracle.relative_distance(found["state"]["weights"], end, scene.start) <= 1e-3


def test_a_method_for_the_alignment_stage_needs_one(tmp_path):
    from safecl.config import ConfigError

    with pytest.raises((ConfigError, ValueError), match="vaccine acts on the alignment stage; make the first task one"):
        every_method.config_of("vaccine", str(tmp_path), tasks=[{"name": "t", "train": "unused"}])


def noise_of_every_tensor(stage: int) -> Weights:
    from tests.engine.scenes import make_run, run_config

    run, _ = make_run(run_config(memory=None, deepspeed={"stage": stage}))
    values = run.engine.optimizer.new_state("noise")
    shards = run.view.shards()
    for part in run.view.parts(shards):
        part.shard.state["noise"].view(-1)[part.where] = run.view.noise(part, "test")
    return {name: run.engine.shards.read(name, values) for name in run.engine.shards.shapes}


def test_noise_is_normal_and_the_same_in_every_layout(rank_pool):
    one = rank_pool(1).run(noise_of_every_tensor, stage=0)[0]
    for stage in (2, 3):
        other = rank_pool(2).run(noise_of_every_tensor, stage=stage)[0]
        assert all(torch.equal(one[name], other[name]) for name in one), stage
    values = torch.cat([value.flatten() for value in one.values()]).double()
    assert abs(float(values.mean())) < 0.03 and abs(float(values.var()) - 1) < 0.05
    assert abs(float((values**4).mean()) - 3) < 0.3 and values.unique().numel() > 0.999 * values.numel()
