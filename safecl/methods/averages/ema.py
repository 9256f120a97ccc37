"""Exponential moving average of the weights.

    bar_t = eta * bar_{t-1} + (1 - eta) * theta_t,   bar_0 = theta_0

Three algorithms share the name; `write_back` keeps them apart:

never   the average is only evaluated and saved; training does not see it. After T steps it keeps weight eta^T on the
        start. The form of "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective" (arXiv 2508.12531), as
        far as it is published.
slow    every k steps  phi <- eta * phi + (1 - eta) * theta;  theta <- phi.  Slow weights: Lookahead (arXiv 1907.08610),
        Reptile. Adam's moments are kept. (Written back at every step it would only be a learning rate times 1 - eta.)
anchor  every k steps  theta <- eta * theta_0 + (1 - eta) * theta.  A pull to the fixed start: repeated WiSE-FT,
        decoupled L2-SP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from safecl.config import MethodConfig
from safecl.methods import base


class AverageConfig(MethodConfig):
    """The settings that decide how fast an average follows the weights."""

    decay: Annotated[float, Field(ge=0, le=1)] | None = None
    """eta. With `write_back: anchor` it is the share of theta_0 that is mixed in."""
    horizon: Annotated[float, Field(gt=0)] | None = None
    """Instead of decay: the average's memory 1 / (1 - eta) as a fraction of the task's steps. 0.3 leaves 4 % of the
    average on the start. Default 0.3."""

    @model_validator(mode="after")
    def _decay_and_horizon_exclude_each_other(self) -> AverageConfig:
        if self.decay is not None and self.horizon is not None:
            raise ValueError("give decay or horizon, not both")
        return self

    def decay_for(self, num_steps: int) -> float:
        """eta of a task of `num_steps` optimizer steps."""
        if self.decay is not None:
            return self.decay
        return max(0.0, 1.0 - 1.0 / max(1.0, (self.horizon or 0.3) * num_steps))

    def weight_on_start(self, num_steps: int) -> float:
        """eta^T: share of theta_0 in the saved average after `num_steps` steps; 0 where the live weights are saved."""
        return self.decay_for(num_steps) ** num_steps if self.keeps_average else 0.0


class Config(AverageConfig):
    """EMA of the weights."""

    write_back: Literal["never", "slow", "anchor"] = "never"
    """never: evaluate and save the average; slow: every `every` steps the weights are set to the average; anchor: every
    `every` steps they are pulled to theta_0."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps between write-backs; unused with `never`."""

    @model_validator(mode="after")
    def _a_write_back_needs_a_decay(self) -> Config:
        if self.write_back != "never" and self.decay is None:
            raise ValueError(
                f"write_back: {self.write_back} needs decay, e.g. {'0.5' if self.write_back == 'slow' else '0.05'}"
            )
        return self

    @property
    def keeps_average(self) -> bool:
        return self.write_back == "never"

    @property
    def state_kinds(self) -> tuple[str, ...]:
        return ({"never": "ema", "slow": "slow", "anchor": "anchor"}[self.write_back],)


class Method(base.Method[Config]):
    def ema_decay(self, run: base.Run) -> float | None:
        return self.config.decay_for(run.num_steps) if self.config.keeps_average else None

    def start_task(self, run: base.Run) -> None:
        if self.config.write_back == "slow":
            run.set_anchor("slow", moving=True)
        elif self.config.write_back == "anchor" and not run.has_state("anchor"):
            run.set_anchor()  # theta_0 is the aligned model, in all tasks

    def acts_after_update(self, run: base.Run) -> bool:
        return not self.config.keeps_average and (run.step + 1) % self.config.every == 0

    def after_update(self, run: base.Run, shards: Sequence[base.Shard]) -> None:
        eta = self.config.decay
        assert eta is not None, "a write-back has a decay"
        for shard in shards:
            if self.config.write_back == "slow":
                shard.state["slow"].lerp_(shard.param, 1.0 - eta)
                shard.param.copy_(shard.state["slow"])
            else:
                for piece in shard.pieces(["anchor"]):
                    param = shard.param.view(-1)[piece.where]
                    param.lerp_(piece.state["anchor"].to(param.dtype), eta)
