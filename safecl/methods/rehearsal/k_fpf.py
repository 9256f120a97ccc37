"""k-FPF, forgetting-prioritized finetuning (Zhao et al. 2023, arXiv 2304.04158, ICML 2023): bursts on the memory that
move only the weights that a sequence of tasks changes most.

    k times, evenly spaced over the task:   theta_s <- `steps` steps of AdamW on rows drawn from the memory
    L = alpha * KL(p0, p) + beta * CE;      theta_s: the chosen modules, all other weights stay

In between a step costs nothing more than plain fine-tuning. The paper finds that few modules change most from task to
task, norms and the last layers among them, and that tuning these on the buffer restores old tasks; `alpha` is the
distance to stored outputs that it reports as an option. The default is all norms and the head. A head that is tied to
the embedding bears the embedding's name (`*embed_tokens*`).

`corrective_replay` moves all weights, at the end or when the memory's loss has risen. AdamW starts afresh before a
burst and after it; the last burst is the task's last act, and corrects the average where the run saves one."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base, scope

NORMS_AND_HEAD = ["*norm*", "lm_head.*"]


class Config(MethodConfig):
    """k-FPF: bursts of a few modules on the memory, in the place of replay in every step."""

    needs_memory: ClassVar[bool] = True
    state_kinds: ClassVar[tuple[str, ...]] = (base.BEFORE,)

    k: Annotated[int, Field(ge=1)] = 3
    """Bursts in each task; the last one at its end."""
    steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps of a burst, each of as many tokens of the memory as the task has in a step."""
    modules: Annotated[list[str], Field(min_length=1)] = NORMS_AND_HEAD
    """The weights that bursts move: patterns of parameter names with shell wildcards."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Constant learning rate of a burst; null: train.learning_rate."""
    alpha: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance to the aligned model's outputs."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy."""

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0

    @property
    def refuses_lora(self) -> str | None:
        if self.modules != NORMS_AND_HEAD:
            return None
        return 'adapters have no norms and no head; name some of them, e.g. modules: ["*.o_proj.*"]'

    def check_weight_names(self, method: str, names: list[str]) -> None:
        scope.Segment(modules=self.modules).check(f"methods.{method}.modules", names)

    def bursts_at(self, num_steps: int) -> list[int]:
        """Steps of a task of `num_steps` after which a burst comes, but for the one at the end."""
        return sorted({step for i in range(1, self.k) if 0 < (step := round(i * num_steps / self.k)) < num_steps})


class Method(base.Method[Config]):
    def after_step(self, run: base.Run) -> None:
        if run.step + 1 in self.config.bursts_at(run.num_steps):
            self._burst(run, str(run.step + 1))

    def end_task(self, run: base.Run) -> None:
        self._burst(run, "end", of_average=True)

    def _burst(self, run: base.Run, name: str, of_average: bool = False) -> None:
        config = self.config
        draw = base.ReplayTerm(f"k_fpf {name}", ce_weight=config.beta, kd_weight=config.alpha)
        loss = run.correct(
            config.steps, draw, learning_rate=config.learning_rate, of_average=of_average, modules=config.modules
        )
        run.log(f"k_fpf: after {config.steps} steps of the burst at {name} the memory's loss is {loss:.3f}")
