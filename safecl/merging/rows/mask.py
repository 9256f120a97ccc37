"""Learns a mask over task vectors from rows, by the relaxed Bernoulli distribution; see safecl.merging.safety.somf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from safecl.merging.base import Models, Tensors
from safecl.merging.rows.gradients import answer_losses, gradient_of
from safecl.merging.rows.loaded import LoadedModel, load
from safecl.merging.rows.reading import Rows

_SMALLEST = 1e-6


class MaskSettings(Protocol):
    """The settings of somf that the training of its mask reads."""

    steps: int
    rows_per_step: int
    learning_rate: float
    temperature: float
    rescale: bool
    seed: int
    trust_remote_code: bool


class Examples(Protocol):
    """Rows that a mask is learned from."""

    @property
    def note(self) -> str:
        """A line for the report."""

    def __len__(self) -> int: ...

    def begin(self, loaded: LoadedModel) -> None:
        """Look at the fused model without a mask, before one is learned."""

    def losses(self, loaded: LoadedModel, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the loss of each of these examples, 0-dim with its graph."""


@dataclass(frozen=True)
class Answers:
    """Rows whose answers shall be likely. Implements Examples."""

    rows: Rows

    @property
    def note(self) -> str:
        return self.rows.note

    def __len__(self) -> int:
        return len(self.rows.rows)

    def begin(self, loaded: LoadedModel) -> None:
        pass

    def losses(self, loaded: LoadedModel, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        yield from answer_losses(loaded, [self.rows.rows[i] for i in indices])


@dataclass
class Mask:
    """The elements that are kept, bool on the CPU, by tensor. losses: mean of the rows' loss in the first and in the
    last step."""

    kept: Mapping[str, torch.Tensor]
    losses: tuple[float, float] = (float("nan"), float("nan"))

    def get(self, name: str) -> torch.Tensor | None:
        """Return the kept elements of a tensor; None for one that is not masked."""
        return self.kept.get(name)


@dataclass
class _Masked:
    """A parameter with its aligned values, its task vector and the logits of its mask."""

    parameter: torch.nn.Parameter
    aligned: torch.Tensor
    change: torch.Tensor
    logits: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.logits = torch.zeros_like(self.change, requires_grad=True)


def learn_mask(
    settings: MaskSettings, models: Models, examples: Examples, task_vector: Callable[[Tensors], torch.Tensor]
) -> Mask:
    """Learn a mask. task_vector: returns tau of one tensor, in the memory of its values."""
    assert models.aligned is not None, "the merge says that it needs an aligned model"
    loaded = load(models, models.aligned, torch.float32, settings.trust_remote_code)
    masked = dict(_masked(loaded, models, task_vector))
    for each in masked.values():
        each.parameter.data.add_(each.change)
    examples.begin(loaded)
    optimizer = torch.optim.Adam([each.logits for each in masked.values()], lr=settings.learning_rate)
    generator = torch.Generator(device=loaded.device).manual_seed(settings.seed)
    losses = []
    for batch in batches(len(examples), settings.rows_per_step, settings.steps, settings.seed):
        with torch.enable_grad():
            weights = {name: _weights(each, settings, generator) for name, each in masked.items()}
            for name, each in masked.items():
                each.parameter.data.copy_(weights[name].detach())
            losses.append(gradient_of(loaded, examples.losses(loaded, batch), len(batch)).loss)
            for name, each in masked.items():
                if each.parameter.grad is not None:
                    weights.pop(name).backward(each.parameter.grad)  # type: ignore[no-untyped-call]  # torch's own
                each.parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
    kept = {name: (each.logits.detach() >= 0).cpu() for name, each in masked.items()}
    return Mask(kept, (losses[0], losses[-1]) if losses else (float("nan"), float("nan")))


def _masked(
    loaded: LoadedModel, models: Models, task_vector: Callable[[Tensors], torch.Tensor]
) -> Iterator[tuple[str, _Masked]]:
    """Yield the parameters that tuning has changed."""
    from safecl.merging.stream import read_tensors

    for name, parameter in loaded.parameters.items():
        change = task_vector(read_tensors(models, name))
        if bool(change.any()):
            yield name, _Masked(parameter, parameter.detach().clone(), change.to(loaded.device))


def _weights(each: _Masked, settings: MaskSettings, generator: torch.Generator) -> torch.Tensor:
    """Return aligned + tau m / mean(m) for a drawn mask m, with a graph to its logits."""
    uniform = torch.empty_like(each.change).uniform_(generator=generator).clamp_(_SMALLEST, 1 - _SMALLEST)
    mask = torch.sigmoid((each.logits + uniform.logit()) / settings.temperature)
    return each.aligned + each.change * (mask / mask.mean() if settings.rescale else mask)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield `steps` batches of indices below `count`, epoch after epoch, each epoch in another order."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        del waiting[:size]
