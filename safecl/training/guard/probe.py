"""The probe of a run: the margin of refusal against compliance on a fixed set of prompts, between measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safecl.config import ProbeConfig
from safecl.data import Prompt
from safecl.engine.passes.live_model import evaluating
from safecl.evaluation import Evaluation
from safecl.evaluation.answers.margin import REFUSAL, Margins, common_refusal, margins
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.results.probed import ProbeResult, probe_result
from safecl.planning.plans import RunPlan
from safecl.training.run import Run


class Probe:
    """Looks at the model that the run would save now. `look` is a collective call."""

    def __init__(self, plan: RunPlan, settings: ProbeConfig):
        self.settings, self._tokenizer = settings, plan.tokenizer
        count = min(settings.prompts, len(plan.prompts))
        self.indices = [i * len(plan.prompts) // count for i in range(count)]
        """The probed prompts among those of safety.prompts that are measured."""
        self.all_prompts = list(plan.prompts)
        self._prompts = [plan.prompts[i] for i in self.indices]
        self.refusal = settings.refusal
        """Opening of a refusal; None until the aligned model's own is known."""
        self.aligned: float | None = None
        """Share of prompts on which the aligned model would rather comply."""

    def look(self, run: Run) -> Margins:
        """Compute the margins of the probed prompts, on every rank."""
        with evaluating(run.engine, average=run.saves_average) as model:
            return self.look_at(model)

    def look_at(self, model: EvalModel, prompts: Sequence[Prompt] | None = None) -> Margins:
        """Do what `look` does, for a model in evaluation mode and for other prompts."""
        refusal = REFUSAL if self.refusal is None else self.refusal
        asked = self._prompts if prompts is None else prompts
        return margins(model, self._tokenizer, asked, refusal, self.settings.compliance, self.settings.tokens)

    def beside(self, found: Evaluation, model: EvalModel, *, is_aligned: bool) -> ProbeResult | None:
        """Look at the model that an evaluation has just measured, and compare. The aligned model's own refusal becomes
        the probe's, and its share of compliance the one to come back to. A collective call."""
        if found.safety is None:
            return None
        if is_aligned and self.settings.refusal is None:
            self.refusal = common_refusal(found.safety.outputs, found.safety.scorer)
        seen = self.look_at(model)
        if is_aligned:
            self.aligned = seen.complying.value
        return probe_result(seen, [found.safety.outputs[i] for i in self.indices], found.safety.scorer)

    def has_recovered(self, seen: Margins) -> bool:
        """Return whether no more prompts lean to compliance than with the aligned model."""
        return seen.complying.value <= (self.aligned or 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs. The refusal is the model's own text, and no user's."""
        return {"refusal": self.refusal, "aligned": self.aligned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.refusal, self.aligned = state["refusal"], state["aligned"]
