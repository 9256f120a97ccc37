"""The quadratic penalties of the methods. Most belong to the optimizer's pass over the shard; with LoRA, a penalty of
the adapters' products joins the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from safecl.config import ModelConfig
from safecl.engine.fisher.file import open_fisher
from safecl.engine.fisher.fisher_adapter_penalty import read_fisher_pull
from safecl.engine.model.adapter_penalty import AdapterPenalty, EvenAdapterPenalty, OutsideAlignmentPenalty
from safecl.engine.passes.alignment_directions import read_directions
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.methods.base import Method
from safecl.methods.terms import Penalty


class Penalties:
    """Finds the place of each penalty. The function of a penalty of products is made once."""

    def __init__(self, engine: TrainingEngine, model: ModelConfig, *, has_adapters: bool, fisher_on_host: bool):
        """fisher_on_host: keep the Fisher of products in host memory instead of on the device."""
        self._model = model
        self.engine, self.has_adapters = engine, has_adapters
        self._fisher_device = torch.device("cpu") if fisher_on_host else engine.device
        self._pulls: dict[Penalty, AdapterPenalty] = {}

    def of(self, methods: Sequence[Method[Any]]) -> list[Penalty]:
        """Return all penalties of these methods."""
        return [penalty for method in methods if (penalty := method.penalty()) is not None]

    def in_update(self, methods: Sequence[Method[Any]]) -> list[Penalty]:
        """Return those that the optimizer's pass applies."""
        return [penalty for penalty in self.of(methods) if not (penalty.product and self.has_adapters)]

    def in_loss(self, methods: Sequence[Method[Any]]) -> AdapterPenalty | None:
        """Return the sum of those that are part of the loss; None where there is none."""
        penalties = [penalty for penalty in self.of(methods) if penalty.product] if self.has_adapters else []
        pulls = [self.pull_of(penalty) for penalty in penalties]

        def all_pulls(model: nn.Module) -> torch.Tensor:
            total = pulls[0](model)
            for pull in pulls[1:]:
                total = total + pull(model)
            return total

        return all_pulls if pulls else None

    def pull_of(self, penalty: Penalty) -> AdapterPenalty:
        """Return the penalty as a function of the model. This rank's share of its Fisher is read at the first call."""
        if penalty not in self._pulls:
            if penalty.base is not None:
                directions = read_directions(self.engine, penalty.base, self._model)
                self._pulls[penalty] = OutsideAlignmentPenalty(penalty.strength, directions)
            elif penalty.fisher_file is None:
                self._pulls[penalty] = EvenAdapterPenalty(penalty.strength, penalty.modules, penalty.factors)
            else:
                self._pulls[penalty] = read_fisher_pull(
                    open_fisher(penalty.fisher_file),
                    self.engine.module.model,
                    penalty.strength,
                    rank=self.engine.rank,
                    world_size=self.engine.layout.world_size,
                    device=self._fisher_device,
                )
        return self._pulls[penalty]
