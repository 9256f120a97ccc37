"""The config section of the replay memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from safecl.config.base import Section, Text, parse_bytes
from safecl.config.data import RowsConfig, RowsSource


class TeacherConfig(Section):
    """The outputs that replayed rows are compared with: stored with each row, or computed by a model in every step."""

    kind: Literal["topk", "online"] = "topk"
    """topk: stored log-probabilities of the k likeliest tokens and the log of the remaining mass, per supervised token;
    online: the same of the model `source`, computed in every step."""
    source: Text = "aligned"
    """online only. aligned: theta_0; previous: the model that the previous task produced; ema: the average that the
    method `ema` keeps; or the folder or hub id of any model with the same tokenizer."""
    k: Annotated[int, Field(ge=1)] = 64
    """Entries per token; 6 bytes each where they are stored."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the distribution; training uses the same."""
    indices: Literal["int32", "packed"] = "int32"
    """int32: 4 bytes per token id, read without a copy; packed: 2 bytes below 65,536 tokens of vocabulary, else 3."""

    @model_validator(mode="after")
    def _stored_outputs_are_those_of_the_aligned_model(self) -> TeacherConfig:
        if self.kind == "topk" and self.source != "aligned":
            raise ValueError(
                f"source: {self.source} needs kind: online; topk stores the outputs of the model at a row's insertion"
            )
        return self


class GuardConfig(Section):
    """Rows that stay out of the memory even if the policy would take them."""

    max_nll: Annotated[float, Field(gt=0)] | None = None
    """Largest mean NLL of a row's targets under the aligned model, in nats per token."""
    max_deviations: Annotated[float, Field(gt=0)] | None = None
    """Largest distance of that NLL from the memory's median, in robust standard deviations (1.4826 MAD); 6 is a usual
    choice."""
    flag_tag: str | None = None
    """Tag by which a scorer marks rows; a row where it is neither empty, 0 nor false stays out."""

    @model_validator(mode="after")
    def _guards_something(self) -> GuardConfig:
        if self.max_nll is None and self.max_deviations is None and self.flag_tag is None:
            raise ValueError("set max_nll, max_deviations or flag_tag, or leave out `guard`")
        return self


def _rows_or_bytes(value: Any) -> Any:
    if isinstance(value, str):
        try:
            count = parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"{error}, or a number of rows") from None
        if count < 1:
            raise ValueError(f"{value!r} holds nothing; write a number of rows, or bytes like 500MB or 1.5GiB")
    return value


class AnswersConfig(Section):
    """The answers that the aligned model gives to `memory.prompts`; the options of `safecl memory build`."""

    scorer: Text = "keyword:gcg"
    """Decides whether a disallowed prompt was refused: a keyword list, or a judge of your own; see `safety.scorer`."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longer answers are cut off, and left out."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts that each rank answers at once."""
    max_prompts: Annotated[int, Field(ge=1)] | None = None
    """Prompts used of each file, taken evenly; all by default."""


class _MemorySource(Section):
    """The keys of the memory that come before those of RowsConfig."""

    source: Text | None = None
    """File or hub id of the rows to keep; or name `prompts`."""
    prompts: Text | None = None
    """File or hub id of disallowed prompts without answers, in the place of `source`. The aligned model answers them
    before the run, and its refusals are the rows (GR-SAP, arXiv 2603.10243). They are written once for all runs on that
    model, as `safecl memory build` writes them."""
    benign_prompts: Text | None = None
    """With `prompts`: harmless prompts, best ones that look dangerous, whose answers become rows, too. They keep
    over-refusal low."""
    answers: AnswersConfig = AnswersConfig()
    """With `prompts`: settings of the model's answers."""


class MemoryConfig(RowsConfig, _MemorySource):
    """The replay memory: rows whose behaviour must be kept, for safety usually disallowed prompts with refusals."""

    capacity: Annotated[Annotated[int, Field(ge=1)] | str, AfterValidator(_rows_or_bytes)] = 20000
    """Largest size: a number of rows, or bytes on disk like `2GB`."""
    policy: Literal["reservoir", "balanced", "fifo"] = "reservoir"
    """The rows that stay when the memory is full. reservoir: a uniform sample of all rows seen; balanced: equally many
    of each category; fifo: the latest."""
    balance_by: str = "category"
    """The categories of `balanced` and mix_cd: `task`, `source`, or the name of a tag (a further column of the row).
    `kind`: where a row has no such tag, refusal or answer by the row's own text."""
    draw: Literal["auto", "uniform", "balanced", "loss_aware", "mix_cd"] = "auto"
    """The rows that a step draws. balanced: every category equally often; loss_aware: in proportion to the row's last
    loss; mix_cd: in proportion to how often such rows got worse than under the aligned model; auto: balanced where the
    policy is or `shares` are given, else uniform."""
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Shares of the drawn rows by category, for balanced draws: `{refusal: 0.25}` with `balance_by: kind`. All other
    categories share the rest equally. Harmless rows in three quarters of the draws keep over-refusal low."""
    damage_margin: Annotated[float, Field(ge=0)] = 0.5
    """mix_cd: nats per token by which a row's loss must exceed the aligned model's to count as damaged."""
    prefix_tokens: Annotated[int, Field(ge=1)] | None = None
    """Keep only this many supervised tokens of each row and nothing after them: the same bytes then hold more rows."""
    rest_steps: Annotated[int, Field(ge=0)] = 0
    """Steps that a drawn row rests before it can be drawn again."""
    guard: GuardConfig | None = None
    """Conditions under which a row stays out of the memory."""
    replay_ratio: Annotated[float, Field(gt=0, le=4)] = 0.1
    """Replay tokens per task token in a step, for each independent draw."""
    replay_ratio_end: Annotated[float, Field(gt=0, le=4)] | None = None
    """The same at the end of a task; the ratio moves there evenly, step by step. By default it stays. Methods with a
    share of their own keep that."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longer rows are cut to this many tokens."""
    teacher: TeacherConfig = TeacherConfig()
    """The teacher outputs of replayed rows (used by DER)."""
    keep_task_rows: Annotated[int, Field(ge=0)] = 0
    """Number of rows of each finished task that enter the memory before the next task, with the outputs of the model
    that the task produced. Poisoned rows of the task enter, too."""

    _written: str | None = PrivateAttr(None)
    """File of the rows that the aligned model has written."""

    @model_validator(mode="after")
    def _names_rows_or_prompts(self) -> MemoryConfig:
        if self.source is None and self.prompts is None:
            raise ValueError(
                "name `source`, the rows whose behaviour must be kept, or `prompts`, disallowed prompts to which the "
                "aligned model writes its refusals itself"
            )
        if self.source is not None and (self.prompts is not None or self.benign_prompts is not None):
            raise ValueError("source has rows with answers, and the model answers `prompts` itself; leave one out")
        if self.prompts is not None:
            of_files = {"split": self.split != "train", "format": self.format != "auto", "fields": self.fields}
            if given := [key for key, value in of_files.items() if value]:
                raise ValueError(f"{given[0]} is about the rows of `source`; leave it out with `prompts`")
        return self

    @model_validator(mode="after")
    def _shares_are_those_of_a_balanced_draw(self) -> MemoryConfig:
        if self.shares and self.draw not in ("auto", "balanced"):
            raise ValueError(f"shares: a draw that is {self.draw} has none; use draw: balanced, or leave out `shares`")
        if self.shares and not 0 < sum(self.shares.values()) <= 1 + 1e-9:
            raise ValueError(
                f"shares: their sum is {sum(self.shares.values()):g}; it must lie above 0 and be 1 at most"
            )
        return self

    @property
    def drawn_by(self) -> Literal["uniform", "balanced", "loss_aware", "mix_cd"]:
        """The rule of the draws, with `auto` resolved."""
        if self.draw != "auto":
            return self.draw
        return "balanced" if self.policy == "balanced" or self.shares else "uniform"

    def replay_ratio_at(self, progress: float) -> float:
        """Replay tokens per task token at a point of a task, from 0 to 1."""
        end = self.replay_ratio if self.replay_ratio_end is None else self.replay_ratio_end
        return self.replay_ratio + (end - self.replay_ratio) * progress

    @property
    def largest_replay_ratio(self) -> float:
        """The largest of a task."""
        return max(self.replay_ratio_at(0.0), self.replay_ratio_at(1.0))

    @property
    def rows_source(self) -> RowsSource:
        """The rows that fill the memory; with `prompts`, only once they are written."""
        path = self._written if self.source is None else self.source
        assert path is not None, "the model writes its rows before they are read"
        return self._source(path)

    @property
    def origin(self) -> str:
        """The file that the user has named: of the rows, or of the prompts."""
        origin = self.prompts if self.source is None else self.source
        assert origin is not None, "a memory names rows or prompts"
        return origin

    @property
    def awaits_rows(self) -> bool:
        """True where the aligned model has yet to write the rows."""
        return self.source is None and self._written is None

    def with_written(self, rows: Path) -> MemoryConfig:
        """Return the same memory with the file of the rows that the model has written. It stands in no saved config."""
        copy = self.model_copy()
        copy._written = str(rows)
        return copy
