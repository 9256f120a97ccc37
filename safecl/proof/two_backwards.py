"""Two backwards before one step: ZeRO-1 and ZeRO-2 keep the gradient of the second alone.

    g = a grad(task loss) + b grad(replay loss),   right: a = b = 1

A loop that calls `backward` once for the new data and once for replayed data trains on the replayed data alone:
DeepSpeed reduces the first gradient and then overwrites it, without an error. (On ZeRO-3 the two add up, so the same
script does something else there.) a and b are the least-squares fit to the gradient that reaches the optimizer.
safecl has one backward for all terms of the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from safecl.proof.finding import Finding

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from safecl.data.tokens import Row
    from safecl.engine.passes.step_rows import StepRow

STAGES = (1, 2)
LENGTH, ROWS, VOCAB = 12, 4, 97


def measure() -> Finding:
    """Compare both gradients with the right one. A collective call: both ranks see the same rows in the usual way, and
    share them in safecl's."""
    usual = {stage: shares(by_two_backwards(stage)) for stage in STAGES}
    ours = {stage: shares(by_safecl(stage)) for stage in STAGES}
    return Finding(
        "two-backwards", "two backwards in a step, ZeRO-1 and -2", "share of the first gradient in it",
        "1.00", _listed(usual), _listed(ours),
        seen=all(abs(a - 1) > 0.01 for a, _ in usual.values()),
        holds=all(abs(a - 1) < 1e-3 and abs(b - 1) < 1e-3 for a, b in ours.values()),
    )  # fmt: skip


def _listed(found: dict[int, tuple[float, float]]) -> str:
    return ", ".join(f"{round(a, 2) + 0.0:.2f}" for a, _ in found.values())


def shares(gradient: torch.Tensor) -> tuple[float, float]:
    """Fit (a, b) of the gradient, by least squares over all weights in fp64."""
    parts = torch.stack(true_gradients(), dim=1)
    a, b = torch.linalg.lstsq(parts, gradient.double()[:, None]).solution.flatten().tolist()
    return a, b


def true_gradients() -> list[torch.Tensor]:
    """Compute the gradients of the task's and the replay's loss by plain PyTorch in one process: flat, fp64."""
    model = _model().double()
    return [_flat(torch.autograd.grad(_loss(model, part), list(model.parameters()))) for part in (0, 1)]


def by_two_backwards(stage: int, boundaries: bool = False) -> torch.Tensor:
    """Take a step in the usual way and return its gradient: with plain gradient descent of rate 1, the step is the
    gradient. The remedy, `boundaries`, marks the last backward."""
    import deepspeed

    model = _model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default is 1
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    before = _flat(model.parameters())
    for part in (0, 1):
        if boundaries:
            engine.set_gradient_accumulation_boundary(part == 1)
        engine.backward(_loss(engine, part))
    engine.step()
    return before - _flat(model.parameters())


def by_safecl(stage: int) -> torch.Tensor:
    """Compute the gradient with safecl's own step: rows of two terms, one backward."""
    from safecl.config import RunConfig
    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine

    tree = {"model": {"path": "none", "dtype": "fp32"}, "tasks": [{"name": "t", "train": "none"}], "output": "none"}
    config = RunConfig.model_validate(tree | {"deepspeed": {"stage": stage}})
    engine = TrainingEngine(
        LanguageModel(_model()), config, MicroBatchLayout(collectives.world_size(), 64, packed=False)
    )
    engine.gradient_pass(_step_rows(), engine.stash("seen"))
    seen = engine.optimizer.tensors("seen")
    return _flat(engine.shards.read(name, seen) for name in engine.shards.shapes)


def _step_rows() -> list[StepRow]:
    from safecl.data.tokens import Row
    from safecl.engine.passes.step_rows import StepRow

    mask, weight = np.arange(LENGTH) > 0, 1 / (ROWS * (LENGTH - 1))
    rows = [
        (term, Row(i, ids.numpy().astype(np.int32), mask))
        for part, term in enumerate(("task", "replay"))
        for i, ids in enumerate(_tokens(part))
    ]
    return [StepRow(term, LENGTH, LENGTH - 1, functools.partial(_loaded, row), weight) for term, row in rows]


def _loaded(row: Row) -> tuple[Row, None]:
    return row, None


def _model() -> LlamaForCausalLM:
    from safecl.demo.model import random_llama

    return random_llama(VOCAB, seed=3, hidden=32, layers=1, heads=4)


def _tokens(part: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(part))


def _loss(model: Any, part: int) -> torch.Tensor:
    tokens = _tokens(part)
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1).cpu().clone() for tensor in tensors])
