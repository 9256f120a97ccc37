"""The training engine: one forward and backward pass over a global step's rows, and an action on the gradient.

Every gradient comes from one primitive, `gradient_pass(rows, then=...)`, which is right in every ZeRO stage. It makes
one backward per micro-batch: two would overwrite each other under ZeRO-1 and 2, and add up under ZeRO-3. `then` is what
the optimizer does with the reduced gradient:

  update(plan)               an ordinary AdamW step
  stash(kind)                keep the gradient as state `kind`; weights stay
  perturb(rho)               weights += rho * g / ||g||, after saving them
  restore(then)              put the saved weights back, then `then` with this gradient
  accumulate_fisher(...)     fisher += weight * g^2; weights stay

`moved_hidden_pass` moves hidden states instead of weights. `perturb_along` moves the weights along a gradient that was
stashed before; `put_back` undoes it. `loss_pass` makes a forward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from safecl.config import RunConfig
from safecl.distributed import collectives, progress
from safecl.engine.model.adapter_penalty import AdapterPenalty
from safecl.engine.model.dropout import dropout_off
from safecl.engine.model.frozen import freeze
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.passes.engine import ModelEngine
from safecl.engine.passes.hidden_moves import HiddenMoves
from safecl.engine.passes.layer_similarity import LayerSimilarity
from safecl.engine.passes.micro_batches import MicroBatchLayout, StepBatch, micro_batches, to_device
from safecl.engine.passes.step_losses import ADAPTERS, StepLosses
from safecl.engine.passes.step_rows import StepRow, terms_of
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.zero import tensor_parts
from safecl.engine.zero.deepspeed_config import deepspeed_config
from safecl.engine.zero.optimizer import ShardAdamW
from safecl.engine.zero.shard import Action, Shard
from safecl.engine.zero.shards import ShardMap, UnshardedFp32Gradients, initialize, reads_parameter
from safecl.engine.zero.state_placement import placement_of
from safecl.engine.zero.update import UpdatePlan, UpdateResult
from safecl.kernels import fisher_accumulate_
from safecl.methods import context
from safecl.methods.terms import HiddenMove
from safecl.replay import pinned

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

UNPERTURBED = "_unperturbed"
"""State that holds the weights while they are perturbed."""


def _leave(shards: list[Shard]) -> None:
    """The action of a pass whose gradient of the weights is not used."""


class NonFiniteGradient(RuntimeError):
    """A pass whose gradient was not finite, where the caller cannot skip it."""


class TrainingEngine(ModelEngine):
    """A model under DeepSpeed, its flat shards and its optimizer. All methods are collective calls."""

    deepspeed: DeepSpeedEngine

    def __init__(
        self,
        model: LanguageModel,
        config: RunConfig,
        layout: MicroBatchLayout,
        store: ReferenceStore | None = None,
        *,
        keep_store: bool = True,
    ):
        """`store`: the store whose memory the model's weights are views of (safecl.engine.reference.loading).

        Without `keep_store` (see needs_reference) it is closed as soon as no weight is a view any more.
        """
        train = config.train
        self.layout, self.store = layout, store
        self.rank, self.stage, self.evaluation = collectives.rank(), config.deepspeed.stage, config.deepspeed.evaluation
        freeze(model.model, config)
        model.zero_grad(set_to_none=True)  # a gradient that a caller left behind would join the first step
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = ShardAdamW(
            trained, lr=train.learning_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        viewed = [p for p in model.parameters() if store is not None and store.holds(p)]
        if config.deepspeed.stage == 0:  # the other stages copy the trained weights into flat tensors
            for p in viewed:
                p.data = p.data.clone() if p.requires_grad else p.data
        self.optimizer.placement, self.optimizer.store = placement_of(config), store
        release = (lambda: None) if keep_store else self.release_store
        self.deepspeed_config = deepspeed_config(config, sum(p.numel() for p in trained))
        self.deepspeed = initialize(
            model, self.optimizer, self.deepspeed_config, viewed=viewed, when_partitioned=release
        )
        self.module = self.deepspeed.module
        if model.fused:
            reads_parameter(self.deepspeed, self.module, self.module.head.weight)
        release()  # stages 0 to 2
        self.shards = ShardMap(self.deepspeed, prefix="model.")
        self.optimizer.bind(self.shards)
        unsharded_bf16 = self.shards.stage == 0 and config.model.dtype == "bf16"
        self.fp32_gradients = UnshardedFp32Gradients(self.shards) if unsharded_bf16 else None
        self.device = self.deepspeed.device

    def release_store(self) -> None:
        """Close the store of the reference weights; weights that are views of it keep their memory."""
        if self.store is not None:
            self.store.close()
        self.store = self.optimizer.store = None

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        with super().evaluation_mode():
            try:
                yield
            finally:
                self.deepspeed.train()

    # ----------------------------------------------------------------------------------------------------------- passes

    def gradient_pass(
        self,
        rows: Sequence[StepRow],
        then: Action,
        adapter_penalty: AdapterPenalty | None = None,
        batches: list[StepBatch] | None = None,
        *,
        dropout: bool = True,
    ) -> StepLosses:
        """Make one forward and backward pass over `rows`, then do `then` with the reduced gradient.

        rows: the whole global step, the same list on every rank. adapter_penalty: added to the loss once per step.
        batches: the result of `prepare` for these rows; None: they are loaded here. dropout: False for an estimate of
        the model, True (the model's dropout as it is configured) for what trains it.
        """
        self.deepspeed.train()
        with nullcontext() if dropout else dropout_off(self.module):
            losses = self._forward_backward(rows, adapter_penalty, batches)
        self.optimizer.result = UpdateResult()
        self.optimizer.action = then if self.fp32_gradients is None else self._with_fp32_gradients(then)
        try:
            self.deepspeed.step()
        finally:
            # DeepSpeed does not call the optimizer when it finds a gradient that is not finite.
            skipped = self.optimizer.action is not None
            self.optimizer.action = None
            if self.fp32_gradients is not None:
                self.fp32_gradients.clear()
        if skipped and self.optimizer.has(UNPERTURBED):
            self._put_back()
            self.shards.publish()
        if self.optimizer.result.penalty is not None:
            losses.penalty = self.optimizer.result.penalty / (self.layout.world_size if self.shards.replicated else 1)
        losses.nonfinite = self.optimizer.result.nonfinite
        return losses

    def moved_hidden_pass(
        self,
        rows: Sequence[StepRow],
        then: Action,
        move: HiddenMove,
        adapter_penalty: AdapterPenalty | None = None,
        batches: list[StepBatch] | None = None,
    ) -> StepLosses:
        """Make a `gradient_pass` with hidden states moved along their gradient, which a pass before it finds (see
        hidden_moves)."""
        batches = self.prepare(rows) if batches is None else batches
        moves = HiddenMoves(self.module, move)
        with moves.recording():
            self.gradient_pass(rows, _leave, adapter_penalty, batches)
        moves.normalise()
        with moves.moving():
            return self.gradient_pass(rows, then, adapter_penalty, batches)

    def hidden_gradient_norms(self, rows: Sequence[StepRow], batches: list[StepBatch] | None = None) -> list[float]:
        """Norms of the gradient with regard to each layer's attention outputs, over all tokens of `rows`: a
        `gradient_pass` whose gradient of the weights is not used."""
        moves = HiddenMoves(self.module, HiddenMove(rho=0.0))
        with moves.recording():
            self.gradient_pass(rows, _leave, batches=batches)
        return moves.norms()

    @torch.no_grad()
    def loss_pass(self, rows: Sequence[StepRow], batches: list[StepBatch] | None = None) -> StepLosses:
        """Make one forward pass over `rows` with dropout off; their losses at the current weights."""
        losses = StepLosses(terms_of(rows), self.device, self.layout.world_size)
        with self.evaluation_mode():
            for batch in self.prepare(rows) if batches is None else batches:
                losses.add(batch, self.deepspeed(task="loss", **to_device(batch.inputs, self.device)))
                progress.beat()
        return losses

    @torch.no_grad()
    def layer_similarities(self, rows: Sequence[StepRow]) -> list[float]:
        """The mean cosine of each decoder layer's input and output over the tokens of `rows` that predict a supervised
        one; one forward pass with dropout off."""
        meter = LayerSimilarity(self.module, self.device)
        with self.evaluation_mode(), meter.measuring():
            for batch in self.prepare(rows):
                inputs = to_device(batch.inputs, self.device)
                meter.positions = inputs["positions"]
                self.deepspeed(task="loss", **inputs)
                progress.beat()
        return meter.means()

    def prepare(self, rows: Sequence[StepRow]) -> list[StepBatch]:
        """Load, stack and pin this rank's micro-batches. Not a collective call: a thread may prepare the next step
        during a step."""
        return pinned(micro_batches(rows, terms_of(rows), self.layout, self.rank))

    @torch.enable_grad()
    def _forward_backward(
        self, rows: Sequence[StepRow], adapter_penalty: AdapterPenalty | None, batches: list[StepBatch] | None
    ) -> StepLosses:
        terms = terms_of(rows)
        losses = StepLosses(terms + [ADAPTERS] * (adapter_penalty is not None), self.device, self.layout.world_size)
        batches = self.prepare(rows) if batches is None else batches
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            self.deepspeed.set_gradient_accumulation_boundary(is_last and self.fp32_gradients is None)
            once = {"adapter_penalty": adapter_penalty} if adapter_penalty is not None and is_last else {}
            output = self.deepspeed(task="loss", **to_device(batch.inputs, self.device), **once)
            # Times 1.0 makes a new tensor: DeepSpeed divides the gradient of the tensor that forward returned by its
            # accumulation steps.
            self.deepspeed.backward(output["loss"] * 1.0, scale_wrt_gas=False)
            losses.add(batch, output)
            progress.beat()
            if self.fp32_gradients is not None:
                self.fp32_gradients.add()
        if self.fp32_gradients is not None:
            self.fp32_gradients.reduce()
            self.deepspeed.set_gradient_accumulation_boundary(True)
        return losses

    def _with_fp32_gradients(self, then: Action) -> Action:
        gradients = self.fp32_gradients
        assert gradients is not None

        def action(shards: list[Shard]) -> None:
            gradients.hand_over([shard.param for shard in shards])
            then(shards)

        return action

    # ---------------------------------------------------------------------------------------------------------- actions

    def update(self, plan: UpdatePlan) -> Action:
        """Return the action of an ordinary AdamW step."""
        return self.optimizer.update(plan)

    def stash(self, kind: str) -> Action:
        """Keep the gradient as the state `kind`."""

        def work(shards: list[Shard], norm: torch.Tensor) -> None:
            for shard in shards:
                if kind in shard.state:
                    shard.state[kind].copy_(shard.grad)
                else:
                    shard.state[kind] = shard.grad.detach().clone()

        return self._where_finite(work)

    def perturb(self, rho: float) -> Action:
        """weights += rho * g / ||g||; `restore` undoes it exactly (sharpness-aware minimisation, arXiv 2010.01412)."""

        def work(shards: list[Shard], norm: torch.Tensor) -> None:
            self.optimizer.copy_weights_to(UNPERTURBED)
            for shard in shards:
                shard.param.add_(shard.grad * (rho / norm.clamp_min(1e-12)).to(shard.param.device))

        return self._where_finite(work)

    def restore(self, then: Action) -> Action:
        """Put back the weights from before `perturb`, then do `then` with the gradient at the perturbed weights.

        Where that gradient is not finite, the weights are put back and `then` is not done.
        """

        def action(shards: list[Shard]) -> None:
            self._put_back()
            then(shards)

        return action

    def accumulate_fisher(self, kind: str, weight: float) -> Action:
        """state[kind] += weight * g^2."""

        def work(shards: list[Shard], norm: torch.Tensor) -> None:
            for shard in shards:
                fisher_accumulate_(shard.state[kind], shard.grad, weight)

        return self._where_finite(work)

    def _where_finite(self, work: Callable[[list[Shard], torch.Tensor], None]) -> Action:
        """Do `work` with the gradient's norm if the norm is finite, and set `optimizer.result.applied`."""

        def action(shards: list[Shard]) -> None:
            norm = self.optimizer.grad_norm(shards)
            if self.shards.all_agree(bool(torch.isfinite(norm))):
                work(shards, norm)
                self.optimizer.result.applied = True

        return action

    @torch.no_grad()
    def _put_back(self) -> None:
        for shard in self.optimizer.shards():
            if UNPERTURBED in shard.state:
                shard.param.copy_(shard.state.pop(UNPERTURBED))

    # ------------------------------------------------------------------------------------------- weights between passes

    @torch.no_grad()
    def perturb_along(self, kind: str, rho: float) -> None:
        """weights += rho * s / ||s|| with the state s of this kind; `put_back`, or a pass with `restore`, undoes it
        exactly."""
        assert not self.is_perturbed, "the weights are moved already; put them back first"
        shards = self.optimizer.shards()
        (square,) = self.dots(shards, [(lambda shard: shard.state[kind],) * 2])
        self.optimizer.copy_weights_to(UNPERTURBED)
        factor = rho / max(float(square) ** 0.5, 1e-12)
        for shard in shards:
            shard.param.add_(shard.state[kind].to(shard.param.device), alpha=factor)
        self.shards.publish()

    @property
    def is_perturbed(self) -> bool:
        return self.optimizer.has(UNPERTURBED)

    def put_back(self) -> None:
        """Put back the weights from before `perturb_along`."""
        self._put_back()
        self.shards.publish()

    def dots(
        self, shards: Sequence[context.Shard], pairs: Sequence[tuple[context.Quantity, context.Quantity]]
    ) -> torch.Tensor:
        """Dot products of pairs of quantities over all weights, fp64 [pairs], by one small all-reduce."""
        return tensor_parts.dots(self.shards, shards, pairs)

    def dots_per_tensor(
        self, shards: Sequence[context.Shard], pairs: Sequence[tuple[context.Quantity, context.Quantity]]
    ) -> torch.Tensor:
        """Dot products of pairs of quantities over each trained tensor, fp64 [pairs, tensors], by one all-reduce."""
        return tensor_parts.dots_per_tensor(self.shards, list(self.parts(shards)), pairs)

    def dots_per_row(
        self, shards: Sequence[context.Shard], pairs: Sequence[tuple[context.Quantity, context.Quantity]]
    ) -> list[torch.Tensor]:
        """Dot products of pairs of quantities over each row of each trained tensor: for each tensor fp64 [pairs, rows],
        by one all-reduce."""
        return tensor_parts.dots_per_row(self.shards, list(self.parts(shards)), pairs)

    def parts(self, shards: Sequence[context.Shard]) -> Iterator[context.TensorPart]:
        """Yield the parts of trained tensors that lie in these shards. Not a collective call."""
        return tensor_parts.parts_of(self.shards, self.optimizer.shards(), shards)
