"""`safecl memory cache CFG`: writes the aligned model's outputs on the memory's rows into the store of artifacts. Any
number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safecl.commands.preflight import refuse_missing_files
from safecl.config import ConfigError, RunConfig
from safecl.distributed import environment


def cache_run(config: RunConfig) -> None:
    """Compute what is missing, and print where it is. Raises ConfigError for a config without a memory or with an
    alignment task."""
    environment.join_launcher()
    source = cacheable_source(config)
    refuse_missing_files(config)
    from safecl.data import load_tokenizer
    from safecl.data.config_rows import prepare_memory
    from safecl.engine.artifacts.memory_prompts import with_memory_rows
    from safecl.engine.artifacts.teacher_outputs import shared_outputs
    from safecl.engine.passes.forward_engine import forward_engine_of
    from safecl.training.output.console import Console

    console = Console(1, environment.rank())
    tokenizer = load_tokenizer(config.model)
    with console, ranks(Path(config.output)):
        config = with_memory_rows(config, console.note)
        rows = prepare_memory(config, tokenizer)
        engine = forward_engine_of(config, tokenizer, console.note)
        outputs = shared_outputs(engine, rows, config, tokenizer, note=console.note)
    header, folder = outputs.header, outputs.cache
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.fact("rows", f"{len(rows):,} of {source}; {len(outputs.reader):,} in the cache, {size:,} bytes")
    form = f"k {header.k}, temperature {header.temperature:g}, {header.dtype}"
    console.fact("outputs", f"{form}, of {config.model.path} in {header.model_dtype}")
    console.fact("folder", str(folder))


def cacheable_source(config: RunConfig) -> str:
    """Return the memory's file of rows or prompts. Raises ConfigError where no outputs can be cached before a run."""
    if config.memory is None:
        raise ConfigError(
            "memory: this config has none, so there are no rows to ask the model about; add `memory: {source: ...}`"
        )
    if config.tasks[0].role == "align":
        raise ConfigError(
            "tasks: the first task (role: align) makes the aligned model; its run stores the outputs itself"
        )
    return config.memory.origin


@contextlib.contextmanager
def ranks(folder: Path) -> Iterator[None]:
    """Keep a process group for the `with` block, and watch its ranks; without a launcher, a group of one rank.

    folder: gets the stacks of ranks that hang.
    """
    import torch.distributed as dist

    from safecl.distributed.collectives import init_distributed
    from safecl.distributed.watchdog import watched

    there = dist.is_initialized()
    init_distributed()
    try:
        with watched(folder, "preparation"):
            yield
    finally:
        if not there:
            dist.destroy_process_group()
