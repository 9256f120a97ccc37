"""`safecl fisher CFG`: estimates the diagonal Fisher of the aligned model on the memory's rows, once for all runs on
that model. Any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecl.commands.preflight import preflight, refuse_unwritable
from safecl.config import ConfigError, RunConfig
from safecl.config.base import FisherSize
from safecl.config.method_registry import methods_that
from safecl.distributed import environment
from safecl.exits import ExitCode

if TYPE_CHECKING:
    from safecl.data import TokenDataset
    from safecl.engine.fisher.file import FisherHeader
    from safecl.training.output.console import Console


def fisher_run(config: RunConfig, output: Path | None, *, exact: bool) -> ExitCode:
    """Write the Fisher file and print how to use it. Raises ConfigError, before the model is loaded where possible."""
    environment.join_launcher()
    if config.memory is None:
        raise ConfigError("safecl fisher: needs `memory: {source: ...}`, the rows whose behaviour must be kept")
    if config.tasks[0].role == "align":
        raise ConfigError(
            "safecl fisher: model.path is aligned only by the first task (role: align); "
            "train that first, then name its model"
        )
    named = [file for settings in config.methods.values() if (file := settings.fisher_file) is not None]
    path = output or (Path(named[0]) if named else None)
    preflight(config, writes_fisher=True)
    if path is not None:
        refuse_unwritable(path.parent)
    estimate_to_file(config, path, exact=exact)
    return ExitCode.DONE


def estimate_to_file(config: RunConfig, path: Path | None, *, exact: bool) -> None:
    """Estimate the Fisher and write it; a file that holds it already is kept. A collective call. Raises ConfigError.

    path: the file; None for the store of artifacts, where runs with the same config find it. With LoRA, the Fisher is
    that of the full weights, and weighs the adapters' product.
    """
    from safecl.data import load_tokenizer
    from safecl.data.config_rows import prepare_memory
    from safecl.distributed import collectives
    from safecl.distributed.watchdog import watched
    from safecl.engine.artifacts.fisher import header_of, shared_fisher
    from safecl.engine.artifacts.memory_prompts import with_memory_rows
    from safecl.engine.fisher.file import open_fisher
    from safecl.training.output.console import Console

    console = Console(config.log.every, rank=environment.rank())
    whole: dict[str, Any] = {"model": config.model.model_copy(update={"lora": None})}
    whole["methods"] = {
        name: own for name, own in config.methods.items() if own.fisher_size is not None
    }  # none freezes
    config = config.model_copy(update=whole)
    reader, size = _reader(config)
    config = with_memory_rows(config, console.note)
    tokenizer = load_tokenizer(config.model)
    dataset = prepare_memory(config, tokenizer)
    collectives.init_distributed()
    header = header_of(
        config,
        tokenizer,
        dataset,
        sign_batches=size.sign_batches,
        rows_per_batch=size.rows_per_batch,
        exact=exact,
    )

    def build(path: Path) -> None:
        _estimate(config, dataset, header, path, console, tokenizer)

    with console, watched(Path(config.output), "preparation"):
        if path is None:
            path = shared_fisher(config, header, build, console.note)
        elif _holds(path, header):
            console.note(f"{path} exists already")
        else:
            build(path)
        mean = open_fisher(path).header.mean
        console.note(f"{path}: {header.estimator}, mean {mean:.3g}; use it with methods.{reader}.fisher={path}")


def _reader(config: RunConfig) -> tuple[str, FisherSize]:
    """Return the method that will read the file, and the size of its estimate; the defaults where no method does."""
    readers = {name: size for name, settings in config.methods.items() if (size := settings.fisher_size) is not None}
    if readers:
        return next(iter(readers.items()))
    return methods_that(lambda settings: settings.fisher_size is not None)[0], FisherSize()


def _holds(path: Path, wanted: FisherHeader) -> bool:
    """True where the file already holds this Fisher. Raises ConfigError where it holds something else."""
    from safecl.engine.fisher.file import open_fisher

    if not path.exists():
        return False
    if differences := open_fisher(path).header.differences(wanted):
        raise ConfigError(
            f"{path} holds another Fisher ({'; '.join(differences)}); remove it, or choose another file with --output"
        )
    return True


def _estimate(
    config: RunConfig, dataset: TokenDataset, header: FisherHeader, path: Path, console: Console, tokenizer: Any
) -> None:
    from safecl.distributed import collectives
    from safecl.engine.artifacts.fisher import KIND, estimate_into
    from safecl.planning.memory_kinds import tags_of_memory
    from safecl.training.opening import open_engine
    from safecl.training.replay_memory import fill_memory

    assert config.memory is not None
    engine, _ = open_engine(config, pad_id=tokenizer.pad_token_id, keep_store=False, note=console.note)
    memory = fill_memory(
        engine,
        dataset,
        config.memory,
        seed=config.train.seed,
        source=config.memory.origin,
        with_teacher=config.memory.guard is not None,
        tags=tags_of_memory(config.memory, dataset, tokenizer),
    )
    rows = memory.all_rows(), memory.keys()
    console.note(
        f"{len(rows[0]):,} rows, {engine.shards.numel:,} weights, {collectives.world_size()} ranks on {engine.device}"
    )
    try:
        estimate_into(path, header, engine, rows, KIND, console.note)
    finally:
        memory.buffer.close()
