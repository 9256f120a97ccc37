"""The config sections of the optimization, DeepSpeed, checkpoints, artifacts and logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from safecl.config.base import Section, Text, parse_bytes


def _at_least_a_megabyte(value: str) -> str:
    if parse_bytes(value) < 10**6:
        raise ValueError(f"{value!r} is too little; write 1MB or more, for example 2GiB")
    return value


LossMean = Literal["tokens", "rows", "capped"]
"""The means of the user's loss over a step."""


class TrainConfig(Section):
    """Optimization. Sizes are in tokens of the whole step, over all ranks and micro-batches."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the task's rows; ignored where max_steps is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps per task, instead of epochs."""
    tokens_per_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Task tokens per optimizer step; replay adds `memory.replay_ratio` of them. `auto`: at least 100 steps, 65,536
    tokens at most."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] = 8192
    """Tokens in one forward pass of one rank; lower it to save device memory."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Longer rows are cut to this many tokens."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """packed: documents side by side in one sequence, no attention across; padded: one row each, grouped by length.
    auto: packed with flash attention, else padded (a block-diagonal mask costs more than padding)."""
    learning_rate: Annotated[float, Field(ge=0)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "infinite"] = "cosine"
    """Learning rate after the warm-up. The first three warm up and decay anew in every task. infinite: warm-up and
    cool-down in the first task, then constant over all tasks, and annealed in the last 15 % of each."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the task's steps with linearly rising learning rate."""
    constant_ratio: Annotated[float, Field(gt=0, le=1)] = 0.55
    """infinite only: the constant learning rate, as a share of the peak."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; not applied to norms and biases."""
    loss_mean: LossMean = "tokens"
    """Mean of the user's loss over a step. tokens: every supervised token counts the same; rows: every row, whatever
    the length of its answer; capped: a token counts min(1, median answer length of the task / answer length of its
    row). rows and capped limit what single rows with long answers can do. The terms of methods do not change."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    clip_scope: Literal["task", "total"] = "task"
    """task: the weight penalty is added after clipping; total: the norm includes it (one more all-reduce)."""
    seed: int = 0
    """Seed of the order of rows, the draws from the memory, the signs of the Fisher estimate, and dropout."""
    deterministic: bool = False
    """On GPUs: only operations that add in a fixed order, so that repeated and resumed runs have the same bits. Slower;
    an operation that has no such form ends the run by name. CPUs need no setting."""
    max_bad_rows: Annotated[float, Field(ge=0)] = 0.01
    """Bad rows that are skipped with a message: a share below 1, a count from 1 on. More of them stop the run."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 5
    """Stop after this many steps in a row without a finite gradient, and after a quarter of the task's steps at the
    latest. Such steps change nothing. 0 and 1 stop at the first."""
    hang_timeout: Annotated[float, Field(gt=0)] | Literal["auto", "never"] = "auto"
    """Seconds that a step may be without progress. Then the run ends with code 1 and says which rank hangs and where;
    the stacks of all ranks are in `hangs/` of the run folder. auto: 10 x the median step + 60 s, and half an hour in
    the first three steps. never: wait for ever."""
    allow_little_memory: bool = False
    """Start a run although the memory plan of `safecl check` says that it does not fit on this machine."""
    allow_few_steps: bool = False
    """Accept runs of fewer than 50 steps, or whose EMA keeps more than half its weight on the start."""


class OffloadConfig(Section):
    """State that is kept in host memory (cpu). State that is not offloaded is kept with the master weights."""

    optimizer: Literal["none", "cpu"] = "none"
    """Master weights, moments, and the optimizer step."""
    parameters: Literal["none", "cpu"] = "none"
    """The weights of the model between uses (stage 3 only)."""
    reference: Literal["none", "cpu"] = "cpu"
    """Anchors of weight penalties. cpu: theta_0 is read from the node's single copy of the reference weights, later
    anchors from pinned host memory; none: a copy with each shard, 2 bytes per weight in bf16 (4 in fp32 and for later
    anchors), sharded."""
    fisher: Literal["none", "cpu"] = "none"
    """Fisher information, 2 bytes per weight in bf16 (4 in fp32), sharded."""
    ema: Literal["none", "cpu"] = "none"
    """The average of the weights, 4 bytes per weight, sharded. cpu: on a GPU it follows the weights while the next step
    computes."""


class DeepSpeedConfig(Section):
    """ZeRO. The DeepSpeed JSON is generated from this section and written into the run folder."""

    stage: Literal[0, 1, 2, 3] = 2
    """Sharded over the ranks: 0: nothing; 1: the optimizer state; 2: gradients, too; 3: weights, too."""
    offload: OffloadConfig = OffloadConfig()
    """State that is kept in host memory."""
    overlap_comm: bool = False
    """Reduce gradients during the backward pass, on a stream of their own, for ranks that are connected slowly; what it
    saves is not measured yet. Takes a second communication bucket on each device, 1 GB in bf16 (stages 1 and 2) or 2 GB
    (stage 3)."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs: the dtype in which gradients cross the network, once per micro-batch. bf16 halves the traffic and
    rounds each summand to 8 bits; sums stay fp32 on each rank."""
    evaluation: Literal["auto", "whole", "streamed"] = "auto"
    """Stage 3: the weights while answers are generated. whole: all gathered, once for the whole evaluation; streamed:
    gathered layer by layer for every token, which is then generated for all prompts of a rank together; auto: whole
    where they fit each device beside what it holds."""

    @model_validator(mode="after")
    def _offload_of_parameters_needs_stage_3(self) -> DeepSpeedConfig:
        if self.offload.parameters == "cpu" and self.stage != 3:
            raise ValueError(
                f"offload.parameters: cpu needs stage 3, this is stage {self.stage}; set stage: 3 or "
                "offload.parameters: none"
            )
        return self

    @model_validator(mode="after")
    def _offload_of_the_optimizer_needs_a_stage(self) -> DeepSpeedConfig:
        if self.offload.optimizer == "cpu" and self.stage == 0:
            raise ValueError(
                "offload.optimizer: cpu needs stage 1, 2 or 3, this is stage 0; set stage: 2 or offload.optimizer: none"
            )
        return self


class CheckpointConfig(Section):
    """Saving the whole state of the run, so that the same command resumes it after a stop or a crash."""

    every: Annotated[int, Field(ge=1)] | Literal["task", "never"] = 500
    """Steps between two saves, counted over all tasks; each task's end is saved as well. task: only each task's end.
    never: only when a signal stops the run."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Number of checkpoints to keep. Older ones are deleted only when a newer one is on the disk, so leave room for one
    more. One takes 12 bytes per trained weight, 4 more with EMA, 4 with a Fisher (2 in bf16), 4 with an anchor that is
    not the base model."""

    staging: Annotated[str, AfterValidator(_at_least_a_megabyte)] = "2GiB"
    """Host memory of each rank through which its state is copied. State that fits holds training up for the copy only;
    of larger state training waits until all but this much is on the disk."""


class ArtifactsConfig(Section):
    """Results that are computed once for a base model and used by every run on it: teacher outputs, Fisher information,
    memory rows."""

    folder: Text | None = None
    """Folder that all runs share (and all nodes); by default $SAFECL_CACHE/artifacts or ~/.cache/safecl/artifacts."""


class LogConfig(Section):
    """Reports of the run's progress; metrics.jsonl is always written."""

    every: Annotated[int, Field(ge=1)] = 10
    """Steps between console lines where there is no terminal."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Further trackers (extra `track`)."""
