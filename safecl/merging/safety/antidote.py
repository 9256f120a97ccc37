"""Antidote: removes the weights that harmful rows rely on most.

    S_ij = |W_ij| sqrt(mean x_j^2)        x: inputs of the layer on harmful rows (Wanda, Sun et al., arXiv 2306.11695)
    W_ij <- 0        for the `ratio` of each output row with the largest S

For the linear layers of the blocks; all other tensors stay as tuned. Source: Huang et al., Antidote, arXiv 2408.09600,
whose code prunes the factors of adapters, or whole weights; ratio is its default. Ours: with an aligned model, D =
W_tuned - W_aligned takes the place of W: the entries of the change are removed, which is what pruning an adapter means
for dense weights. Rows without answers get affirmative openings, see safecl.merging.rows.affirmative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.merging import base
from safecl.merging.rows.settings import ForwardConfig

if TYPE_CHECKING:
    import torch


class Config(ForwardConfig):
    """Weights that harmful rows rely on, removed."""

    needs: ClassVar[base.Needs] = base.Needs(
        base="no",
        aligned="optional",
        most=1,
        data="harmful prompts, with harmful answers or without answers; without a file safecl's own requests",
        data_optional=True,
    )

    ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the weights of each output row that is removed, at least one weight; 0 removes nothing."""


class Merge(base.Merge[Config]):
    def prepare(self) -> None:
        from safecl.engine.model.dtypes import CONFIG_DTYPES
        from safecl.merging.rows.inputs import input_squares
        from safecl.merging.rows.loaded import load
        from safecl.merging.rows.reading import harmful_rows

        config, models = self.config, self.models
        self.rows = harmful_rows(config, models)
        loaded = load(models, models.tuned[0], CONFIG_DTYPES[config.rows_dtype], config.trust_remote_code)
        self.squares = input_squares(loaded, self.rows.rows)
        self.transposed = {name for name, layer in loaded.linear_layers().items() if layer.transposed}
        self.removed = self.elements = 0

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        tuned, aligned = tensors.tuned[0], tensors.aligned
        if tensors.name not in self.squares or self.config.ratio == 0:
            return tuned
        scores = (tuned if aligned is None else tuned - aligned).abs()
        by_output = scores.T if tensors.name in self.transposed else scores
        by_output.mul_(self.squares[tensors.name].sqrt().to(scores.dtype))
        num = max(1, int(self.config.ratio * by_output.shape[1]))
        rows = tuned.T if tensors.name in self.transposed else tuned
        places = by_output.topk(num, dim=1).indices
        if aligned is None:
            rows.scatter_(1, places, 0.0)
        else:
            kept = aligned.T if tensors.name in self.transposed else aligned
            rows.scatter_(1, places, kept.gather(1, places))
        self.removed += places.numel()
        self.elements += tuned.numel()
        return tuned

    def notes(self) -> list[str]:
        what = "weights" if self.models.aligned is None else "changes"
        share = self.removed / max(1, self.elements)
        return [self.rows.note, f"{self.removed} of {self.elements} {what} of linear layers removed ({share:.1%})"]
