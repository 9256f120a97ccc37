"""Methods with gradients or steps of their own, against an independent loop in fp64.

The loop knows one rank; test_every_method.py proves that all layouts are that rank's run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from tests.engine.passes import oracle
from tests.engine.passes.test_equality import memory_of
from tests.methods import every_method, reference, scenes
from tests.methods.test_replay_methods import drawn, task_rows

STEPS, TOKENS = every_method.STEPS, 96
Weights = dict[str, torch.Tensor]


@dataclass
class Scene:
    """The model, the rows of each step, and the memory that `every_method.train` has."""

    model: torch.nn.Module = field(default_factory=lambda: scenes.undecided_model().double())

    def __post_init__(self):
        task, memory = scenes.conflicting_datasets()
        self.task, self.memory = task_rows(task, STEPS, TOKENS), memory_of(memory)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.teacher = copy.deepcopy(self.model)

    def draws(self, stream: str, share: float = 0.5, steps: int = STEPS):
        return drawn(self.memory, stream, steps, round(share * TOKENS))

    def draw(self, step: int, stream: str, share: float = 1.0):
        return [self.memory.get(key).row for key in self.memory.draw(step, round(share * TOKENS), stream)]

    def gradient(self, rows) -> Weights:
        return oracle.gradients(self.model, reference.mean_nll(self.model, rows))

    def nll(self, rows) -> float:
        with torch.no_grad():
            return float(reference.mean_nll(self.model, rows))

    def distance(self, rows) -> torch.Tensor:
        """KL of the aligned model's stored outputs and the model's, k = 8.

        The rounding of the stored outputs gives the direction of the first gradient, where both models are the same.
        """
        found = []
        for row in rows:
            with torch.no_grad():
                known = reference.log_probs(self.teacher, row, 1.0)
                best = known.topk(8, dim=-1)
                rest = known.scatter(-1, best.indices, float("-inf")).logsumexp(-1, keepdim=True)
                said = torch.cat([best.values.half().double(), rest.float().double()], -1)
            now = reference.log_probs(self.model, row, 1.0)
            others = now.scatter(-1, best.indices, float("-inf")).logsumexp(-1, keepdim=True)
            found.append((said.exp() * (said - torch.cat([now.gather(-1, best.indices), others], -1))).sum(-1))
        return torch.cat(found).mean()

    def move(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(change(name, p))

    def train(self, rows=None, **hooks) -> Weights:
        batches = self.task if rows is None else rows
        losses = [lambda batch=batch: reference.mean_nll(self.model, batch) for batch in batches]
        return reference.train(self.model, losses, **hooks)


def dot(a: Weights, b: Weights) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in b)


@pytest.fixture
def compare(rank_pool, tmp_path):
    """Compares a run with a method's settings with the expected weights."""

    def check(expected: Weights, start: Weights, stage: int = 3, others: dict | None = None, **methods) -> dict:
        found = rank_pool(2).run(
            every_method.train,
            method=None,
            folder=str(tmp_path),
            methods=methods,
            deepspeed={"stage": stage},
        )[0]
        assert oracle.relative_distance(found["state"]["weights"], expected, start) <= 1e-3
        for kind, state in (others or {}).items():
            assert oracle.relative_distance(found["state"][kind], state, start) <= 1e-3
        return found

    return check


# --------------------------------------------------------------------------------------------------------- projections


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 2])
def test_agem_on_the_step_leaves_no_step_against_the_memory_and_an_average_follows_it(compare, stage):
    scene, seen, cosines = Scene(), {}, []
    rows, average = scene.draws("agem"), dict(scene.start)

    def project(step: int, old: Weights) -> None:
        r, now = seen["r"], {name: p.detach().clone() for name, p in scene.model.named_parameters()}
        moved = {name: now[name] - old[name] for name in now}
        against = dot(moved, r)
        cosines.append(against)
        if against > 0:
            scene.move(lambda name, p: p - against / dot(r, r) * r[name])
        for name, p in scene.model.named_parameters():
            average[name] = 0.8 * average[name] + 0.2 * p.detach()

    end = scene.train(before=lambda step: seen.update(r=scene.gradient(rows[step])), after=project)
    assert sum(cosine > 0 for cosine in cosines) >= 2
    compare(end, scene.start, stage, {"ema": average}, agem={"project": "step"}, ema={"decay": 0.8})


@pytest.mark.long
def test_an_average_that_waits_for_the_step_is_that_of_the_pass(rank_pool, tmp_path):
    """Nothing is projected at a margin of -1, so both forms train the same weights and averages, masked or not."""
    for average in ({"ema": {"decay": 0.8}}, {"psmt": {"protected": 0.3, "decay": 0.8, **every_method.FISHER}}):
        waits, in_pass = (
            rank_pool(2).run(
                every_method.train,
                method=None,
                folder=str(tmp_path / f"{next(iter(average))}-{project}"),
                methods={"agem": {"project": project, "margin": -1.0}, **average},
                deepspeed={"stage": 2},
            )[0]
            for project in ("step", "gradient")
        )
        assert oracle.relative_distance(waits["state"]["ema"], in_pass["state"]["ema"], in_pass["start"]) <= 1e-5
        assert oracle.relative_distance(in_pass["state"]["ema"], in_pass["state"]["weights"], in_pass["start"]) > 0.1


def test_safe_grad_removes_the_conflict_and_adds_the_gradient_of_alignment(compare):
    scene, conflicts = Scene(), []
    rows = scene.draws("safe_grad")

    def surgery(step: int, user: Weights) -> Weights:
        aligned = oracle.gradients(scene.model, scene.distance(rows[step]))
        ua, aa = dot(user, aligned), dot(aligned, aligned)
        conflicts.append(ua < 0)
        return {n: g - min(0.0, ua / aa if aa else 0.0) * aligned[n] + 2.0 * aligned[n] for n, g in user.items()}

    end = scene.train(transform=surgery)
    assert sum(conflicts) >= 2
    compare(end, scene.start, safe_grad={"rho": 2.0})


@pytest.mark.parametrize("when", ["always", pytest.param("conflict", marks=pytest.mark.long)])
def test_ogpsa_projects_every_tensor_on_a_reference_that_is_renewed(compare, when):
    scene, seen, signs = Scene(), {}, set()

    def renew(step: int) -> None:
        if step % 2 == 0:
            seen["r"] = scene.gradient(scene.draw(step, "ogpsa"))

    def project(step: int, grads: Weights) -> Weights:
        r = seen["r"]
        factors = {n: float((g * r[n]).sum()) / (float((r[n] ** 2).sum()) + 1e-8) for n, g in grads.items()}
        signs.update(factor > 0 for factor in factors.values())
        return {n: g - (min(factors[n], 0.0) if when == "conflict" else factors[n]) * r[n] for n, g in grads.items()}

    end = scene.train(before=renew, transform=project)
    assert signs == {True, False}
    compare(end, scene.start, ogpsa={"every": 2, "when": when})


def test_spag_steps_back_by_the_capped_projection_where_the_memorys_loss_is_too_high(compare):
    scene, factors = Scene(), []
    rows = scene.draws("spag")
    tau, cap = scene.nll(rows[0]), 0.025

    def step_back(step: int, old: Weights) -> None:
        excess = scene.nll(rows[step]) - tau
        factors.append(0.0)
        if excess > 0:
            g = scene.gradient(rows[step])
            factors[-1] = min(excess / dot(g, g), cap)
            scene.move(lambda name, p: p - factors[-1] * g[name])

    end = scene.train(after=step_back)
    assert cap in factors and any(0 < factor < cap for factor in factors), factors
    compare(end, scene.start, spag={"tau": None, "eta": cap})


@pytest.mark.parametrize("mask", [pytest.param("gradient", marks=pytest.mark.long), "step"])
def test_mudman_moves_weights_only_where_the_signs_agree(compare, mask):
    scene, mean = Scene(), {}
    rows = scene.draws("mudman")

    def remember(step: int) -> None:
        for name, r in scene.gradient(rows[step]).items():
            mean[name] = 0.5 * mean.get(name, torch.zeros_like(r)) + 0.5 * r

    def masked(step: int, grads: Weights) -> Weights:
        return {n: g * (g.sign() == mean[n].sign()) for n, g in grads.items()}

    def undone(step: int, old: Weights) -> None:
        scene.move(lambda name, p: torch.where((old[name] - p).sign() == mean[name].sign(), p, old[name]))

    hooks = {"transform": masked} if mask == "gradient" else {"after": undone}
    compare(scene.train(before=remember, **hooks), scene.start, mudman={"momentum": 0.5, "mask": mask})


def test_osft_keeps_every_step_outside_of_the_largest_singular_values(compare):
    scene, low, high = Scene(), 0.2, 0.6
    layers = scene.model.model.layers
    cosines: list[list[torch.Tensor]] = [[] for _ in layers]
    for row in scene.draw(0, "osft"):
        states = scene.model(input_ids=reference.ids_of(row), use_cache=False, output_hidden_states=True).hidden_states
        chosen = torch.from_numpy(row.loss_mask[1:].copy())
        last = []
        hook = layers[-1].register_forward_hook(lambda m, i, out, last=last: last.append(out))
        scene.model(input_ids=reference.ids_of(row), use_cache=False)
        hook.remove()
        outputs = [*states[1:-1], last[0]]  # the last of the states is behind the final norm
        for number, (before, after) in enumerate(zip(states[:-1], outputs, strict=True)):
            cosine = torch.cosine_similarity(before[0, :-1][chosen], after.view_as(before)[0, :-1][chosen], dim=-1)
            cosines[number].append(cosine.detach())
    means = torch.stack([torch.cat(values).mean() for values in cosines])
    shares = (low + means / means.mean() * (high - low)).tolist()
    projections = {}
    for name, weight in scene.start.items():
        if ".layers." in name and weight.dim() == 2:
            rank = round(shares[int(name.split(".layers.")[1][0])] * min(weight.shape))
            u, _, vh = torch.linalg.svd(weight)
            projections[name] = (u[:, :rank] @ u[:, :rank].T, vh[:rank].T @ vh[:rank])

    def outside(step: int, old: Weights) -> None:
        def take(name: str, p: torch.Tensor) -> torch.Tensor:
            if name not in projections:
                return p
            left, right = projections[name]
            d = p - old[name]
            d = d - left @ d
            return old[name] + d - d @ right

        scene.move(take)

    end = scene.train(after=outside)
    found = compare(end, scene.start, osft={"low": low, "high": high})["state"]["weights"]
    name = "model.layers.1.mlp.up_proj.weight"
    moved = (found[name] - scene.start[name]).double()
    assert float((projections[name][0] @ moved).norm()) <= 1e-5 * float(moved.norm())


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


def test_refresh_goes_uphill_on_the_steps_rows_before_the_step(compare):
    scene = Scene()
    keys = scene.memory.keys()
    known = [scene.memory.get(key).row for key in keys]
    fisher = oracle.fisher(scene.model, known, keys, reference.SEED, **every_method.FISHER)
    mean = sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())

    def unlearn(step: int) -> None:
        g = scene.gradient(scene.task[step])
        scene.move(lambda name, p: p + 0.02 * p.norm() / g[name].norm() * g[name] / (1 + 0.1 * fisher[name] / mean))

    end = scene.train(before=unlearn)
    compare(end, scene.start, refresh={"delta": 0.02, "sigma": 0.0, "fisher_weight": 0.1, **every_method.FISHER})


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


@pytest.mark.parametrize("project", ["gradient", pytest.param("step", marks=pytest.mark.long)])
def test_safe_anchor_leaves_out_the_largest_eigenvectors_of_the_memorys_fisher(compare, project):
    scene = Scene()
    samples = [scene.gradient(scene.draw(0, f"safe_anchor_{number}", 0.25)) for number in range(4)]
    bases = {}
    for name in scene.start:
        rows = torch.stack([sample[name].flatten() for sample in samples])
        bases[name] = torch.linalg.svd(rows, full_matrices=False).Vh[:2]

    def left(name: str, value: torch.Tensor) -> torch.Tensor:
        flat = value.flatten()
        return (flat - bases[name].T @ (bases[name] @ flat)).view_as(value)

    def outside(step: int, grads: Weights) -> Weights:
        return {name: left(name, g) for name, g in grads.items()}

    def taken_back(step: int, old: Weights) -> None:
        scene.move(lambda name, p: old[name] + left(name, p - old[name]))

    end = scene.train(**({"transform": outside} if project == "gradient" else {"after": taken_back}))
    found = compare(end, scene.start, safe_anchor={"rank": 2, "samples": 4, "project": project})
    assert {"safe_anchor_0", "safe_anchor_1"} <= found["state"].keys()


def test_safe_anchor_says_that_samples_span_the_subspace():
    from safecl.methods.projections.safe_anchor import Config

    with pytest.raises(ValueError, match=r"samples \(4\) span at most as many dimensions; rank is 8"):
        Config(samples=4)
