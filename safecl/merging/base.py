"""The interface of a kind of merge.

A file with a merge defines `Config` (a MergeConfig: what it needs, its settings) and `Merge` (a base.Merge: the
arithmetic). The calls, in their order:

    prepare             once, with all models at hand; a merge that runs data through a model does it here
    observe, end_pass   `num_passes` passes over all tensors, for thresholds and norms of whole models
    combine             the result, tensor by tensor, in fp32
    notes               lines for the report

Importing such a file imports no torch: it works with the methods of tensors, and imports helpers where it uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import Field

from safecl.config import ConfigError, Section
from safecl.merging.places import Coefficient, Place, value_at

if TYPE_CHECKING:
    import torch


class Unmergeable(ConfigError):
    """Models that do not fit together, or values that cannot be stored; the message names what is wrong."""


@dataclass(frozen=True)
class Needs:
    """The models and data that a kind of merge works with.

    base, aligned: whether it needs the model, can use it, or has no use for it. fewest, most: numbers of tuned models.
    data: what the rows in `data` are, for messages; empty where it takes none.
    """

    base: Literal["yes", "no", "optional"] = "yes"
    aligned: Literal["yes", "no", "optional"] = "no"
    fewest: int = 1
    most: int | None = None
    data: str = ""
    data_optional: bool = False


class MergeConfig(Section):
    """Settings that every kind of merge has."""

    needs: ClassVar[Needs] = Needs()
    usual_sweep: ClassVar[str] = ""
    """The sweep of the setting that trades the task for safety, as `--sweep` takes it; empty where there is none."""
    takes_checkpoints: ClassVar[bool] = False
    """Whether tuned models may be checkpoints that a run has kept."""

    @property
    def reads_averages(self) -> bool:
        """Whether the average in a checkpoint is read, and not the weights."""
        return False

    dtype: Literal["same", "bf16", "fp16", "fp32"] = "same"
    """Dtype of the result's weights; `same` is that of the first tuned model, tensor by tensor."""
    adapter_rank: Annotated[int, Field(ge=1)] | None = None
    """Write a LoRA adapter of this rank, the best approximation of the result minus the base (truncated SVD), instead
    of whole weights."""
    related: bool = True
    """Refuse models whose weights have nothing in common, which were not tuned from one base."""
    same_tokens: bool = True
    """Refuse models whose tokenizers give one id to different tokens."""
    max_file_bytes: Annotated[int, Field(ge=1)] = 2 * 2**30
    """Size at which a further weight file begins."""


class Weights(Protocol):
    """The tensors of one model, read one at a time.

    A folder, an adapter over its base, a run's reference store or gathered shards can be one.
    """

    @property
    def label(self) -> str:
        """The model's role and path, for messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) along the first dimension as a new fp32 tensor on the CPU. Raises UnusableWeights
        where they are damaged or not finite."""


@dataclass(frozen=True)
class Models:
    """The models that are merged. All have tensors of the same names and shapes.

    places: the place of each tensor. data: the file of rows, where one was given. folders: the folder of each model by
    `base`, `aligned`, `tuned`, `tuned 2`, ..., for merges that load one.
    """

    tuned: Sequence[Weights]
    base: Weights | None = None
    aligned: Weights | None = None
    places: Mapping[str, Place] = field(default_factory=dict)
    data: Path | None = None
    folders: Mapping[str, str] = field(default_factory=dict)

    @property
    def num(self) -> int:
        """Number of models."""
        return len(self.tuned) + (self.base is not None) + (self.aligned is not None)


@dataclass(frozen=True)
class Tensors:
    """The values of one tensor (or of some of its rows) in all models: fp32, of one shape, for the merge to overwrite.

    start: the first row, 0 for a whole tensor.
    """

    place: Place
    tuned: list[torch.Tensor]
    base: torch.Tensor | None = None
    aligned: torch.Tensor | None = None
    start: int = 0

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def needed_base(self) -> torch.Tensor:
        """The base's values, for merges that need a base."""
        assert self.base is not None, "the merge says that it needs a base"
        return self.base

    @property
    def needed_aligned(self) -> torch.Tensor:
        """The aligned model's values, for merges that need one."""
        assert self.aligned is not None, "the merge says that it needs an aligned model"
        return self.aligned

    def task_vectors(self) -> list[torch.Tensor]:
        """Return tau_i = tuned_i - base, in the memory of the tuned models' values."""
        return [tuned.sub_(self.needed_base) for tuned in self.tuned]

    def value(self, coefficient: Coefficient) -> float:
        """A coefficient's value for this tensor."""
        return value_at(coefficient, self.place)


C = TypeVar("C", bound=MergeConfig)


class Merge(Generic[C]):
    """Base of all merges."""

    by_rows: ClassVar[bool] = False
    """Whether an element of the result depends on the same element of the models only. Large tensors then come a few
    rows at a time, which takes less memory and time."""
    reads_ahead: ClassVar[bool] = False
    """Whether the next whole tensors are read while these are worked on, where `by_rows` is not set. `observe` and
    `combine` must then take no memory of a tensor's size."""

    def __init__(self, config: C, models: Models):
        self.config = config
        self.models = models
        self.freed = 0
        """Bytes of values that were worked on since the allocator gave memory back; see safecl.merging.stream."""

    @property
    def num_passes(self) -> int:
        """Number of passes over all tensors before the result is formed."""
        return 0

    def prepare(self) -> None:
        """Do what comes before all passes, such as running rows through a model."""

    def observe(self, tensors: Tensors, number: int) -> None:
        """Look at one tensor in pass `number`."""

    def end_pass(self, number: int) -> None:
        """Draw conclusions from a pass."""

    def combine(self, tensors: Tensors) -> torch.Tensor:
        """Return the result's values: fp32, of the same shape. They may lie in the memory of any of `tensors`."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Lines for the report, after the last tensor."""
        return []
