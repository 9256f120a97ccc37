"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), for safety: the old task is the aligned
behaviour.

    L = L_task + 0.5 * strength * sum_i (F_i / mean F) (theta_i - theta_0,i)^2

F is the diagonal Fisher of the memory's rows under the aligned model, F = mean over rows of (d/d theta mean-token
NLL)^2, estimated with random signs: each row's loss is multiplied by +-1, and B times the squared mean gradient of B
rows is an unbiased estimate of the mean squared per-row gradient for any batch, accumulation and world size. Its
relative error is about 0.9 / sqrt(sign_batches). Dividing by the mean makes `strength` comparable between models. The
penalty's gradient is analytic, inside the optimizer's pass. In a sequence of tasks Fisher and anchor stay those of the
aligned model; `online_ewc` renews both before each task.

The Fisher depends on the aligned model and the memory alone, so `safecl fisher` estimates it once for all runs
(`fisher: FILE`).

With LoRA the weights move by D = (alpha / r) B A, and the penalty is that of the merged weights, with the dense Fisher
of that file:
    0.5 * strength * sum over adapted weights of sum_ij (F_ij / mean F) D_ij^2
It is formed by row blocks, so that D never exists whole; each rank sums its share of the rows. It is part of the loss,
and clipped with it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config.base import FisherSize
from safecl.methods import base, scope

LORA_REFUSED = (
    "the Fisher of fresh adapters is degenerate, because B = 0 makes the gradient of A vanish; weigh their product "
    "with the dense Fisher of the full weights instead (name a file in methods.ewc.fisher, which `safecl fisher CFG` "
    "then writes), pull the product evenly (l2_sp), or tune all weights (model.lora: null)"
)


class Config(scope.ScopedConfig):
    """Elastic weight consolidation."""

    state_kinds: ClassVar[tuple[str, ...]] = ("anchor", "fisher")

    strength: Annotated[float, Field(ge=0)] = 0.1
    """Factor of the penalty; multiplies F / mean(F)."""
    fisher: str | None = None
    """File that `safecl fisher` has written, instead of an estimate at the start of the run. Needed with LoRA; needs no
    memory."""
    sign_batches: Annotated[int, Field(ge=1)] = 64
    """Random-sign batches of the Fisher estimate; its relative error is about 0.9 / sqrt(sign_batches)."""
    rows_per_batch: Annotated[int, Field(ge=1)] = 16
    """Memory rows in one sign batch."""
    proximal: bool = False
    """Apply the penalty as a proximal step after AdamW: stable for any strength times learning rate. Not with LoRA."""

    @property
    def needs_memory(self) -> bool:
        return self.fisher is None or self.needs_gradient

    @property
    def is_proximal(self) -> bool:
        return self.proximal

    @property
    def fisher_file(self) -> str | None:
        return self.fisher

    @property
    def fisher_size(self) -> FisherSize:
        return FisherSize(self.sign_batches, self.rows_per_batch)

    @property
    def refuses_lora(self) -> str | None:
        if self.fisher is None:
            return LORA_REFUSED
        if self.modules != "all" or self.rules:
            return (
                "the penalty of the adapters' product is that of all adapted weights; choose them with "
                "model.lora.target_modules instead"
            )
        if self.proximal:
            return "the penalty of the adapters' product is part of the loss; set proximal: false"
        return None


class Method(scope.ScopedMethod[Config]):
    def start_task(self, run: base.Run) -> None:
        config = self.config
        self.choose_weights(run)
        if config.fisher is not None and run.has_adapters:  # the penalty of the product reads the file itself
            return
        if not run.has_state("anchor"):
            run.set_anchor()
        if config.strength == 0 or run.has_state("fisher"):
            return
        if config.fisher is not None:
            run.log(f"ewc: Fisher of {config.fisher}, mean {run.load_fisher(config.fisher):.3g}")
            return
        mean = run.estimate_fisher(sign_batches=config.sign_batches, rows_per_batch=config.rows_per_batch)
        run.log(f"ewc: Fisher of {config.sign_batches} sign batches, mean {mean:.3g}")

    def penalty(self) -> base.Penalty | None:
        config = self.config
        if config.strength == 0:
            return None
        return base.Penalty(
            config.strength,
            fisher="fisher",
            proximal=config.proximal,
            modules=config.patterns,
            factors=self.factors,
            product=config.fisher is not None,
            fisher_file=config.fisher,
        )
