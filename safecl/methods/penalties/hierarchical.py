"""Hierarchical regularization (Song et al. 2025, "How to Alleviate Catastrophic Forgetting in LLMs Finetuning?
Hierarchical Layer-Wise and Element-Wise Regularization", arXiv 2501.13669): a pull whose weights are an importance by
element and by layer.

    L       = L_task + 0.5 * strength * sum_l c_l sum_{i in l} (W_i / mean(c W)) (theta_i - theta_0,i)^2
    W_i     = sum_t (- g_ti d_ti) / (D_i^2 + xi)          along a short path on the memory, from the aligned model
    c_l     = ||W_l|| / mean over layers of ||W_l||       l: a decoder layer; all other weights together are one more

The importance W is that of Synaptic Intelligence (arXiv 1703.04200): how much each weight's moves d_t have lowered the
loss, relative to the square of its whole move D. The path is `steps` steps of gradient descent on rows drawn from the
memory, each of length `length`; it is undone. The paper records the path while it trains on a general task, which in
safecl is over before the run begins. xi is `damping` times the mean of D^2, so that it does not depend on the length;
the paper's layer coefficient was not at hand, and grows with the layer's importance as its text says.

theta_0 and W are those of the aligned model, in all tasks of a sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.methods import base, layers, scope
from safecl.methods.penalties import ewc

if TYPE_CHECKING:
    import torch

IMPORTANCE, ANCHOR = "hierarchical_fisher", "anchor"
GRADIENT, START, WORK = "_hierarchical_grad", "_hierarchical_start", "_hierarchical_work"


class Config(scope.ScopedConfig):
    """Hierarchical regularization: a pull by elements' and layers' importance for the memory."""

    needs_memory: ClassVar[bool] = True
    state_kinds: ClassVar[tuple[str, ...]] = (ANCHOR, IMPORTANCE)
    refuses_lora: ClassVar[str] = ewc.LORA_REFUSED

    strength: Annotated[float, Field(ge=0)] = 0.1
    """Factor of the penalty; the importance has mean 1."""
    steps: Annotated[int, Field(ge=1)] = 16
    """Steps of the path, each a gradient on a draw from the memory."""
    share: Annotated[float, Field(gt=0)] = 0.25
    """Tokens of each of these draws, as a share of the task's tokens in a step."""
    length: Annotated[float, Field(gt=0)] = 0.01
    """Length of each step: the norm of the move of all weights together."""
    damping: Annotated[float, Field(gt=0)] = 1.0
    """xi, in units of the mean squared move: the higher, the less an element that hardly moved counts."""


class Method(scope.ScopedMethod[Config]):
    def start_task(self, run: base.Run) -> None:
        self.choose_weights(run)
        if not run.has_state(ANCHOR):
            run.set_anchor(ANCHOR)
        if self.config.strength > 0 and not run.has_state(IMPORTANCE):
            self._measure(run)

    def penalty(self) -> base.Penalty | None:
        if self.config.strength == 0:
            return None
        return base.Penalty(
            self.config.strength,
            anchor=ANCHOR,
            fisher=IMPORTANCE,
            modules=self.config.patterns,
            factors=self.factors,
        )

    # --------------------------------------------------------------------------------------------------- the importance

    def _measure(self, run: base.Run) -> None:
        """Walk along the path, go back, and make the state IMPORTANCE of it."""
        shards = run.shards()
        run.set_anchor(START, moving=True)
        for shard in shards:
            shard.state[WORK] = shard.state[START] * 0
        walked = sum(self._walk(run, shards, number) for number in range(self.config.steps))
        square, count = run.dots(shards, [(_move, _move), (base.one_of, base.one_of)]).tolist()
        xi = self.config.damping * square / count
        for shard in shards:
            shard.state[WORK].div_(_move(shard) ** 2 + max(xi, 1e-30))
            shard.param.copy_(shard.state.pop(START))
        run.publish()
        factors = self._layer_factors(run, shards)
        for part in run.parts(shards):
            part.shard.state[WORK].view(-1)[part.where].mul_(factors[part.number])
        total = float(run.dots(shards, [(_work, base.one_of)]))
        for shard in shards:
            shard.keep(IMPORTANCE, shard.state.pop(WORK).mul_(count / max(total, 1e-30)))
            shard.state.pop(GRADIENT, None)
        run.log(f"hierarchical: importance of {walked} steps on the memory")

    def _walk(self, run: base.Run, shards: Sequence[base.Shard], number: int) -> bool:
        """Make one step of the path; False where its gradient is not finite."""
        draw = base.ReplayTerm(f"hierarchical {number}", ce_weight=1.0, share=self.config.share)
        if not run.memory_gradient(GRADIENT, draw):
            return False
        norm = float(run.dots(shards, [(_gradient, _gradient)])) ** 0.5
        rate = self.config.length / max(norm, 1e-30)
        for shard in shards:
            gradient = _gradient(shard)
            shard.state[WORK].addcmul_(gradient, gradient, value=rate)
            shard.param.add_(gradient.to(shard.param.device), alpha=-rate)
        run.publish()
        return True

    def _layer_factors(self, run: base.Run, shards: Sequence[base.Shard]) -> list[float]:
        """c_l for each tensor, by number."""
        numbers = [layers.number_of(name) for name in run.tensor_names()]
        squares: dict[int | None, float] = defaultdict(float)
        for number, square in zip(numbers, run.dots_per_tensor(shards, [(_work, _work)])[0].tolist(), strict=True):
            squares[number] += square
        norms = {number: square**0.5 for number, square in squares.items()}
        mean = sum(norms.values()) / len(norms)
        return [norms[number] / max(mean, 1e-30) for number in numbers]


def _gradient(shard: base.Shard) -> torch.Tensor:
    return shard.state[GRADIENT]


def _work(shard: base.Shard) -> torch.Tensor:
    return shard.state[WORK]


def _move(shard: base.Shard) -> torch.Tensor:
    return shard.param - shard.state[START]
