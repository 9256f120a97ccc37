"""A micro-batch asks the device nothing and waits for no copy to it: neither reads of tensors nor copies that block
grow with the micro-batches of a pass."""

from __future__ import annotations

import collections
import dataclasses
import traceback
from collections.abc import Iterator

import pytest

from tests.engine import scenes

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")
OPERATORS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal")
MAKERS = ("tensor", "as_tensor")
"""Make a tensor of numbers, which a device waits for."""
METHODS = {
    "replay": {"er": {}},
    "two distances": {"der": {"distance": "mse"}, "derpp": {}, "ema": {"decay": 0.9}},
}


def reads_of_passes(stage: int, methods: dict, counts: tuple[int, ...]) -> list[dict[str, int]]:
    """The lines that read tensors in a pass over each number of micro-batches, and how often."""
    from safecl.training.steps.step import step_rows

    memory = {"draw": "loss_aware"}  # the losses of replayed rows are kept
    run, task = scenes.make_run(
        scenes.run_config(methods=methods, memory=memory, model={"dtype": "bf16"}, deepspeed={"stage": stage})
    )
    run.train_step(task)
    rows = step_rows(run, task, 1)
    batches = run.engine.prepare(rows)
    found = []
    for count in counts:
        with reading(batches) as places:
            run.engine.gradient_pass(rows, lambda shards: None, batches=batches[:1] * count)
        found.append(dict(places))
    return found


class reading:
    """Counts, inside the block, the reads of tensors and the blocking copies to a device of numbers and of the tensors
    in `host`, by the innermost line that is not torch's. On a CPU a copy is seen by its call, which names a device; one
    that does not block is made, as it is on a GPU."""

    def __init__(self, host: object = ()):
        self.host = {tensor.data_ptr() for tensor in tensors_in(host)}

    def __enter__(self) -> collections.Counter:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        places = self.places = collections.Counter()

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                name = function.overloadpacket.__name__
                masked = name in ("index", "index_put_") and any(
                    i is not None and i.dtype == torch.bool for i in arguments[1]
                )
                if name in OPERATORS or masked:
                    places[place()] += 1
                return function(*arguments, **(options or {}))

        self.originals = [(torch.Tensor, name, getattr(torch.Tensor, name)) for name in (*READS, "to")]
        self.originals += [(torch, name, getattr(torch, name)) for name in MAKERS]
        for owner, name, original in self.originals:
            count = self.counted if name in READS else self.counted_copies
            setattr(owner, name, count(original))
        self.mode = Mode()
        self.mode.__enter__()
        return places

    def __exit__(self, *error: object) -> None:
        self.mode.__exit__(*error)
        for owner, name, original in self.originals:
            setattr(owner, name, original)

    def counted(self, original):
        def counted(*arguments, **options):
            self.places[place()] += 1
            return original(*arguments, **options)

        return counted

    def counted_copies(self, original):
        import torch

        def counted(value, *arguments, **options):
            to_device = options.get("device") is not None or any(isinstance(a, torch.device) for a in arguments)
            if not to_device or (isinstance(value, torch.Tensor) and value.data_ptr() not in self.host):
                return original(value, *arguments, **options)
            if options.get("non_blocking"):
                return original(value, *arguments, **options).clone()
            self.places[place()] += 1
            return original(value, *arguments, **options)

        return counted


def tensors_in(value) -> Iterator:
    """Yield the tensors in nested dicts, lists, tuples and dataclasses."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple) or dataclasses.is_dataclass(value):
        parts = (
            value if isinstance(value, list | tuple) else (value if isinstance(value, dict) else vars(value)).values()
        )
        for part in parts:
            yield from tensors_in(part)


def place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and "test_no_waiting" not in frame.filename:
            return f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno} {frame.name}"
    return "?"


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_reads_do_not_grow_with_the_micro_batches(rank_pool, stage, name):
    few, many = rank_pool(2).run(reads_of_passes, stage=stage, methods=METHODS[name], counts=(2, 6))[0]
    grown = {line: (few.get(line, 0), count) for line, count in many.items() if count > few.get(line, 0)}
    assert not grown, grown


def test_the_count_sees_a_read_and_a_copy_that_blocks(rank_pool):
    assert rank_pool(1).run(read_and_copy) == [3]


def read_and_copy() -> int:
    import torch

    cpu, known, on_the_device = torch.device("cpu"), torch.ones(3), torch.ones(3)
    with reading({"some": [known]}) as places:
        on_the_device.tolist()
        known.to(cpu)
        torch.tensor([1.0], device=cpu)
        known.to(cpu, non_blocking=True).to(cpu)
        known.to(torch.bfloat16)
        on_the_device.to(cpu)
        torch.tensor([1.0])
    return sum(places.values())
