"""VAA, vulnerability-aware alignment (Chen et al. 2025, arXiv 2506.03850, ICML 2025): an alignment stage that trains
the rows that harmful tuning would undo as well as all others, and takes more and more of its steps where the weights
have moved in the worst direction.

    groups   the vulnerable rows, the `share` of all whose loss rises most when the weights take a step of length alpha
             down the harmful rows' loss; and all others
    L        = sum_g p_g (mean loss of the step's rows in group g)
    p_g      <- p_g exp(eta L_g), made to sum to 1, at least `least` each, after every step       (group DRO)
    theta    -> theta + rho g / ||g||   before the step's gradient, with probability step / steps;   g = grad L

The paper counts how often a row flips while a copy of the model is tuned on harmful rows; the rise of the row's loss
over one harmful step is that to first order, and needs no copy. It draws one group for each step with probability p and
updates p by the drawn group's loss alone; here a step has rows of both groups, weighed by p, which is the same in the
mean. The defaults are those of its scripts: eta 0.007, rho 0.4, p between 0.1 and 0.9. Means are over rows
with `train.loss_mean: rows`.

It acts on the first task, with `role: align`, and needs harmful rows. On the average it costs half a pass over the
task's rows in each step, and before the first step one over harmful rows and two forward passes over all rows of the
stage."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from safecl.methods import base
from safecl.methods.harmful import HarmfulConfig

if TYPE_CHECKING:
    import numpy as np

HARMFUL, TASK = "_vaa_harmful_grad", "_vaa_task_grad"
KNOWN_AFTER = 2
"""Steps after which a step's losses may change p: rows are read one step ahead."""


class Config(HarmfulConfig):
    """VAA: an alignment stage with groups of rows by their vulnerability."""

    acts_on: ClassVar[Literal["align"]] = "align"
    follows_row_losses: ClassVar[bool] = True
    task_gradient_passes: ClassVar[float] = 0.5
    moves_weights: ClassVar[Literal["until_update"]] = "until_update"
    state_kinds: ClassVar[tuple[str, ...]] = (TASK,)

    alpha: Annotated[float, Field(gt=0)] = 0.1
    """Length of the harmful step that tells vulnerable rows."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the stage's rows that are vulnerable."""
    eta: Annotated[float, Field(ge=0)] = 0.007
    """Step of the groups' weights per nat of loss."""
    least: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Smallest weight of a group."""
    rho: Annotated[float, Field(ge=0)] = 0.4
    """Length of the move before a step's gradient."""


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._vulnerable: list[bool] = []
        self._p = 0.5
        """Weight of the vulnerable group."""
        self._steps: list[int] = []
        self._losses: list[list[float]] = []

    def start_task(self, run: base.Run) -> None:
        rises = self._rises(run)
        count = max(1, round(self.config.share * len(rises)))
        chosen = set(sorted(range(len(rises)), key=lambda row: (-rises[row], row))[:count])
        self._vulnerable = [row in chosen for row in range(len(rises))]
        self._p, self._steps, self._losses = 0.5, [], []
        run.log(
            f"vaa: {count} of {len(rises)} rows are vulnerable: their loss rises by {min(rises[r] for r in chosen):.3g}"
        )

    def _rises(self, run: base.Run) -> list[float]:
        """Rise of the loss of each row of the task over a harmful step; 0 for rows without targets."""
        before = run.task_row_losses()
        draw = base.ReplayTerm("vaa", ce_weight=1.0, share=1.0, harmful=self.config.harmful)
        if not run.memory_gradient(HARMFUL, draw):
            run.log("vaa: the gradient of the harmful rows is not finite, vulnerable rows are the first ones")
            return [0.0] * len(before)
        run.perturb(HARMFUL, -self.config.alpha)
        after = run.task_row_losses()
        run.restore()
        for shard in run.shards():
            del shard.state[HARMFUL]
        return [b - a if b == b and a == a else 0.0 for a, b in zip(before, after, strict=True)]

    def before_step(self, run: base.Run) -> None:
        rho, chance = self.config.rho, random.Random(f"{run.seed} vaa {run.step}").random()
        if rho > 0 and chance < run.step / run.num_steps and run.task_gradient(TASK):
            run.perturb(TASK, rho)

    def learned_factors(self, step: int, rows: Sequence[int]) -> np.ndarray:
        """Factors that give each group the weight p_g, whatever its share of the step's rows; where a step has rows of
        one group alone, these have all the weight."""
        import numpy as np

        while self._steps and self._steps[0] <= step - KNOWN_AFTER:
            self._steps.pop(0)
            self._update(*self._losses.pop(0))
        vulnerable = np.array([self._vulnerable[row] for row in rows])
        count = max(1, int(vulnerable.sum())), max(1, int((~vulnerable).sum()))
        factors: np.ndarray = np.where(vulnerable, self._p / count[0], (1 - self._p) / count[1])
        return factors * len(rows)

    def see_row_losses(self, step: int, losses: Mapping[int, float]) -> None:
        groups: list[list[float]] = [[], []]
        for row in sorted(losses):
            groups[not self._vulnerable[row]].append(losses[row])
        if all(groups):
            self._losses.append([math.fsum(own) / len(own) for own in groups])
            self._steps.append(step)  # last: another thread looks at it first

    def _update(self, vulnerable: float, others: float) -> None:
        """Take the step of p for the mean losses of the groups."""
        config = self.config
        odds = self._p / (1 - self._p) * math.exp(min(50.0, max(-50.0, config.eta * (vulnerable - others))))
        self._p = min(1 - config.least, max(config.least, odds / (1 + odds)))
