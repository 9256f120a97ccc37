"""Online elastic weight consolidation (Schwarz et al. 2018, "Progress & Compress", arXiv 1805.06370), over a sequence
of tasks.

    L = L_task + 0.5 * strength * sum_i F_i (theta_i - a_i)^2
    before each task:   F <- gamma * F + F_new / mean(F_new),   a <- the current weights

There is one Fisher and one anchor for any number of tasks; `ewc` keeps those of the aligned model for all tasks. Before
the first task F_new is estimated on the memory under the aligned model, so that the first task equals `ewc`. Before
later tasks F_new is estimated on the rows of the task that has just ended (or on the memory again), under the model
that this task produced. Each estimate is divided by its mean, as Schwarz et al. do, so that no task counts for more
because its loss is steeper. The anchor moves: the next task does not restore what one task has lost, and a poisoned
task is consolidated like any other.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from safecl.methods import base, scope
from safecl.methods.penalties import ewc

FISHER, ANCHOR, NEW = "online_fisher", "online_anchor", "_new_fisher"


class Config(scope.ScopedConfig):
    """Online elastic weight consolidation."""

    needs_memory: ClassVar[bool] = True
    state_kinds: ClassVar[tuple[str, ...]] = (ANCHOR, FISHER)
    refuses_lora: ClassVar[str] = ewc.LORA_REFUSED

    strength: Annotated[float, Field(ge=0)] = 0.1
    """Factor of the penalty; F of the first task has mean 1."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Share of the old Fisher that is kept at each new task; 1 forgets nothing."""
    rows: Literal["task", "memory"] = "task"
    """Rows of the Fisher estimate that is added after a task: that task's rows, or the memory's."""
    sign_batches: Annotated[int, Field(ge=1)] = 64
    """Random-sign batches of each estimate; its relative error is about 0.9 / sqrt(sign_batches)."""
    rows_per_batch: Annotated[int, Field(ge=1)] = 16
    """Rows in one sign batch."""
    proximal: bool = False
    """Apply the penalty as a proximal step after AdamW: stable for any strength times learning rate."""

    @property
    def is_proximal(self) -> bool:
        return self.proximal


class Method(scope.ScopedMethod[Config]):
    def start_task(self, run: base.Run) -> None:
        config = self.config
        self.choose_weights(run)
        if config.strength == 0:
            return
        again = run.has_state(FISHER)
        rows: Literal["memory", "previous_task"] = "previous_task" if again and config.rows == "task" else "memory"
        mean = run.estimate_fisher(
            sign_batches=config.sign_batches, rows_per_batch=config.rows_per_batch, kind=NEW, rows=rows
        )
        for shard in run.shards():
            new = shard.state.pop(NEW).div_(mean)
            shard.keep(FISHER, new.add_(shard.state[FISHER].to(new), alpha=config.gamma) if again else new)
        run.set_anchor(ANCHOR)
        origin = rows.replace("_", " ")
        run.log(f"online_ewc: Fisher of {config.sign_batches} sign batches on the rows of {origin}, mean {mean:.3g}")

    def penalty(self) -> base.Penalty | None:
        if self.config.strength == 0:
            return None
        return base.Penalty(
            self.config.strength,
            anchor=ANCHOR,
            fisher=FISHER,
            proximal=self.config.proximal,
            modules=self.config.patterns,
            factors=self.factors,
        )
