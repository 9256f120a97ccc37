"""The base classes of all config sections: Section, and MethodConfig for the settings of a method.

Imports no torch. The string under a field is its documentation; `safecl init` and docs/config.md are generated from
these strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from safecl.config.texts import check_text

LARGEST_FLOAT = 3e38
LARGEST_INT = 2**63 - 1

Text = Annotated[str, Field(min_length=1), AfterValidator(check_text)]
"""A name or a path."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and the string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_is_its_defaults(cls, given: Any) -> Any:
        """Drop sections that are null: YAML reads a `train:` whose keys are all commented out as null."""
        if not isinstance(given, Mapping):
            return given
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, BaseModel)}
        return {key: value for key, value in given.items() if value is not None or key not in sections}

    @field_validator("*", mode="after")
    @classmethod
    def _numbers_fit(cls, value: Any) -> Any:
        """Refuse numbers that would become infinite where they are used: in fp32, or as 64-bit integers."""
        if isinstance(value, float) and abs(value) > LARGEST_FLOAT:
            raise ValueError(f"{value:g} does not fit into a 32-bit float; at most {LARGEST_FLOAT:g} is possible")
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise ValueError(f"{value:.3g} does not fit into a 64-bit integer")
        return value


@dataclass(frozen=True)
class FisherSize:
    """Size of an estimate of the Fisher information: batches with one random sign per row, and rows in each."""

    sign_batches: int = 64
    rows_per_batch: int = 16


@dataclass(frozen=True)
class MergeAtTheEnd:
    """A merge of the task's weights with the aligned model's, when the task ends.

    kind, settings: of safecl.merging. sweep: settings to measure, as `--sweep` has them; empty for the kind's usual
    ones. pick: `gate` measures them and takes the best that passes; None applies the settings as they are.
    """

    kind: str
    settings: Mapping[str, Any]
    sweep: tuple[str, ...]
    pick: str | None


@dataclass(frozen=True)
class Change:
    """A change that a method makes to all gradients, or to all steps, so that something holds for them.

    to: `gradient`, before AdamW; `step`, the one that AdamW has taken. by: `factors`, one for each tensor; `tensors`, a
    projection or a mask inside each tensor, which such factors leave true; `whole`, a projection by all tensors
    together, which any other change undoes.
    """

    to: Literal["gradient", "step"]
    by: Literal["factors", "tensors", "whole"]


class MethodConfig(Section):
    """Base of every method's config (`methods: {name: {...}}`).

    The properties say what a run must know about the method; the rest of safecl reads no other attribute of it. A
    method overrides those that apply to it: by a class variable (`needs_memory: ClassVar[bool] = True`), or by a
    property where the answer depends on the settings.
    """

    @property
    def acts_on(self) -> Literal["task", "align"]:
        """The role of the tasks that the method acts on: the users' tasks, or the alignment stage before them."""
        return "task"

    @property
    def needs_memory(self) -> bool:
        """True where the method cannot run without the section `memory`."""
        return False

    @property
    def needs_harmful(self) -> bool:
        """True where the method cannot run without harmful rows, whose file it names (`harmful_source`)."""
        return False

    @property
    def harmful_source(self) -> str | None:
        """File or hub id of the harmful rows that the method takes gradients on; None without one."""
        return None

    @property
    def needs_base_model(self) -> bool:
        """True where the method cannot run without the model before its alignment, which it names (`base_model`)."""
        return False

    @property
    def base_model(self) -> str | None:
        """Folder or hub id of the model before its alignment; None without one."""
        return None

    @property
    def needs_lora(self) -> str | None:
        """The reason why the method works with model.lora alone, and what works without; None where it needs none."""
        return None

    @property
    def needs_teacher(self) -> bool:
        """True where the method compares replayed rows with a teacher (memory.teacher)."""
        return False

    @property
    def online_teacher(self) -> str | None:
        """The model whose outputs the method needs in every step: aligned, previous, ema, or a folder; None without
        one."""
        return None

    @property
    def compares_hidden(self) -> bool:
        """True where the teacher's hidden states are compared, so that its hidden size must be that of the model."""
        return False

    @property
    def compared_layers(self) -> int | tuple[int, ...]:
        """The layers whose hidden states are compared with a teacher's: how many, or which (TaskTerm.layers)."""
        return ()

    @property
    def scoring_models(self) -> dict[str, str | None]:
        """Models that score the task's rows before training, by the key that names each: a folder or hub id; None where
        the config must name one."""
        return {}

    @property
    def scores_file(self) -> str | None:
        """File of scores of the task's rows that were computed elsewhere; None without one."""
        return None

    @property
    def follows_row_losses(self) -> bool:
        """True where the method is told the loss of each of the task's rows after every step."""
        return False

    @property
    def head_forwards(self) -> int:
        """Number of forwards of the output head alone, without gradients, that the method adds to every step."""
        return 0

    @property
    def gradient_passes(self) -> float:
        """Number of gradients of its own, on replayed rows, that the method takes in every step; a fraction where it
        takes one in some steps."""
        return 0

    @property
    def forward_passes(self) -> float:
        """Number of forward passes of its own, on replayed rows and without a gradient, in every step."""
        return 0

    @property
    def task_gradient_passes(self) -> float:
        """Number of further gradients on the task's rows that the method takes in every step."""
        return 0

    @property
    def kept_singular_share(self) -> float | None:
        """Mean share of the singular vectors of the layers' matrices that the method keeps; None where it keeps none.

        The step of each matrix is then gathered on one rank and sent back.
        """
        return None

    @property
    def moves_hidden(self) -> bool:
        """True where the method keeps gradients of hidden states between two passes."""
        return False

    @property
    def moves_weights(self) -> Literal["for_good", "until_update"] | None:
        """The way in which `before_step` leaves the weights moved; None where it leaves them as they were.

        for_good: it changes them, before other methods take their gradients of the step. until_update: the step's
        gradient is taken at moved weights (Run.perturb), after other methods have taken theirs at the weights
        themselves.
        """
        return None

    @property
    def changes(self) -> Change | None:
        """The change of gradients or of steps after which something holds; None without one."""
        return None

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Kinds of state with one value per weight that the method keeps in the shards. Methods of one run share a kind
        of the same name.

        deepspeed.offload decides the place of kinds whose names end in `anchor`, `fisher` or `ema`.
        """
        return ()

    @property
    def has_penalty(self) -> bool:
        """True where the method pulls the weights by a quadratic penalty."""
        return False

    @property
    def is_proximal(self) -> bool:
        """True where that penalty is a proximal step after AdamW (the key `proximal`)."""
        return False

    @property
    def fisher_file(self) -> str | None:
        """The file that `safecl fisher` has written and the method reads (the key `fisher`); None without one."""
        return None

    @property
    def fisher_size(self) -> FisherSize | None:
        """Size of the estimate that `safecl fisher` makes for the method; None where it reads no such file."""
        return None

    @property
    def keeps_average(self) -> bool:
        """True where the method keeps an average of the weights, which is evaluated and saved in their place."""
        return False

    @property
    def mask_fisher(self) -> str | None:
        """Kind of Fisher state by which the average's decay differs between weights; None where it does not."""
        return None

    @property
    def merge_at_the_end(self) -> MergeAtTheEnd | None:
        """The merge of the task's weights with the aligned model's, whose state is the kind `aligned_anchor`; None
        without one."""
        return None

    @property
    def refuses_lora(self) -> str | None:
        """The reason why the method cannot be combined with model.lora, and what works instead; None where it can."""
        return None

    def decay_for(self, num_steps: int) -> float | None:
        """Decay of the average in a task of `num_steps` optimizer steps; None without an average."""
        return None

    @property
    def rewrites(self) -> bool:
        """True where the method changes the task's rows before they are tokenised."""
        return False

    def rewrite(self, question: str, answer: str, begin: Callable[[str, int], str]) -> tuple[str, str]:
        """Return the question and the answer that are trained in the place of these.

        begin(text, n): the text of the first n tokens of a text.
        """
        return question, answer

    @property
    def needs_answers(self) -> bool:
        """True where the method cannot run without the file of answers that `safecl memory rewrite` writes, which it
        names (`answers_file`)."""
        return False

    @property
    def answers_file(self) -> str | None:
        """File of rewritten answers that the method trains (the key `answers`); None without one."""
        return None

    @property
    def freezes(self) -> bool:
        """True where `frozen` names weights."""
        return type(self).frozen is not MethodConfig.frozen

    def frozen(self, names: Sequence[str], seed: int) -> set[str]:
        """Those of the trained weights that the method leaves as they are, by name. seed: train.seed.

        They take no gradients, master weights or moments. It depends on nothing else, so it is the same in all tasks,
        on all ranks, and after a resume.
        """
        return set()

    def check_weight_names(self, method: str, names: list[str]) -> None:
        """Raise ConfigError where the settings name weights that are not among `names`, those that the run trains."""

    def weight_on_start(self, num_steps: int) -> float:
        """Share of the task's start in the saved average after `num_steps` optimizer steps; 0 without an average."""
        return 0.0


_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `500MB` or `1.5GiB`. Raises ValueError naming the units."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = _BYTES.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write bytes like 500MB or 1.5GiB")
    return int(float(match[1]) * unit)
