"""Profiles: the share of each training step in an average of weights, and the combination of stored averages that comes
nearest to a wanted profile. Imports no torch.

    power    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),  0 <= s <= t       gamma from the relative width sigma_rel:
             sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    ema      p(s) = (1 - eta) eta^(t - s), and eta^t at the start
    weights  all at step t

Source: Karras et al., Analyzing and improving the training dynamics of diffusion models, arXiv 2312.02696, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

MOST_CELLS = 4096
"""Cells into which the steps are divided where a profile is compared with another."""


@dataclass(frozen=True)
class Profile:
    """The profile of an average that was stored at step `end`. value: gamma of `power`, eta of `ema`."""

    kind: Literal["weights", "ema", "power"]
    end: float
    value: float = 0.0

    def below(self, steps: Array) -> Array:
        """Share of all steps up to each of `steps`; the start, step 0, is among them."""
        inside = np.clip(steps, 0.0, self.end)
        if self.kind == "power":
            return np.where(steps >= 0, (inside / self.end) ** (self.value + 1), 0.0)
        if self.kind == "ema":
            return np.where(steps >= 0, self.value ** (self.end - inside), 0.0)
        return (steps >= self.end).astype(np.float64)


def gamma_of(sigma_rel: float) -> float:
    """Return gamma of a power-law profile of the relative width sigma_rel, which is less than 0.289 (the flat mean)."""
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def shares(stored: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Return the factor of each stored average, and the distance of their sum from the wanted profile.

    The factors sum to 1 and minimise the squared distance of the profiles. Weights of single steps have no width: each
    stands for the steps since the one before, so it gets their share in the wanted profile. The distance is relative,
    in the Euclidean norm of the shares of all cells; it is 0 for single steps.
    """
    if all(profile.kind == "weights" for profile in stored):
        return _shares_of_steps(stored, wanted), 0.0
    edges = np.linspace(0.0, wanted.end, int(min(wanted.end, MOST_CELLS)) + 1)
    densities = np.stack([_masses(profile, edges) for profile in stored])  # [stored, cells + 1]
    target = _masses(wanted, edges)
    gram, product = densities @ densities.T, densities @ target
    ones = np.ones(len(stored))
    system = np.block([[gram, ones[:, None]], [ones[None, :], np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(product, 1.0), rcond=None)[0][:-1]
    found /= found.sum()
    return [float(x) for x in found], float(np.linalg.norm(found @ densities - target) / np.linalg.norm(target))


def _masses(profile: Profile, edges: Array) -> Array:
    """The share of the start, and of each cell between two edges."""
    below = profile.below(edges)
    return np.concatenate([below[:1], np.diff(below)])


def _shares_of_steps(stored: Sequence[Profile], wanted: Profile) -> list[float]:
    order = sorted(range(len(stored)), key=lambda i: stored[i].end)
    ends = np.array([stored[i].end for i in order])
    masses = np.diff(wanted.below(ends), prepend=0.0)
    masses /= masses.sum()
    found = [0.0] * len(stored)
    for place, index in enumerate(order):
        found[index] = float(masses[place])
    return found
