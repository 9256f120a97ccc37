"""Post-hoc EMA: makes an average of a chosen width over a run's steps, from snapshots that the run has kept.

    theta = sum_i x_i theta_i,    x = argmin |sum_i x_i p_i - p|^2  with  sum_i x_i = 1,    p(s) ~ s^gamma

theta_i is a snapshot at step t_i, p_i its profile: the share of each step in it. Snapshots are the weights of single
steps, exponential averages as `methods: {ema: ...}` keeps them, or averages with power-law profiles. Source: Karras et
al., arXiv 2312.02696, section 3.2, which stores two averages of power-law profiles. Ours: the factors sum to 1, so
weights that never moved stay as they are; weights of single steps stand for the steps since the snapshot before.

A snapshot is a model folder, or a checkpoint that a run has kept, RUN/checkpoints/step-...: its weights, or its average
with `profile=ema`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from safecl.config import ConfigError
from safecl.merging import base

if TYPE_CHECKING:
    import torch


class Config(base.MergeConfig):
    """An average over a run's steps, made from snapshots."""

    needs: ClassVar[base.Needs] = base.Needs(base="no", fewest=2)
    takes_checkpoints: ClassVar[bool] = True

    sigma_rel: Annotated[float, Field(gt=0, lt=0.2886)] = 0.1
    """Width of the average as a share of the steps: its standard deviation divided by the number of steps."""
    steps: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2)] | None = None
    """Step of each snapshot; by default the last number in its folder's name, as in step-00000500 or checkpoint-500."""
    profile: Literal["weights", "ema", "power"] = "weights"
    """What the snapshots are: the weights of their step, exponential averages, or averages with power-law profiles."""
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """eta of the snapshots, where they are exponential averages."""
    sigma_rels: Annotated[list[Annotated[float, Field(gt=0, lt=0.2886)]], Field(min_length=2)] | None = None
    """Width of each snapshot, where they have power-law profiles."""

    @property
    def reads_averages(self) -> bool:
        return self.profile == "ema"

    @model_validator(mode="after")
    def _a_profile_has_its_setting(self) -> Config:
        if self.profile == "ema" and self.decay is None:
            raise ValueError("profile: ema needs decay, the eta of the snapshots")
        if self.profile == "power" and self.sigma_rels is None:
            raise ValueError("profile: power needs sigma_rels, the width of each snapshot")
        return self


class Merge(base.Merge[Config]):
    by_rows = True

    def prepare(self) -> None:
        from safecl.merging.averages._profiles import Profile, gamma_of, shares

        self.steps = self._steps()
        values = [0.0] * len(self.steps)
        if self.config.profile == "ema":
            values = [self.config.decay or 0.0] * len(self.steps)
        elif self.config.profile == "power":
            values = [gamma_of(sigma) for sigma in self._one_each("sigma_rels", self.config.sigma_rels or [])]
        stored = [Profile(self.config.profile, t, value) for t, value in zip(self.steps, values, strict=True)]
        wanted = Profile("power", max(self.steps), gamma_of(self.config.sigma_rel))
        self.factors, self.distance = shares(stored, wanted)

    def _steps(self) -> list[float]:
        if self.config.steps is not None:
            return self._one_each("steps", self.config.steps)
        names = [Path(folder).name for role, folder in self.models.folders.items() if role.startswith("tuned")]
        numbers = [re.findall(r"\d+", name) for name in names]
        if without := next((name for name, found in zip(names, numbers, strict=True) if not found), None):
            raise ConfigError(
                f"post_hoc_ema.steps: the folder {without} has no number of a step in its name; give steps"
            )
        steps = [float(found[-1]) for found in numbers]
        if min(steps) <= 0:
            raise ConfigError("post_hoc_ema.steps: a snapshot of step 0 is no part of the average; leave it out")
        return steps

    def _one_each(self, key: str, values: list[float]) -> list[float]:
        if len(values) != len(self.models.tuned):
            raise ConfigError(f"post_hoc_ema.{key}: {len(values)} values for {len(self.models.tuned)} snapshots")
        return values

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        from safecl.merging.arithmetic import weighted_sum_

        return weighted_sum_(tensors.tuned, self.factors)

    def notes(self) -> list[str]:
        parts = ", ".join(f"step {t:g}: {x:.4f}" for t, x in zip(self.steps, self.factors, strict=True))
        distance = f"; distance of the profile from the wanted one {self.distance:.1%}" if self.distance else ""
        return [f"factors of the snapshots: {parts}{distance}"]
