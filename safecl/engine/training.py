"""The DeepSpeed engine with its shard optimizer: one forward and backward over a global step's rows, and what happens with the gradient.

Every gradient goes through one primitive, `gradient_pass(rows, then=...)`, right in every ZeRO stage: there is one backward per micro-batch
(two would overwrite each other on ZeRO-1 and 2, and add on ZeRO-3), and `then` says what the optimizer does with the reduced gradient:

  update(plan)               an ordinary AdamW step
  stash(kind)                keep the gradient as state `kind`, weights stay
  perturb(rho)               weights += rho * g / ||g||, after saving them
  restore(then)              saved weights back, then `then` with this gradient
  accumulate_fisher(...)     fisher += weight * g^2, weights stay
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from safecl.config import RunConfig
from safecl.engine import distributed
from safecl.engine.batch import Layout, StepRow, micro_batches, to_device
from safecl.engine.deepspeed_config import deepspeed_config
from safecl.engine.model import LanguageModel
from safecl.engine.optimizer import Shard, ShardAdamW, UpdateResult
from safecl.engine.shards import ShardMap
from safecl.kernels import fisher_accumulate_

Action = Callable[[list[Shard]], None]


class NonFiniteGradient(RuntimeError):
    """A pass whose gradient was not finite and that must not be skipped silently."""


class TrainingEngine:
    """A model under DeepSpeed, its flat shards and its optimizer. All methods are collective calls."""

    def __init__(self, model: LanguageModel, config: RunConfig, layout: Layout):
        import deepspeed

        train = config.train
        self.layout = layout
        self.rank = distributed.rank()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = ShardAdamW(trained, lr=train.learning_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay)
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=deepspeed_config(config))
        self.shards = ShardMap(self.deepspeed, prefix="model.")
        self.optimizer.bind(self.shards)
        self.device = self.deepspeed.device

    @property
    def module(self) -> LanguageModel:
        return self.deepspeed.module

    # ------------------------------------------------------------------------------------------------------------- passes

    def gradient_pass(
        self, rows: Sequence[StepRow], then: Action, terms: Sequence[str] | None = None, temperature: float = 1.0
    ) -> StepLosses:
        """One forward and backward over `rows` (the whole global step, the same list on every rank), then `then` on the reduced gradient.

        `terms` orders the losses that are returned; by default the rows' own terms in order of appearance.
        """
        terms = list(terms or dict.fromkeys(row.term for row in rows))
        self.deepspeed.train()
        losses = self._forward_backward(rows, terms, temperature)
        self.optimizer.result = UpdateResult()
        self.optimizer.action = then
        try:
            self.deepspeed.step()
        finally:
            self.optimizer.action = None  # still set where DeepSpeed found a non-finite gradient and did not call the optimizer
        if self.optimizer.result.penalty is not None:
            losses.penalty = self.optimizer.result.penalty / (self.layout.world_size if self.shards.replicated else 1)
        return losses

    def _forward_backward(self, rows: Sequence[StepRow], terms: list[str], temperature: float) -> StepLosses:
        losses = StepLosses(terms, self.device, self.layout.world_size)
        batches = micro_batches(rows, terms, self.layout, self.rank, temperature)
        for index, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            output = self.deepspeed(task="loss", **to_device(batch.inputs, self.device))
            # A new tensor: DeepSpeed divides the gradient of the very tensor that forward returned by its accumulation steps.
            self.deepspeed.backward(output["loss"] * 1.0, scale_wrt_gas=False)
            losses.add(batch, output)
        return losses

    def update(self, plan) -> Action:
        return self.optimizer.update(plan)

    def stash(self, kind: str) -> Action:
        """Keeps the gradient as the state `kind`."""

        def action(shards: list[Shard]) -> None:
            for shard in shards:
                shard.state[kind] = shard.grad.detach().clone()
            self.optimizer.result.applied = True

        return action

    def perturb(self, rho: float) -> Action:
        """weights += rho * g / ||g||; `restore` undoes it exactly (sharpness-aware minimisation, arXiv 2010.01412)."""

        def action(shards: list[Shard]) -> None:
            norm = self.optimizer.grad_norm(shards)
            self.optimizer.copy_weights_to("unperturbed")
            for shard in shards:
                shard.param.add_(shard.grad * (rho / norm.clamp_min(1e-12)).to(shard.param.device))
            self.optimizer.result.applied = True

        return action

    def restore(self, then: Action) -> Action:
        """Weights as before `perturb`, then `then` with the gradient taken at the perturbed weights."""

        def action(shards: list[Shard]) -> None:
            for shard in shards:
                shard.param.copy_(shard.state.pop("unperturbed"))
            then(shards)

        return action

    def accumulate_fisher(self, kind: str, weight: float) -> Action:
        """state[kind] += weight * g^2."""

        def action(shards: list[Shard]) -> None:
            for shard in shards:
                fisher_accumulate_(shard.state[kind], shard.grad, weight)
            self.optimizer.result.applied = True

        return action

    def dot(self, shards: list[Shard], a: Callable[[Shard], torch.Tensor], b: Callable[[Shard], torch.Tensor]) -> torch.Tensor:
        """Global dot product of two flat quantities, 0-dim fp64, by one small all-reduce."""
        local = sum((a(s).double().flatten() @ b(s).double().flatten() for s in shards), torch.zeros((), dtype=torch.float64))
        return self.shards.reduce_sum(local)

    def dots_per_tensor(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> dict[str, float]:
        """Dot product of two quantities (in the layout of the flats) for every parameter, by one all-reduce of one number each."""
        names = list(self.shards.shapes)
        local = torch.zeros(len(names), dtype=torch.float64)
        for fragment in self.shards.fragments:
            local[names.index(fragment.name)] += (self.shards.view(fragment, a).double() @ self.shards.view(fragment, b).double()).cpu()
        return dict(zip(names, self.shards.reduce_sum(local).tolist(), strict=True))

    # -------------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def logits(self, input_ids, attention_mask, position_ids, past=None, use_cache=False, last_only=False) -> torch.Tensor:
        """The live model's logits. With ZeRO-3 every rank must call it equally often."""
        output = self.deepspeed(
            task="logits", input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past=past, use_cache=use_cache,
            last_only=last_only,
        )  # fmt: skip
        return output["logits"]


class StepLosses:
    """Losses of one pass: sums over this rank's micro-batches; `totals` adds the ranks up, the only collective that logging costs."""

    def __init__(self, terms: list[str], device: torch.device, world_size: int):
        self.terms = terms
        self.world_size = world_size
        self.penalty = torch.zeros(())
        """This rank's part of the weight penalty."""
        self.num_tokens = 0
        """Tokens that went through the model on this rank."""
        self._sums = torch.zeros(len(terms), dtype=torch.float64, device=device)

    def add(self, batch, output: dict[str, torch.Tensor]) -> None:
        """Weighted per-token losses of one micro-batch; the weights already hold 1 / N_term and the world size."""
        weights = batch.inputs["ce_weights"].to(self._sums.device)
        terms = batch.terms.to(self._sums.device)
        self._sums.index_add_(0, terms, (output["ce"].double() * weights) / self.world_size)
        for index, distillation in enumerate(batch.inputs["distillations"]):
            weights = distillation["kd_weights"].to(self._sums.device)
            self._sums.index_add_(0, terms, (output[f"kd{index}"].double() * weights) / self.world_size)
        self.num_tokens += batch.num_tokens

    def totals(self) -> dict[str, float]:
        """Loss of each term over the whole global step, coefficients included, then `penalty` and `tokens`: a collective call."""
        extra = torch.tensor([float(self.penalty), self.num_tokens], dtype=torch.float64, device=self._sums.device)
        sums = distributed.all_reduce_sum(torch.cat([self._sums, extra]))
        return dict(zip([*self.terms, "penalty", "tokens"], sums.tolist(), strict=True))
