"""A micro-batch asks the device nothing: the reads of tensors in a pass do not grow with its micro-batches."""

from __future__ import annotations

import collections
import traceback

import pytest

from tests.engine import scenes

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")
OPERATORS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal")
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
        with reading() as places:
            run.engine.gradient_pass(rows, lambda shards: None, batches=batches[:1] * count)
        found.append(dict(places))
    return found


class reading:
    """Counts the reads of tensors inside the block, by the innermost line that is not torch's."""

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

        self.originals = {name: getattr(torch.Tensor, name) for name in READS}
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, self.counted(original))
        self.mode = Mode()
        self.mode.__enter__()
        return places

    def __exit__(self, *error: object) -> None:
        import torch

        self.mode.__exit__(*error)
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)

    def counted(self, original):
        def counted(*arguments, **options):
            self.places[place()] += 1
            return original(*arguments, **options)

        return counted


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


def test_the_count_sees_a_read(rank_pool):
    assert rank_pool(1).run(read_once) == [1]


def read_once() -> int:
    import torch

    with reading() as places:
        torch.ones(3).tolist()
    return sum(places.values())
