"""Safe Delta: keeps the changes that cost least safety, and lets the other weights make up for what they cost.

    H = 2/N sum x x^T + 0.01 mean(diag H) I      x: inputs of the layer in the aligned model, on safe rows
    U = upper Cholesky factor of H^-1,    d_m = U_mm
    cost of a change:  delta_m^2 / d_m^2         (Optimal Brain Surgeon; d_m as in SparseGPT, arXiv 2301.00774)
    kept: changes in the order of growing 1 / d_m^2, as long as the sum of their costs is within the budget
    W_m <- W_m + delta_m where kept;    W_k -= (W_m,before - W_m) / d_m U_mk    for later columns k > m

For the linear layers of the blocks, from the aligned matrix on, in blocks of 1024 columns. The budget of a block is
s/2 mean(1/d^2), times its number of elements over that of a block of the source's model, 4096 x 1024; the 15 % of the
elements with the largest 1/d^2 are never kept. Source: Lu et al., Safe Delta, arXiv 2505.12038, and the authors' code.
Ours: the inputs are those of the aligned model in all layers, where the code runs the changed layers before the next
one; the budget counts elements in narrow matrices too; embeddings, norms and the head stay as tuned, where the code
leaves them aligned.

Memory: the aligned model, and InputProducts' 4 GiB of H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from safecl.merging import base
from safecl.merging.rows.settings import ForwardConfig

if TYPE_CHECKING:
    import torch

COLUMNS = 1024
"""Columns of a block."""
ELEMENTS = 4096 * COLUMNS
"""Elements of a block of the source's model."""
AT_ONCE = 4
"""Columns that are settled together, without compensation among them."""
DAMPING, NEVER_KEPT = 0.01, 0.15


class Config(ForwardConfig):
    """Changes that cost little safety, with compensation."""

    needs: ClassVar[base.Needs] = base.Needs(
        base="no", aligned="yes", most=1, data="disallowed prompts with refusals, as for `memory.source`"
    )

    s: Annotated[float, Field(ge=0)] = 0.11
    """Budget of lost safety; 0 keeps no change of linear layers, more keeps more."""


class Merge(base.Merge[Config]):
    def prepare(self) -> None:
        from safecl.engine.model.dtypes import CONFIG_DTYPES
        from safecl.merging.rows.inputs import InputProducts
        from safecl.merging.rows.loaded import load
        from safecl.merging.rows.reading import rows_with_answers

        config, models = self.config, self.models
        assert models.aligned is not None, "the merge says that it needs an aligned model"
        self.rows = rows_with_answers(config, models)
        loaded = load(models, models.aligned, CONFIG_DTYPES[config.rows_dtype], config.trust_remote_code)
        self.products = InputProducts(loaded, self.rows.rows, list(models.places))
        self.kept = self.elements = 0

    def combine(self, tensors: base.Tensors) -> torch.Tensor:
        layer = self.products.layers.get(tensors.name)
        tuned, aligned = tensors.tuned[0], tensors.needed_aligned
        if layer is None or not bool((tuned != aligned).any()):
            return tuned
        factor = factor_of(self.products.take(tensors.name))
        if layer.transposed:
            tuned, aligned = tuned.T, aligned.T
        result, kept = adjusted(aligned, tuned, factor, self.config.s)
        self.kept += kept
        self.elements += tuned.numel()
        return (result.T if layer.transposed else result).contiguous()

    def notes(self) -> list[str]:
        share = self.kept / max(1, self.elements)
        return [self.rows.note, f"{self.kept} of {self.elements} changes of linear layers kept ({share:.1%})"]


def factor_of(products: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of damped products, in the memory of the products."""
    import torch

    diagonal = products.diagonal()
    diagonal[diagonal == 0] = 1.0  # inputs that are never there
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def adjusted(aligned: torch.Tensor, tuned: torch.Tensor, factor: torch.Tensor, s: float) -> tuple[torch.Tensor, int]:
    """Return the adjusted matrix, [outputs, inputs], and the number of changes that were kept."""
    weights, kept = aligned.clone(), 0
    for start in range(0, weights.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weights.shape[1])
        own, wanted = weights[:, start:stop], tuned[:, start:stop]
        upper = factor[start:stop, start:stop]
        chosen = _chosen(wanted - own, upper.diagonal(), s)
        errors = own.new_zeros(own.shape)
        for left in range(0, stop - start, AT_ONCE):
            right = min(left + AT_ONCE, stop - start)
            settled = wanted[:, left:right].where(chosen[:, left:right], own[:, left:right])
            errors[:, left:right] = (own[:, left:right] - settled) / upper.diagonal()[left:right]
            own[:, left:right] = settled
            own[:, right:] -= errors[:, left:right] @ upper[left:right, right:]
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
        kept += int(chosen.sum())
    return weights, kept


def _chosen(change: torch.Tensor, diagonal: torch.Tensor, s: float) -> torch.Tensor:
    """Return which changes of a block are kept, bool [outputs, columns]. diagonal: d, [columns]."""
    import torch

    sensitivity = diagonal.square().reciprocal().expand_as(change)
    costs = (change.square() * sensitivity).flatten().double()
    budget = s / 2 * float(sensitivity.double().mean()) * change.numel() / ELEMENTS
    order = sensitivity.flatten().sort(stable=True).indices
    order = order[: change.numel() - int(NEVER_KEPT * change.numel())]
    chosen = torch.zeros(change.numel(), dtype=torch.bool)
    chosen[order] = costs[order].cumsum(0) <= budget
    return chosen.view(change.shape)
