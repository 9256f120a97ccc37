"""Scenes of test_equality: the shape of steps, steps with a deliberate mistake, and plain loops in bf16."""

from __future__ import annotations

import numpy as np
import torch

from tests.engine.scenes import (
    make_run,
    random_dataset,
    run_config,
    tiny_model,
    train_to_state,
)


def shape_of_steps(steps: int, **changes) -> list[dict]:
    """This rank's micro-batches, replay targets and gradient norm, by step."""
    from safecl.engine.passes.micro_batches import micro_batches

    run, task = make_run(run_config(**changes))
    shapes = []
    for _ in range(steps):
        rows = run.step_rows(task)
        batches = micro_batches(rows, ["task", "replay"], run.engine.layout, run.engine.rank)
        run.train_step(task)
        norm = float(run.engine.optimizer.result.grad_norm)
        replay = sum(int((batch.terms == 1).sum()) for batch in batches)
        shapes.append({"micro_batches": len(batches), "replay_targets": replay, "grad_norm": norm})
    return shapes


def train_broken(mutation: str, **arguments):
    """train_to_state with one deliberate mistake in the engine."""
    from unittest import mock

    from safecl.engine.passes import micro_batches, training_engine
    from safecl.engine.zero import update

    adamw, accumulate, build = update.adamw_step_, training_engine.fisher_accumulate_, micro_batches._build

    def without_ema(*tensors, ema=None, ema_decay=None, **options):
        return adamw(*tensors, **options)

    def pushing_away(param, grad, exp_avg, exp_avg_sq, *, anchor=None, **options):
        mirrored = None if anchor is None else 2 * param - anchor
        return adamw(param, grad, exp_avg, exp_avg_sq, anchor=mirrored, **options)

    def without_clip(*tensors, clip_coef=None, **options):
        return adamw(*tensors, **options)

    def mean_per_micro_batch(*arguments):
        built = build(*arguments)
        weights = built.inputs["ce_weights"]
        weights[weights > 0] /= max(1, int((weights > 0).sum())) / 40
        return built

    patches = {
        "ema_no_op": mock.patch.object(update, "adamw_step_", without_ema),
        "penalty_sign": mock.patch.object(update, "adamw_step_", pushing_away),
        "fisher_doubled": mock.patch.object(
            training_engine, "fisher_accumulate_", lambda f, g, w: accumulate(f, g, 2 * w)
        ),
        "clip_off": mock.patch.object(update, "adamw_step_", without_clip),
        "normaliser_per_micro_batch": mock.patch.object(micro_batches, "_build", mean_per_micro_batch),
    }
    with patches[mutation]:
        return train_to_state(**arguments)


def bf16_reference(steps: int, ema_decay: float, lr: float = 1e-2, eps: float = 1e-4):
    """Plain PyTorch in bf16 with fp32 masters, over the same packed micro-batches and the same head."""
    from safecl.data import TaskOrder, collate
    from safecl.kernels import adamw_step_, linear_distill_loss

    config = run_config()
    model = tiny_model(dtype=torch.bfloat16).train()
    data = random_dataset(60, seed=1)
    order = TaskOrder(data, seed=config.train.seed, tokens_per_batch=160, max_steps=steps)
    params = dict(model.named_parameters())
    master = {name: p.detach().float().clone() for name, p in params.items()}
    ema = {name: p.clone() for name, p in master.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in master.items()}
    for step in range(1, steps + 1):
        rows = data.rows(order.rows_of_step(step - 1))
        batch = collate(rows, packed=True, pad_id=0)
        positions = (batch.targets != -100).nonzero().flatten()
        hidden = model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state.flatten(0, 1)
        weight = torch.full((len(positions),), 1.0 / len(positions))
        loss = linear_distill_loss(
            hidden[positions], model.lm_head.weight, labels=batch.targets[positions], ce_weights=weight
        ).loss
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in params.items():
                adamw_step_(
                    master[name],
                    p.grad.float(),
                    *moments[name],
                    step=step,
                    lr=lr,
                    betas=(0.9, 0.999),
                    eps=eps,
                    weight_decay=0.0,
                    ema=ema[name],
                    ema_decay=ema_decay,
                )
                p.copy_(master[name])
    return {"weights": master, "ema": ema}


def bf16_gradient(**changes) -> dict[str, torch.Tensor]:
    """The reduced gradient of the first step's long rows, each a micro-batch of its own, by parameter name."""
    run, task = make_run(run_config(**changes), tiny_model(dtype=torch.bfloat16))
    run.engine.gradient_pass([row for row in run.step_rows(task) if row.length > 12], run.engine.stash("seen"))
    shards = run.engine.shards
    return {name: shards.read(name, run.engine.optimizer.tensors("seen")) for name in shards.shapes}


def summed_bf16_gradients() -> dict[str, torch.Tensor]:
    """fp32 sum of each long row's own bf16 gradient, in plain PyTorch, with the weights of the step's mean."""
    from safecl.data import TaskOrder
    from safecl.kernels import linear_distill_loss

    data = random_dataset(60, seed=1)
    rows = data.rows(TaskOrder(data, seed=3, tokens_per_batch=160, max_steps=10).rows_of_step(0))
    model = tiny_model(dtype=torch.bfloat16)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    count = sum(row.num_targets for row in rows)
    for row in (row for row in rows if len(row) > 12):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        mask = torch.from_numpy(row.loss_mask[1:].copy())
        weights = torch.full((int(mask.sum()),), 2.0 / count)  # times the two ranks, as DeepSpeed's mean expects
        loss = linear_distill_loss(hidden[mask], model.lm_head.weight, labels=ids[0, 1:][mask], ce_weights=weights).loss
        for (name, _), grad in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total[name] += grad.float() / 2
    return total
