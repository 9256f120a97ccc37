"""The losses of one pass over a global step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from safecl.distributed import collectives
from safecl.engine.passes.micro_batches import StepBatch
from safecl.kernels.repeatable import add_at_

ADAPTERS = "adapter_penalty"
"""Name of the term of the penalty on LoRA's products."""
TO_TEACHER = ", distance to the teacher"


@dataclass(frozen=True)
class _TokenLosses:
    """The losses of one micro-batch per target, with the row and the terms of each."""

    row_of: torch.Tensor
    terms: torch.Tensor
    kd_terms: list[torch.Tensor]
    ce: torch.Tensor
    kd: list[torch.Tensor]
    indices: list[int | None]

    def not_finite(self, names: list[str]) -> Iterator[tuple[str, int]]:
        """Yield (term, row) of losses that are not finite. Where the model's own loss is not, no distance is named."""
        own = self.ce.isfinite().logical_not().cpu()
        yield from self._named(names, self.terms, own, "")
        for terms, distances in zip(self.kd_terms, self.kd, strict=True):
            yield from self._named(names, terms, distances.isfinite().logical_not().cpu() & ~own, TO_TEACHER)

    def _named(
        self, names: list[str], terms: torch.Tensor, bad: torch.Tensor, suffix: str
    ) -> Iterator[tuple[str, int]]:
        pairs = zip(terms[bad].tolist(), self.row_of[bad].tolist(), strict=True)
        yield from ((names[term] + suffix, row) for term, row in dict.fromkeys(pairs))


class StepLosses:
    """Losses of one pass, as sums over this rank's micro-batches.

    `totals` adds the ranks up, which is the only collective call that logging needs.
    """

    def __init__(self, terms: list[str], device: torch.device, world_size: int):
        self.terms = terms
        self.world_size = world_size
        self.penalty = torch.zeros(())
        """This rank's part of the weight penalty."""
        self.nonfinite: torch.Tensor | None = None
        """The number of elements of this rank's shards that the update has made NaN or infinite."""
        self.num_tokens = 0
        """Tokens that went through the model on this rank."""
        self.stop = False
        """True where this rank was asked to stop. `totals` carries it to all ranks, so that they stop after the same
        step."""
        self._sums = torch.zeros(len(terms), dtype=torch.float64, device=device)
        self._replayed: list[tuple[list[int], torch.Tensor]] = []
        self._batches: list[_TokenLosses] = []

    def add(self, batch: StepBatch, output: dict[str, torch.Tensor]) -> None:
        """Add the per-token losses of one micro-batch, times their weights, which hold 1 / N_term and the world
        size."""
        self._add(batch.terms, batch.inputs["ce_weights"], output["ce"])
        for index, (terms, distillation) in enumerate(zip(batch.kd_terms, batch.inputs["distillations"], strict=True)):
            self._add(terms, distillation["kd_weights"], output[f"kd{index}"])
        for index, (terms, feature) in enumerate(zip(batch.feature_terms, batch.inputs["features"], strict=True)):
            self._add(terms, feature["weights"], output[f"feature{index}"])
        for index, (terms, information) in enumerate(
            zip(batch.label_terms, batch.inputs.get("labels", []), strict=True)
        ):
            self._add(terms, information["weights"], output[f"label{index}"])
        if "noise" in batch.inputs:
            self._add(batch.noise_terms, batch.inputs["noise"]["weights"], output["noise"])
        if "adapters" in output:
            self._sums[self.terms.index(ADAPTERS)] += output["adapters"].double() / self.world_size
        self.num_tokens += batch.num_tokens
        self._keep_rows(batch, output["ce"])
        kd = [output[f"kd{index}"] for index in range(len(batch.kd_terms))]
        self._batches.append(_TokenLosses(batch.row_of, batch.terms, batch.kd_terms, output["ce"], kd, batch.indices))

    def _keep_rows(self, batch: StepBatch, ce: torch.Tensor) -> None:
        """Keep the mean NLL of each row of the memory, on the device."""
        if batch.replayed is not None:
            row_of = batch.row_of.to(ce.device, non_blocking=True)
            sums = torch.zeros(len(batch.keys), dtype=torch.float64, device=ce.device)
            add_at_(sums, row_of, ce.double())
            means = sums / batch.row_counts.to(ce.device, non_blocking=True)
            keys = [key for key in batch.keys if key is not None]
            self._replayed.append((keys, means[batch.replayed.to(ce.device, non_blocking=True)]))

    def of_replayed_rows(self) -> dict[int, float]:
        """Mean NLL of the memory's rows that this rank computed, by key; NaN for a row without targets."""
        return {key: loss for keys, losses in self._replayed for key, loss in zip(keys, losses.tolist(), strict=True)}

    def of_task_rows(self) -> dict[int, float]:
        """Mean NLL of the task's rows that this rank computed, by their place in the data set; of rows with targets and
        a weight. It waits for the device."""
        found: dict[int, float] = {}
        for batch in self._batches:
            sums = torch.zeros(len(batch.indices), dtype=torch.float64, device=batch.ce.device)
            add_at_(sums, batch.row_of.to(batch.ce.device), batch.ce.double())
            counts = torch.bincount(batch.row_of, minlength=len(batch.indices))
            means = zip(batch.indices, (sums.cpu() / counts).tolist(), strict=True)
            found |= {index: mean for index, mean in means if index is not None}
        return found

    def not_finite(self) -> dict[str, list[tuple[int, int]]]:
        """Return this rank's terms with a loss that is not finite, each with its rows where they are known.

        A row is (micro-batch, row of it). A distance to a teacher that is not finite by itself is a term of its own.
        """
        found: dict[str, list[tuple[int, int]]] = {}
        for number, batch in enumerate(self._batches):
            for term, row in batch.not_finite(self.terms):
                found.setdefault(term, []).append((number, row))
        for term, value in zip(self.terms, self._sums.tolist(), strict=True):
            if not math.isfinite(value) and not any(name.split(TO_TEACHER)[0] == term for name in found):
                found[term] = []
        return found

    def _add(self, terms: torch.Tensor, weights: torch.Tensor, losses: torch.Tensor) -> None:
        device = self._sums.device  # terms and weights are in page-locked memory, so nobody waits for the copies
        weighted = losses.double() * weights.to(device, non_blocking=True)
        add_at_(self._sums, terms.to(device, non_blocking=True), weighted / self.world_size)

    def totals(self) -> dict[str, float]:
        """Loss of each term over the whole global step, coefficients included; `penalty`; `tokens`; `nonfinite`; and
        `stop`, the number of ranks that were asked to. A collective call."""
        nonfinite = 0 if self.nonfinite is None else int(self.nonfinite)
        extra = [float(self.penalty), self.num_tokens, nonfinite, self.stop]
        values = torch.tensor(extra, dtype=torch.float64, device=self._sums.device)
        sums = collectives.all_reduce_sum(torch.cat([self._sums, values]))
        return dict(zip([*self.terms, "penalty", "tokens", "nonfinite", "stop"], sums.tolist(), strict=True))
