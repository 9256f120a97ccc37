"""Lisa (Huang et al. 2024, arXiv 2405.18641, NeurIPS 2024): steps on the user's rows and steps on the memory alternate,
and each phase is pulled to where the other one ended.

    user's steps     L = CE(task rows)   + rho / 2 ||theta - w_memory||^2
    memory's steps   L = CE(memory rows) + rho / 2 ||theta - w_task||^2

w_memory are the weights when the last phase on the memory ended, w_task those when the last phase on the task did. The
pulls begin after `warmup` of the task's steps, since early ones hurt convergence. These are the anchors of the authors'
code; its README has them swapped. A cycle begins with the memory's steps, which take the place of the task's: their
rows are not trained, and the task's number of steps stays.

The paper alternates 100 steps on the memory with 900 on the task. In a shorter run a cycle is a tenth of the task. With
LoRA the pull is that of the factors, as in the authors' code.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base

MEMORY_ANCHOR, TASK_ANCHOR = "lisa_memory_end", "lisa_task_end"
PAPERS_CYCLE, CYCLES_AT_LEAST = 1000, 10


class Config(MethodConfig):
    """Lisa: alternating steps on the task and on the memory, each with a pull to the end of the other."""

    needs_memory: ClassVar[bool] = True
    has_penalty: ClassVar[bool] = True
    state_kinds: ClassVar[tuple[str, ...]] = (MEMORY_ANCHOR, TASK_ANCHOR)

    rho: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the pulls."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of a cycle's steps that train the memory, at least one."""
    cycle: Annotated[int, Field(ge=2)] | None = None
    """Steps of one cycle; null: the paper's 1,000, or a tenth of the task where that is shorter."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the task's steps before the pulls begin."""

    def is_on_memory(self, step: int, num_steps: int) -> bool:
        """True where a step of a task of `num_steps` steps trains the memory."""
        cycle = self.cycle or max(2, min(PAPERS_CYCLE, num_steps // CYCLES_AT_LEAST))
        return step % cycle < max(1, round(self.share * cycle))


class Method(base.Method[Config]):
    def __init__(self, name: str, config: Config):
        super().__init__(name, config)
        self._on_memory, self._pulls = True, True

    def start_task(self, run: base.Run) -> None:
        for anchor in (MEMORY_ANCHOR, TASK_ANCHOR):
            run.set_anchor(anchor, moving=True)
        self._on_memory, self._pulls = True, False

    def memory_step(self, step: int, num_steps: int) -> base.ReplayTerm | None:
        on_memory = self.config.is_on_memory(step, num_steps)
        return base.ReplayTerm("lisa", ce_weight=1.0, share=1.0) if on_memory else None

    def before_step(self, run: base.Run) -> None:
        on_memory = self.config.is_on_memory(run.step, run.num_steps)
        if run.step > 0 and on_memory != self._on_memory:
            run.set_anchor(TASK_ANCHOR if on_memory else MEMORY_ANCHOR, moving=True)
        self._on_memory, self._pulls = on_memory, run.step >= self.config.warmup * run.num_steps

    def penalty(self) -> base.Penalty | None:
        if self.config.rho == 0 or not self._pulls:
            return None
        return base.Penalty(self.config.rho, anchor=TASK_ANCHOR if self._on_memory else MEMORY_ANCHOR)
