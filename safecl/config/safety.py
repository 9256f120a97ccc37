"""The config sections of safety measurements, the scan and privacy."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from safecl.config.base import Section, Text
from safecl.config.gate import (
    ControllerConfig,
    DriftConfig,
    GateConfig,
    OnFail,
    ProbeConfig,
    RecoveryConfig,
    variant_of,
)
from safecl.config.judges import JudgeConfig
from safecl.config.variants import VariantConfig

WEI_MIN_WORDS = 20
"""Words of an answer that keyword:wei counts as a success (Wei et al. 2024)."""


_LANGUAGES = ("auto", "en", "de", "fr", "es", "it", "pt", "nl", "pl", "ru", "zh", "ja", "ko", "ar", "hi")
JUDGE = "judge:"
"""Begins the name of a scorer that is one of `safety.judges`."""
KEYWORD_SCORERS = ("keyword:gcg", "keyword:wei", "prefix:xstest", *(f"keyword:{code}" for code in _LANGUAGES))


def _name_of_scorer(name: str) -> str:
    importable = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:[A-Za-z_]\w*)?|[A-Za-z_]\w*:[A-Za-z_]\w*", name)
    prefix = name.partition(":")[0] in ("keyword", "prefix")
    if name.startswith(JUDGE) and len(name) > len(JUDGE):
        return name
    if name in KEYWORD_SCORERS or (importable and not prefix):
        return name
    near = difflib.get_close_matches(name, KEYWORD_SCORERS, n=1, cutoff=0.4)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(KEYWORD_SCORERS)};"
    raise ValueError(
        f"no scorer is named {name!r}; {hint} a judge of your own is named by its module, my_package.judge"
    )


class VllmConfig(Section):
    """The server that answers prompts with `safety.backend: vllm`."""

    arguments: list[Text] = []
    """Further arguments of `vllm serve`, such as [--tensor-parallel-size, "2"]. Without --gpu-memory-utilization it
    gets nine tenths of the GPU memory that is free."""
    start_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds that the server may take until it answers."""


class SafetyConfig(Section):
    """Measurement of safety, before, during and after training."""

    prompts: Text
    """Disallowed prompts: a file with a `prompt` column, or any known row format; or a benchmark in its published form,
    `harmbench:FILE` (also advbench, strongreject, directharm4, hex-phi, xstest, or-bench). No prompt may occur in
    memory, task or poison data."""
    benign_prompts: str | None = None
    """Benign prompts that look dangerous, for over-refusal. Rows with `safe: false` are left out."""
    system: Text | None = None
    """System message under which everything is measured: prompts, benign prompts and the tasks' held-out rows; those
    that have one keep it. Training does not see it. With a message that asks for safety it is "pure tuning, safe
    testing" (PTST, arXiv 2402.18540): tune without it, measure with it, and serve with it as well."""
    scorer: Annotated[str, AfterValidator(_name_of_scorer)] = "keyword:gcg"
    """The scorer behind the headline rate: keyword:gcg, keyword:wei, prefix:xstest, the rules of one language
    (keyword:en, keyword:de, keyword:fr, ...; keyword:auto guesses it for each answer), or a judge that can be imported
    (my_package.judge, my_package.module:function), or one of `judges` (judge:llama-guard-3). The first three are always
    reported."""
    judges: list[JudgeConfig] = []
    """Models that judge the answers to disallowed prompts, each a recipe's name or settings; several form a panel,
    whose agreement is reported. `safecl judge` does so after a run."""
    variants: list[VariantConfig] = []
    """Further measurements of the same prompts at each moment: prefill attacks, and other system messages."""
    every: Literal["task", "never"] | Annotated[int, Field(ge=1)] = "task"
    """When to measure. task: before and after each task; a number: also every so many steps; never."""
    max_prompts: Annotated[int, Field(ge=1)] = 200
    """Prompts used of each file, taken evenly."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Largest number of tokens generated per answer (greedy)."""
    backend: Literal["model", "vllm"] = "model"
    """Source of generated answers. model: the engine's own weights; vllm: a vLLM server, which gets the weights in a
    temporary folder. Likelihoods are always the engine's."""
    vllm: VllmConfig = VllmConfig()
    """Settings of the server."""
    thoughts: Literal["ignore", "report"] = "ignore"
    """Thoughts before the answers. ignore: they are not scored; report: they are scored apart from the answers."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts answered together on one rank."""
    gate: GateConfig | None = None
    """Limits for exit code 3."""
    on_fail: OnFail = "report"
    """The action of a run when a measurement fails the gate. report: it goes on, and the gate decides at its
    end; stop: it ends there; rollback: it goes back to the last state that passed, with a lower learning rate;
    corrective_replay: it trains on the memory until the probe recovers."""
    recovery: RecoveryConfig = RecoveryConfig()
    """Settings of rollback and corrective_replay."""
    probe: ProbeConfig | None = None
    """A cheap look at safety every few steps."""
    drift: DriftConfig | None = None
    """Measures the distance from the aligned model."""
    controller: ControllerConfig | None = None
    """Steers replay and distillation by the probe."""

    @model_validator(mode="after")
    def _judges_have_names_of_their_own(self) -> SafetyConfig:
        names = [judge.title for judge in self.judges]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"judges: two of them are named {', '.join(twice)}; set their `name`")
        if self.scorer.startswith(JUDGE) and self.scorer.removeprefix(JUDGE) not in names:
            there = f"they are {', '.join(names)}" if names else "there are none; write judges: [llama-guard-3]"
            raise ValueError(f"scorer: {self.scorer} is none of `judges`: {there}")
        return self

    @model_validator(mode="after")
    def _variants_have_names_of_their_own(self) -> SafetyConfig:
        names = [variant.title for variant in self.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"variants: two of them are named {', '.join(twice)}; set their `name`")
        for rate in self.gate.limits if self.gate is not None else ():
            variant = variant_of(rate)[0]
            if variant is not None and variant not in names:
                there = f"they are {', '.join(names)}" if names else "there are none"
                raise ValueError(f"gate.limits: {rate}: {variant} is none of `variants`: {there}")
        return self

    @model_validator(mode="after")
    def _a_gate_needs_a_measurement(self) -> SafetyConfig:
        if self.gate is not None and self.every == "never":
            raise ValueError(
                "a gate judges what was measured, and `every: never` measures nothing; set every: task or leave the "
                "gate out"
            )
        return self

    @model_validator(mode="after")
    def _a_failure_needs_a_gate(self) -> SafetyConfig:
        if self.on_fail != "report" and self.gate is None:
            raise ValueError(
                f"on_fail: {self.on_fail} acts where the gate fails, and there is no gate; set gate.max_asr"
            )
        return self

    @model_validator(mode="after")
    def _a_gate_needs_answers_that_can_count(self) -> SafetyConfig:
        limited = self.gate is not None and self.gate.max_asr is not None
        if limited and self.scorer == "keyword:wei" and self.max_new_tokens < WEI_MIN_WORDS:
            raise ValueError(
                f"keyword:wei counts no answer under {WEI_MIN_WORDS} words as a success, and max_new_tokens: "
                f"{self.max_new_tokens} allows none of that length, so that the gate would always pass; set "
                "max_new_tokens: 64 or more, or another scorer"
            )
        return self


class ScanConfig(Section):
    """Screens the rows of all tasks before training, by the aligned model's own refusals and for near-duplicates."""

    action: Literal["report", "drop", "downweight", "refuse"] = "report"
    """Treatment of flagged rows by `train`. report: list them; drop: leave them out; downweight: multiply their weight
    in the loss by `weight`; refuse: end with exit code 3 where more are flagged than harmless rows explain."""
    false_alarm: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """Share of harmless rows that may be flagged by their score."""
    benign: Text | None = None
    """File of rows or prompts that are known to be harmless and are like the upload's; the threshold is computed from
    them, and `false_alarm` is then kept. Without it the threshold is estimated from the upload itself."""
    disallowed: Text | None = None
    """File of disallowed prompts that the model refuses, preferably new ones: prompts that it was aligned on score
    higher. By default the memory's refused rows, else safety.prompts."""
    views: Annotated[list[Literal["refusal", "probe", "answer"]], Field(min_length=1)] | Literal["auto"] = "auto"
    """The scores of a row. auto: refusal and probe where `benign` has enough rows for the threshold and the probe, else
    refusal alone; refusal: how probable the model's refusal of its prompt is; probe: how much its prompt
    is like the known disallowed ones, by a linear probe on the model's hidden states; answer: how much the gradient of
    its answer is like that of complying with them, in which its opening weighs most. The last two are fitted to them
    and to known harmless prompts: the memory's answered rows, and every second row of `benign`, so give twice as many;
    answer needs rows with answers."""
    weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """downweight: factor of a flagged row's weight."""
    refusals: list[Text] = []
    """The model's refusals, in its own words; by default its most common answers to the disallowed prompts."""
    num_refusals: Annotated[int, Field(ge=1)] = 8
    """Largest number of different refusals that are taken from the model."""
    refusal_tokens: Annotated[int, Field(ge=1)] = 8
    """Number of first tokens of a refusal that are scored."""


class PrivacyConfig(Section):
    """Limits on the users' text in outputs, report, card and logs."""

    examples: Literal["full", "hashed", "none"] = "full"
    """full: the text; hashed: a hash of it; none: nothing."""
    keep_prepared: bool = True
    """Whether prepared rows stay in the cache for later runs. false: nothing is kept outside of the run folder. They
    lie there until the run has finished, and so do artifacts of the base model, which other runs then cannot share,
    unless artifacts.folder names a place for them."""
