"""Estimating the Fisher without a training run: the model under DeepSpeed, the memory's rows, and a file of the
result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safecl.config import ConfigError, RunConfig
from safecl.data import TokenDataset, load_tokenizer
from safecl.data.config_rows import prepare_memory
from safecl.distributed import collectives, environment
from safecl.engine.artifacts.fisher import KIND, estimate_into, header_of, shared_fisher
from safecl.engine.checkpoint.random_state import seed_generators
from safecl.engine.fisher.file import FisherHeader, open_fisher
from safecl.engine.passes.opening import open_language_model
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.methods.penalties import ewc
from safecl.training.console import Console
from safecl.training.replay_memory import fill_memory


def estimate_to_file(config: RunConfig, path: Path | None, *, exact: bool) -> None:
    """Estimates, writes, and says what to do with it. A collective call; one that is there already and fits is kept.

    path: of the file; None for the store of artifacts, where runs with the same config find it by themselves. With LoRA
    the Fisher is that of the full weights, which the adapters' product is weighed with. Raises ConfigError.
    """
    console = Console(config.log.every, rank=environment.rank())
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    settings = next((found for found in config.methods.values() if isinstance(found, ewc.Config)), ewc.Config())
    tokenizer = load_tokenizer(config.model)
    dataset = prepare_memory(config, tokenizer)
    collectives.init_distributed()
    sizes = dict(sign_batches=settings.sign_batches, rows_per_batch=settings.rows_per_batch)
    header = header_of(config, tokenizer, dataset, **sizes, exact=exact)

    def build(path: Path) -> None:
        _estimate(config, dataset, header, path, console, tokenizer.pad_token_id)

    with console:
        if path is None:
            path = shared_fisher(config, header, build, console.note)
        elif _is_there(path, header):
            console.note(f"{path} is there already")
        else:
            build(path)
        console.note(
            f"{path}: {header.estimator}, mean {open_fisher(path).header.mean:.3g}; use it with methods.ewc.fisher={path}"
        )


def _estimate(
    config: RunConfig, dataset: TokenDataset, header: FisherHeader, path: Path, console: Console, pad_id: int | None
) -> None:
    engine = _build_engine(config, pad_id, console.note)
    memory = fill_memory(
        engine,
        dataset,
        config.memory,
        seed=config.train.seed,
        source=config.memory.source,
        with_teacher=config.memory.guard is not None,
    )
    rows = memory.all_rows(), memory.row_ids()
    console.note(
        f"{len(rows[0]):,} rows, {engine.shards.numel:,} weights, {collectives.world_size()} ranks on {engine.device}"
    )
    try:
        estimate_into(path, header, engine, rows, KIND, console.note)
    finally:
        memory.buffer.close()


def _is_there(path: Path, wanted: FisherHeader) -> bool:
    """Whether the file holds just this already. Raises ConfigError where something else is in its place."""
    if not path.exists():
        return False
    if differences := open_fisher(path).header.differences(wanted):
        raise ConfigError(
            f"{path} holds another Fisher ({'; '.join(differences)}); remove it, or choose another file with --output"
        )
    return True


def _build_engine(config: RunConfig, pad_id: int | None, note: Callable[[str], None]) -> TrainingEngine:
    seed_generators(config.train.seed)
    model, layout, store = open_language_model(
        config.model,
        packing=config.train.packing,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        pad_id=pad_id,
        note=note,
    )
    return TrainingEngine(model, config, layout, store, keep_store=False)
