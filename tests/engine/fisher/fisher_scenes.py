"""Fisher estimates on the ranks of the pool, to files and from files."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.engine.scenes import random_dataset, run_config, tiny_model
from tests.methods import scenes


def header_of(**changes):
    from safecl.engine.fisher.file import FisherHeader

    values = dict(
        mean=0.0,
        num_weights=0,
        estimator="random signs",
        sign_batches=64,
        rows_per_batch=16,
        seed=3,
        num_rows=20,
        rows="r",
        model="m",
        model_hash="h",
        dtype="fp32",
    )
    return FisherHeader(**(values | changes))


def estimate(path: str, exact: bool = False, sign_batches: int = 64, **changes) -> float:
    """Estimates the Fisher of 20 random rows under the tiny model, and writes it; its mean."""
    from safecl.engine.fisher.estimate import estimate_fisher
    from safecl.engine.fisher.file import write_fisher

    run, _ = scenes.make_run(
        run_config(**changes), tiny_model(), [random_dataset(60, seed=1)], random_dataset(20, seed=2)
    )
    rows, engine = run.memory.all_rows(), run.engine
    batches, size = (len(rows), 1) if exact else (sign_batches, 16)
    ids = run.memory.keys()
    mean = estimate_fisher(engine, rows, ids, seed=3, sign_batches=batches, rows_per_batch=size, kind="fisher")
    header = header_of(mean=mean, num_weights=engine.shards.numel)
    write_fisher(Path(path), header, engine.shards, engine.optimizer.tensors("fisher"))
    return mean


def write_random_fisher(path: str) -> dict[str, torch.Tensor]:
    """A file of random values for the tiny model, by safetensors' own library; its values divided by the mean in its
    header."""
    import dataclasses
    import json

    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    shapes = {name: p.shape for name, p in tiny_model().named_parameters()}
    values = {name: (torch.rand(shape, generator=generator) ** 4).bfloat16() for name, shape in shapes.items()}
    mean = sum(float(v.double().sum()) for v in values.values()) / sum(v.numel() for v in values.values())
    save_file(values, path, metadata={"safecl-fisher": json.dumps(dataclasses.asdict(header_of(mean=mean)))})
    return {name: value.float() / mean for name, value in values.items()}


def refused(path: str) -> str:
    """The message of loading the file into the tiny model's shards."""
    from safecl.config import ConfigError

    config = run_config(memory=None, methods={"ewc": {"fisher": path}}, deepspeed={"stage": 3})
    run, (task,) = scenes.make_run(config, tiny_model(), [random_dataset(60, seed=1)])
    try:
        run.begin_task(task, active=True)
    except ConfigError as error:
        return str(error)
    return ""


def fisher_of(tree: dict, path: str, exact: bool, cache: str) -> None:
    """Run `safecl fisher` on the ranks of the pool."""
    import os

    from safecl.commands.fisher import estimate_to_file
    from safecl.config import RunConfig

    os.environ["SAFECL_CACHE"] = cache
    estimate_to_file(RunConfig.model_validate(tree), Path(path), exact=exact)
