"""SOMF: fuses task vectors with the aligned model through a mask that refusal rows have taught.

    tau = sum_i w_i (theta_i - theta_aligned)
    theta = theta_aligned + tau m / mean(m)           m in {0, 1} for each element, its mean for each tensor

The mask is learned by its logits s, 0 at the start: m = sigmoid((s + logit(u)) / T) with u uniform (the relaxed
Bernoulli distribution), and Adam on the preference of each row's answer to an unwanted one (DPO, see
safecl.merging.rows.preferences). Source: Yi et al., A safety realignment framework via subspace-oriented model fusion,
arXiv 2405.09055, and the authors' code; T, beta and the weights are its defaults. Ours: the reference of DPO is the
fused model without a mask, where the code draws one for it in each step; an unwanted answer may be made, see
safecl.merging.rows.affirmative; `objective=refusals` learns from the answers alone; the final mask is s >= 0, where
theirs is drawn once more, so what no row speaks about is kept; whole models as well.

Memory: seven times the model in fp32: aligned, tau, logits, Adam's two moments, the weights and their gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from safecl.merging import base
from safecl.merging.places import Coefficient
from safecl.merging.rows.settings import RowsConfig

if TYPE_CHECKING:
    import torch

    from safecl.merging.rows.mask import Examples

SEVERAL = 0.3


class Config(RowsConfig):
    """Task vectors through a mask that refusals have taught."""

    needs: ClassVar[base.Needs] = base.Needs(
        base="no",
        aligned="yes",
        data="disallowed prompts with refusals, as for `memory.source`, or with the columns chosen and rejected",
    )

    weights: list[Coefficient] | None = None
    """w: weight of each task vector; 1 for one tuned model and 0.3 for each of several, as in the source."""
    objective: Literal["dpo", "refusals"] = "dpo"
    """Loss of the mask: the preference of a row's answer to an unwanted one (DPO), or the answer's own loss."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How far DPO may move from the fused model: the larger, the less."""
    steps: Annotated[int, Field(ge=0)] = 100
    """Steps of Adam on the mask."""
    rows_per_step: Annotated[int, Field(ge=1)] = 8
    """Rows of each step."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of the mask's logits."""
    temperature: Annotated[float, Field(gt=0)] = 0.5
    """T: the lower, the nearer the masks of training are to 0 and 1."""
    rescale: bool = True
    """Divide by the mask's mean, so that a tensor's change keeps its size."""
    seed: int = 0
    """Seed of the draws, and of the rows' order."""


class Merge(base.Merge[Config]):
    def prepare(self) -> None:
        from safecl.merging.arithmetic import check_weights
        from safecl.merging.rows.mask import Answers, learn_mask
        from safecl.merging.rows.preferences import read_preferences
        from safecl.merging.rows.reading import rows_with_answers

        config, models = self.config, self.models
        check_weights("somf", config.weights, len(models.tuned), "--tuned")
        if config.objective == "dpo":
            self.examples: Examples = read_preferences(config, models, config.beta)
        else:
            self.examples = Answers(rows_with_answers(config, models))
        self.mask = learn_mask(config, models, self.examples, self._task_vector)
        self.kept = self.elements = 0

    def _task_vector(self, tensors: base.Tensors) -> torch.Tensor:
        """Return tau of one tensor, in the memory of the first tuned model's values."""
        from safecl.merging.arithmetic import weighted_sum_, weights_at

        aligned, count = tensors.needed_aligned, len(tensors.tuned)
        usual = [1.0 if count == 1 else SEVERAL] * count
        weights = usual if self.config.weights is None else weights_at(self.config.weights, tensors, count)
        return weighted_sum_([tuned.sub_(aligned) for tuned in tensors.tuned], weights)

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        change = self._task_vector(tensors)
        kept = self.mask.get(tensors.name)
        if kept is not None:
            self.kept += int(kept.sum())
            self.elements += kept.numel()
            share = float(kept.double().mean()) if self.config.rescale else 1.0
            change.mul_(kept).div_(share or 1.0)
        return tensors.needed_aligned.add_(change)

    def notes(self) -> list[str]:
        share = self.kept / max(1, self.elements)
        first, last = self.mask.losses
        loss = "loss of DPO" if self.config.objective == "dpo" else "loss of the refusals"
        return [
            self.examples.note,
            f"the mask keeps {self.kept} of {self.elements} changes ({share:.1%}); {loss} from {first:.3f} to "
            f"{last:.3f} with relaxed masks",
        ]
