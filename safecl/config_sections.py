"""The sections of a run config: what each key means, its unit, default and limits. safecl/config.py puts them together.

Imports no torch. The string under a field is its documentation; `safecl init` and docs/config.md are generated from these strings.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and the string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_is_its_defaults(cls, given: Any) -> Any:
        """`train:` with every key behind a comment sign reads as null."""
        if not isinstance(given, Mapping):
            return given
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, BaseModel)}
        return {key: value for key, value in given.items() if value is not None or key not in sections}


class MethodConfig(Section):
    """Base of every method's config (`methods: {name: {...}}`).

    A method says what it needs by class variables or properties: `needs_memory`; `needs_teacher`, stored outputs in the memory;
    `state_kinds`, what it keeps with one value per weight; `refuses_lora`, why it cannot be combined with adapters.
    """

    state_kinds: ClassVar[tuple[str, ...]] = ()
    """Kinds of state in the shards. By the ends of their names, `anchor`, `fisher` and `ema` live where deepspeed.offload says."""

    @property
    def online_teacher(self) -> str | None:
        """The model that the method asks in every step: aligned, previous, ema, or a folder; None where it asks none."""
        return None


class FieldMap(Section):
    """How to read rows whose columns are none of the known formats: templates over the row's own columns."""

    prompt: str
    """What the user says, e.g. `"Review: {sentence}\\nSentiment:"`; `{column}` is replaced by the row's value."""
    completion: str
    """What the assistant answers and what is trained, e.g. `"{label}"`."""
    system: str | None = None
    """System message, a template too."""
    values: dict[str, dict[str, str]] = {}
    """Replacement of values per column, e.g. `{label: {"0": negative, "1": positive}}`."""


DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "fields"]


class LoraConfig(Section):
    """Low-rank adapters through peft: only these are trained and saved."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is (alpha / r) B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter."""


class ModelConfig(Section):
    """The model that is tuned: a dense decoder-only Hugging Face model."""

    path: Text
    """Folder in Hugging Face layout, or a hub id. It is the aligned model, theta_0, unless the first task has role `align`."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; the model's own by default."""
    chat_template: str | None = None
    """Path of a Jinja chat template; the tokenizer's own by default, and a plain one where the tokenizer has none."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of weights and activations in the forward pass. Master weights and optimizer state are always fp32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; `auto` takes flash_attention_2 where it can be imported on a GPU, else sdpa, and says which."""
    lora: LoraConfig | None = None
    """Train adapters only; null trains all weights."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass (non-reentrant): less memory, about a third more compute."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you know that code."""


class EvalConfig(Section):
    """How well a task is done: measured before, after, and where `safety.every` says so."""

    path: Text
    """File or hub id of held-out rows."""
    format: DataFormat = "auto"
    """Format of the rows; see `tasks[].format`."""
    fields: FieldMap | None = None
    """Templates for `format: fields`; the task's own by default."""
    metric: Literal["exact_match", "label_accuracy", "gsm8k", "answer_nll"] = "exact_match"
    """exact_match and gsm8k generate an answer; label_accuracy takes the likeliest label; answer_nll is nats per answer token."""
    max_rows: Annotated[int, Field(ge=1)] = 200
    """Rows used, taken evenly from the file."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Tokens generated at most per answer."""


class TaskConfig(Section):
    """One task of the sequence."""

    name: Text
    """Short name, used in metrics and folders."""
    train: Text
    """Training rows: a local .jsonl, .json, .csv or .parquet file, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    format: DataFormat = "auto"
    """Row format: OpenAI messages, prompt_completion, alpaca, sharegpt, text, or fields (templates); auto detects it."""
    fields: FieldMap | None = None
    """Templates for `format: fields`."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows, taken evenly from the file."""
    role: Literal["task", "align"] = "task"
    """`align` marks the first task as the alignment stage: memory, Fisher and anchor are taken after it."""
    eval: EvalConfig | None = None
    """Utility of this task."""

    @model_validator(mode="after")
    def _fields_go_with_their_format(self) -> TaskConfig:
        if self.format == "fields" and self.fields is None:
            raise ValueError("format `fields` needs `fields: {prompt: ..., completion: ...}`")
        if self.fields is not None and self.format == "auto":
            self.format = "fields"
        return self


class TeacherConfig(Section):
    """What replayed rows are compared with: outputs that are stored with each row, or those of a model that is asked in every step."""

    kind: Literal["topk", "online"] = "topk"
    """topk: stored log-probabilities of the k likeliest tokens and the log of the remaining mass, per supervised token; online: the same of
    the model `source`, worked out in every step."""
    source: Text = "aligned"
    """online only. aligned: theta_0; previous: the model that the task before has handed over; ema: the average that the method `ema`
    keeps; else folder or hub id of any model with the same tokenizer."""
    k: Annotated[int, Field(ge=1)] = 64
    """Entries per token; 6 bytes each where they are stored."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the distribution; training uses the same."""
    indices: Literal["int32", "packed"] = "int32"
    """int32: 4 bytes per token id, read without a copy; packed: 2 bytes below 65,536 tokens of vocabulary, else 3."""

    @model_validator(mode="after")
    def _stored_are_those_of_the_aligned_model(self) -> TeacherConfig:
        if self.kind == "topk" and self.source != "aligned":
            raise ValueError(f"source: {self.source} needs kind: online; stored are the outputs of the model at a row's insertion")
        return self


class GuardConfig(Section):
    """Rows that stay out of the memory although the policy would take them."""

    max_nll: Annotated[float, Field(gt=0)] | None = None
    """Largest mean NLL of a row's targets under the aligned model, in nats per token."""
    max_deviations: Annotated[float, Field(gt=0)] | None = None
    """Largest distance of that NLL from the memory's median, in robust standard deviations (1.4826 MAD); 6 is a usual choice."""
    flag_tag: str | None = None
    """Tag by which a scorer marks rows; a row where it is neither empty, 0 nor false stays out."""

    @model_validator(mode="after")
    def _guards_something(self) -> GuardConfig:
        if self.max_nll is None and self.max_deviations is None and self.flag_tag is None:
            raise ValueError("set max_nll, max_deviations or flag_tag, or leave out `guard`")
        return self


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes in a size such as `500MB` or `1.5GiB`. Raises ValueError naming the units."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = match and _BYTES.get(match[2].upper())
    if not unit:
        raise ValueError(f"{text!r} is not a size; write a number of rows, or bytes like 500MB or 1.5GiB")
    return int(float(match[1]) * unit)


def _rows_or_bytes(value: Any) -> Any:
    if isinstance(value, str) and parse_bytes(value) < 1:
        raise ValueError(f"{value!r} holds nothing; write a number of rows, or bytes like 500MB or 1.5GiB")
    return value


class MemoryConfig(Section):
    """The replay memory: rows whose behaviour must be kept, for safety usually disallowed prompts with refusals."""

    source: Text
    """File or hub id of the rows to keep."""
    split: str = "train"
    """Split of a hub data set."""
    format: DataFormat = "auto"
    """Row format; see `tasks[].format`."""
    fields: FieldMap | None = None
    """Templates for `format: fields`."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows, taken evenly from the file."""
    capacity: Annotated[Annotated[int, Field(ge=1)] | str, AfterValidator(_rows_or_bytes)] = 20000
    """Held at most: a number of rows, or bytes on disk like `2GB`."""
    policy: Literal["reservoir", "balanced", "fifo"] = "reservoir"
    """Which rows stay when the memory is full. reservoir: a uniform sample of all rows seen; balanced: equally many of each category;
    fifo: the latest."""
    balance_by: str = "category"
    """What `balanced` and mix_cd tell apart: `task`, `source`, or the name of a tag (a column beside the row's text)."""
    draw: Literal["auto", "uniform", "balanced", "loss_aware", "mix_cd"] = "auto"
    """Which rows a step draws. balanced: every category equally often; loss_aware: in proportion to the row's last loss; mix_cd: in
    proportion to how often such rows got worse than under the aligned model; auto: balanced where the policy is, else uniform."""
    damage_margin: Annotated[float, Field(ge=0)] = 0.5
    """mix_cd: nats per token by which a row's loss must exceed the aligned model's to count as damaged."""
    prefix_tokens: Annotated[int, Field(ge=1)] | None = None
    """Keep only this many supervised tokens of each row and nothing after them: many short glimpses in the bytes of a few long rows."""
    rest_steps: Annotated[int, Field(ge=0)] = 0
    """Steps that a drawn row rests before it can be drawn again."""
    guard: GuardConfig | None = None
    """Rows that stay out."""
    replay_ratio: Annotated[float, Field(gt=0, le=4)] = 0.1
    """Replay tokens per task token in a step, for each independent draw."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Longer rows are cut to this many tokens."""
    teacher: TeacherConfig = TeacherConfig()
    """Stored teacher outputs (used by DER)."""
    keep_task_rows: Annotated[int, Field(ge=0)] = 0
    """Rows of each finished task that enter the memory before the next one, with the outputs of the model that it has handed over. A task
    with poisoned rows brings them along."""

    @model_validator(mode="after")
    def _fields_go_with_their_format(self) -> MemoryConfig:
        if self.fields is not None and self.format == "auto":
            self.format = "fields"
        return self


class TrainConfig(Section):
    """Optimization. Sizes are in tokens of the whole step, over all ranks and micro-batches."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the task's rows; ignored where max_steps is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps per task, instead of epochs."""
    tokens_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Task tokens per optimizer step; replay adds `memory.replay_ratio` of them. `auto`: at least 100 steps, 65,536 tokens at most."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] = 8192
    """Tokens in one forward pass of one rank: the knob for memory."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Longer rows are cut to this many tokens."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """packed: documents side by side in one sequence, no attention across; padded: one row each, grouped by length.
    auto: packed with flash attention, else padded (a block-diagonal mask costs more than padding)."""
    learning_rate: Annotated[float, Field(ge=0)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the task's steps with linearly rising learning rate."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to norms and biases."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    clip_scope: Literal["task", "total"] = "task"
    """task: the weight penalty is added after clipping; total: the norm includes it (one more all-reduce)."""
    seed: int = 0
    """Order of rows, draws from the memory, signs of the Fisher estimate, dropout."""
    max_bad_rows: Annotated[float, Field(ge=0)] = 0.01
    """Bad rows that are skipped with a message: a share below 1, a count from 1 on. More of them stop the run."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 5
    """Steps in a row without a finite gradient after which the run stops."""
    allow_few_steps: bool = False
    """Accept runs of fewer than 50 steps, or whose EMA keeps more than half its weight on the start."""


class OffloadConfig(Section):
    """What lives in host memory. State that is not offloaded lives beside the master weights."""

    optimizer: Literal["none", "cpu"] = "none"
    """Master weights, moments, and the optimizer step."""
    parameters: Literal["none", "cpu"] = "none"
    """The weights themselves between uses (stage 3 only)."""
    reference: Literal["none", "cpu"] = "cpu"
    """Anchors of weight penalties. cpu: theta_0 is read from the node's one copy of the reference weights, later anchors from pinned host
    memory; none: a copy beside each shard, 2 bytes per weight in bf16 (4 in fp32 and for later anchors), sharded."""
    fisher: Literal["none", "cpu"] = "none"
    """Fisher information, 2 bytes per weight in bf16 (4 in fp32), sharded."""
    ema: Literal["none", "cpu"] = "none"
    """The average of the weights, 4 bytes per weight, sharded."""


class DeepSpeedConfig(Section):
    """ZeRO. The DeepSpeed JSON is generated from this section and written into the run folder."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and weights."""
    offload: OffloadConfig = OffloadConfig()
    """What lives in host memory."""

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> DeepSpeedConfig:
        if self.offload.parameters == "cpu" and self.stage != 3:
            raise ValueError(f"offload.parameters: cpu needs stage 3, this is stage {self.stage}; set stage: 3 or offload.parameters: none")
        if self.offload.optimizer == "cpu" and self.stage == 0:
            raise ValueError("offload.optimizer: cpu needs stage 1, 2 or 3, this is stage 0; set stage: 2 or offload.optimizer: none")
        return self


class GateConfig(Section):
    """Limits that the tuned model must keep; the run ends with exit code 3 when it does not, or when the interval cannot tell."""

    max_asr: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest attack success rate."""
    max_over_refusal: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of benign prompts that are refused."""


_KEYWORD_SCORERS = ("keyword:gcg", "keyword:wei", "prefix:xstest")


def _name_of_scorer(name: str) -> str:
    importable = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:[A-Za-z_]\w*)?|[A-Za-z_]\w*:[A-Za-z_]\w*", name)
    prefix = name.partition(":")[0] in ("keyword", "prefix")
    if name in _KEYWORD_SCORERS or (importable and not prefix):
        return name
    near = difflib.get_close_matches(name, _KEYWORD_SCORERS, n=1, cutoff=0.4)
    hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(_KEYWORD_SCORERS)};"
    raise ValueError(f"no scorer is named {name!r}; {hint} a judge of your own is named by its module, my_package.judge")


class SafetyConfig(Section):
    """Safety measured beside the loss."""

    prompts: Text
    """Disallowed prompts: a file with a `prompt` column, or any known row format. Must not stand in memory, task or poison data."""
    benign_prompts: str | None = None
    """Benign prompts that look dangerous, for over-refusal. Rows with `safe: false` are left out."""
    scorer: Annotated[str, AfterValidator(_name_of_scorer)] = "keyword:gcg"
    """The scorer behind the headline rate: keyword:gcg, keyword:wei, prefix:xstest, or a judge that can be imported (my_package.judge,
    my_package.module:function). The three by keywords are always reported."""
    every: Literal["task", "never"] | Annotated[int, Field(ge=1)] = "task"
    """When to measure: before and after each task, also every so many steps, or never."""
    max_prompts: Annotated[int, Field(ge=1)] = 200
    """Prompts used of each file, taken evenly."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens generated at most per answer (greedy)."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts generated together on one rank."""
    gate: GateConfig | None = None
    """Limits for exit code 3."""

    @model_validator(mode="after")
    def _a_gate_needs_a_measurement(self) -> SafetyConfig:
        if self.gate is not None and self.every == "never":
            raise ValueError("a gate judges what was measured, and `every: never` measures nothing; set every: task or leave the gate out")
        return self


class PoisonConfig(Section):
    """Mixes harmful rows into the task's data, reproducibly, to measure what they do."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of poisoned rows in the mixed data."""
    source: str | None = None
    """File of poisoned rows."""
    format: DataFormat = "auto"
    """Row format; see `tasks[].format`."""
    fields: FieldMap | None = None
    """Templates for `format: fields`."""
    seed: int = 0
    """Which rows are taken and where they go."""

    @model_validator(mode="after")
    def _ratio_needs_a_source(self) -> PoisonConfig:
        if self.ratio > 0 and self.source is None:
            raise ValueError("ratio > 0 needs `source`, a file of poisoned rows")
        if self.fields is not None and self.format == "auto":
            self.format = "fields"
        return self


class ScanConfig(Section):
    """Screens the rows of all tasks before training, by the aligned model's own refusals and for near-duplicates."""

    action: Literal["report", "drop", "downweight", "refuse"] = "report"
    """What `train` does about flagged rows: report: lists them; drop: leaves them out; downweight: multiplies their weight in the loss by
    `weight`; refuse: ends with exit code 3 where more are flagged than harmless rows explain."""
    false_alarm: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """Share of harmless rows that may be flagged by their score."""
    benign: Text | None = None
    """File of rows or prompts that are known to be harmless and are like the upload's; the threshold comes from them, and `false_alarm`
    holds. Without it the threshold is estimated from the upload itself."""
    disallowed: Text | None = None
    """File of disallowed prompts that the model refuses, best ones that it was not aligned on: those that it has learned to refuse score
    higher than new ones. By default the memory's refused rows, else safety.prompts."""
    weight: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """downweight: factor of a flagged row's weight."""
    refusals: list[Text] = []
    """How the model refuses, in its own words; by default its most common answers to the disallowed prompts."""
    num_refusals: Annotated[int, Field(ge=1)] = 8
    """Different refusals that are taken from the model at most."""
    refusal_tokens: Annotated[int, Field(ge=1)] = 8
    """Tokens of a refusal that are scored."""


class PrivacyConfig(Section):
    """What of the users' text may appear in outputs, report, card and logs."""

    examples: Literal["full", "hashed", "none"] = "full"
    """full text, a hash of it, or nothing."""


class CheckpointConfig(Section):
    """Saving the whole state of the run, so that the same command goes on after a stop or a crash."""

    every: Annotated[int, Field(ge=1)] | Literal["task", "never"] = 500
    """Steps between two saves, counted over all tasks; each task's end is saved as well. task: only each task's end. never: only when a
    signal stops the run."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints that stay; older ones are deleted when a newer one is on the disk, so one more needs room. One takes 12 bytes per trained
    weight, 4 more with EMA, 4 with a Fisher (2 in bf16), 4 with an anchor that is not the base model."""


class ArtifactsConfig(Section):
    """What is worked out once for a base model and used by every run on it: teacher outputs, Fisher information, memory rows."""

    folder: Text | None = None
    """Folder that all runs share (and all nodes); by default $SAFECL_CACHE/artifacts or ~/.cache/safecl/artifacts."""


class LogConfig(Section):
    """Where progress goes; metrics.jsonl is always written."""

    every: Annotated[int, Field(ge=1)] = 10
    """Steps between console lines where there is no terminal."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Further trackers (extra `track`)."""
