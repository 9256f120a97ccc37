"""The losses of one pass over a global step."""

from __future__ import annotations

import torch

from safecl.distributed import collectives
from safecl.engine.passes.micro_batches import StepBatch
from safecl.kernels.repeatable import add_at_

ADAPTERS = "adapter_penalty"
"""Name of the term of the penalty on LoRA's products."""


class StepLosses:
    """Losses of one pass, as sums over this rank's micro-batches.

    `totals` adds the ranks up, which is the only collective call that logging needs.
    """

    def __init__(self, terms: list[str], device: torch.device, world_size: int):
        self.terms = terms
        self.world_size = world_size
        self.penalty = torch.zeros(())
        """This rank's part of the weight penalty."""
        self.num_tokens = 0
        """Tokens that went through the model on this rank."""
        self.stop = False
        """True where this rank was asked to stop. `totals` carries it to all ranks, so that they stop after the same
        step."""
        self._sums = torch.zeros(len(terms), dtype=torch.float64, device=device)
        self._replayed: list[tuple[list[int], torch.Tensor]] = []

    def add(self, batch: StepBatch, output: dict[str, torch.Tensor]) -> None:
        """Add the per-token losses of one micro-batch, times their weights, which hold 1 / N_term and the world
        size."""
        self._add(batch.terms, batch.inputs["ce_weights"], output["ce"])
        for index, (terms, distillation) in enumerate(zip(batch.kd_terms, batch.inputs["distillations"], strict=True)):
            self._add(terms, distillation["kd_weights"], output[f"kd{index}"])
        for index, (terms, feature) in enumerate(zip(batch.feature_terms, batch.inputs["features"], strict=True)):
            self._add(terms, feature["weights"], output[f"feature{index}"])
        if "adapters" in output:
            self._sums[self.terms.index(ADAPTERS)] += output["adapters"].double() / self.world_size
        self.num_tokens += batch.num_tokens
        self._keep_rows(batch, output["ce"])

    def _keep_rows(self, batch: StepBatch, ce: torch.Tensor) -> None:
        """Keep the mean NLL of each row of the memory, on the device."""
        rows = [number for number, key in enumerate(batch.keys) if key is not None]
        if rows:
            row_of = batch.row_of.to(ce.device)
            sums = torch.zeros(len(batch.keys), dtype=torch.float64, device=ce.device)
            add_at_(sums, row_of, ce.double())
            counts = torch.bincount(row_of, minlength=len(batch.keys))
            keys = [key for key in batch.keys if key is not None]
            self._replayed.append((keys, (sums / counts)[rows]))

    def of_replayed_rows(self) -> dict[int, float]:
        """Mean NLL of the memory's rows that this rank computed, by key; NaN for a row without targets."""
        return {key: loss for keys, losses in self._replayed for key, loss in zip(keys, losses.tolist(), strict=True)}

    def _add(self, terms: torch.Tensor, weights: torch.Tensor, losses: torch.Tensor) -> None:
        weighted = losses.double() * weights.to(self._sums.device)
        add_at_(self._sums, terms.to(self._sums.device), weighted / self.world_size)

    def totals(self) -> dict[str, float]:
        """Loss of each term over the whole global step, coefficients included; `penalty`; `tokens`; and `stop`, the
        number of ranks that were asked to. A collective call."""
        extra = [float(self.penalty), self.num_tokens, self.stop]
        values = torch.tensor(extra, dtype=torch.float64, device=self._sums.device)
        sums = collectives.all_reduce_sum(torch.cat([self._sums, values]))
        return dict(zip([*self.terms, "penalty", "tokens", "stop"], sums.tolist(), strict=True))
