"""The engine on tensors without data: shapes alone, on a process group that sends nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


@contextlib.contextmanager
def without_data(ranks: int = 1) -> Iterator[None]:
    """Give tensors shapes and no data, on the CPU.

    Numbers that are read from them are 1, and 0 where they are bytes (DeepSpeed's flag of an overflow); numbers are
    finite, other conditions do not hold. This process is the first of `ranks` ranks, and process groups send nothing.
    The torch twins of the kernels run, in few large pieces.
    """
    import torch.distributed as dist
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from safecl.kernels import backends
    from safecl.kernels.flat import calls, torch_twin
    from safecl.kernels.head import calls as head
    from safecl.kernels.head import torch_twin as head_twin

    agree = partitioned_param_coordinator.assert_ints_same_as_other_ranks
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    chunk, move, check = dict(torch_twin.CHUNK), torch.nn.Module.to, calls.check_overlap
    operator, head._linear_distill = head._linear_distill, _Head.apply
    _Head.compute = staticmethod(operator._init_fn)
    torch_twin.CHUNK["cpu"] = 1 << 28
    block, head_twin._BLOCK_ELEMENTS = head_twin._BLOCK_ELEMENTS, 1 << 24
    calls.check_overlap = lambda written, read: None  # all tensors are at address 0
    torch.nn.Module.to = lambda module, *arguments, **settings: module
    try:
        with backends.using("torch"), FakeTensorMode(allow_non_fake_inputs=True), _ReadsConstants():
            yield
    finally:
        torch_twin.CHUNK.update(chunk)
        torch.nn.Module.to, calls.check_overlap = move, check
        head._linear_distill, head_twin._BLOCK_ELEMENTS = operator, block
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = agree


def prepared_without_data(engine: Any, rows: list[Any]) -> list[Any]:
    """Return the micro-batches of these rows, made with data, since their lengths are read on the way; then without."""
    with torch.utils._python_dispatch._disable_current_modes():
        batches = engine.prepare(rows)
    for batch in batches:
        for field in dataclasses.fields(batch):
            setattr(batch, field.name, tree_map_only(torch.Tensor, torch.empty_like, getattr(batch, field.name)))
    return batches


class _Head(torch.autograd.Function):
    """The fused head itself. As an operator it would be replaced by the shapes of its results, and its tiles would not
    be counted."""

    compute: Callable[..., tuple[torch.Tensor, ...]]

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        from safecl.kernels.head import calls as head

        outputs = _Head.compute(*arguments)
        head._setup_context(ctx, arguments, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        from safecl.kernels.head import calls as head

        found = head._backward(ctx, *gradients)
        return tuple(each if isinstance(each, torch.Tensor) else None for each in found)


class _ReadsConstants(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            if arguments[0].dtype == torch.bool:
                return getattr(arguments[0], "is_finite", False)
            return 0 if arguments[0].dtype == torch.uint8 else 1
        made = function(*arguments, **(settings or {}))
        if function is torch.ops.aten.mul.Tensor and made.dtype == torch.bool:  # isfinite: (x == x) * (|x| != inf)
            made.is_finite = True
        return made


class fake_store:
    """A reference store without data, for the two calls that the engine makes of it."""

    notes: tuple[str, ...] = ()
    where, pinned, digest = "segment", False, ""

    def __init__(self, model: Any):
        from safecl.engine.reference.layout import Layout

        self.layout, self.dtype, self.buffers = Layout.of(model, torch.bfloat16), torch.bfloat16, {}
        self._tensors = {name: torch.empty(shape, dtype=self.dtype) for name, shape in self.layout.shapes.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[self.layout.aliases[name]]

    def names(self) -> list[str]:
        return list(self.layout.aliases)

    def holds(self, tensor: torch.Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == t.untyped_storage()._cdata for t in self._tensors.values())

    def close(self) -> None:
        self._tensors = {}
