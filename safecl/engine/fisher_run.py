"""Estimating the Fisher without a training run: the model under DeepSpeed, the memory's rows, and a file of the result."""

from __future__ import annotations

from pathlib import Path

from safecl import launcher
from safecl.config import ConfigError, RunConfig
from safecl.data import load_tokenizer
from safecl.engine import distributed
from safecl.engine.artifacts import ArtifactStore, model_hash
from safecl.engine.batch import Layout
from safecl.engine.console import Console
from safecl.engine.fisher import estimate_fisher
from safecl.engine.fisher_file import FisherHeader, open_fisher, write_fisher
from safecl.engine.loading import load_model
from safecl.engine.memory import fill_memory
from safecl.engine.model import LanguageModel, check_head, check_packing, choose_attention
from safecl.engine.plan import prepare_memory
from safecl.engine.random_state import seed_generators
from safecl.engine.run_identity import fingerprint, versions
from safecl.engine.training import TrainingEngine
from safecl.methods import ewc

KIND = "fisher"


def estimate_to_file(config: RunConfig, path: Path, *, exact: bool) -> None:
    """Estimates, writes, and says what to do with it. A collective call; one that is there already and fits is kept.

    With LoRA the Fisher is that of the full weights, which the adapters' product is weighed with.
    """
    console = Console(config.log.every, rank=launcher.rank())
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None}), "methods": dict(config.methods)})
    settings = next((found for found in config.methods.values() if isinstance(found, ewc.Config)), ewc.Config())
    tokenizer = load_tokenizer(config.model)
    dataset = prepare_memory(config, tokenizer)
    with console:
        distributed.init_distributed()
        wanted = _header(config, settings, fingerprint(dataset), len(dataset), exact)
        if _is_there(path, wanted, console):
            return
        engine = _build(config, tokenizer.pad_token_id or 0)
        memory = fill_memory(engine, dataset, config.memory, seed=config.train.seed, source=config.memory.source, with_teacher=False)
        rows, ids = memory.all_rows(), memory.row_ids()
        console.note(f"{len(rows):,} rows, {engine.shards.numel:,} weights, {distributed.world_size()} rank(s) on {engine.device}")
        batches, size = (len(rows), 1) if exact else (settings.sign_batches, settings.rows_per_batch)
        mean = estimate_fisher(engine, rows, ids, seed=config.train.seed, sign_batches=batches, rows_per_batch=size, kind=KIND)
        memory.buffer.close()
        header = FisherHeader(**{**vars(wanted), "mean": mean, "num_weights": engine.shards.numel})
        write_fisher(path, header, engine.shards, engine.optimizer.tensors(KIND))
        console.note(f"wrote {path}: {wanted.estimator}, mean {mean:.3g}; use it with methods.ewc.fisher={path}")


def _header(config: RunConfig, settings: ewc.Config, rows: str, num_rows: int, exact: bool) -> FisherHeader:
    digest = distributed.gather_objects([model_hash(config.model.path, ArtifactStore.of(config)) if distributed.rank() == 0 else ""])[0]
    return FisherHeader(
        mean=0.0, num_weights=0, estimator="exact" if exact else "random signs", sign_batches=0 if exact else settings.sign_batches,
        rows_per_batch=1 if exact else settings.rows_per_batch, seed=config.train.seed, num_rows=num_rows, rows=rows,
        model=config.model.path, model_hash=digest, dtype=config.model.dtype, versions=versions(),
    )  # fmt: skip


def _is_there(path: Path, wanted: FisherHeader, console: Console) -> bool:
    """Whether the file holds just this already. Raises ConfigError where something else is in its place."""
    if not path.exists():
        return False
    found = open_fisher(path).header
    if differences := found.differences(wanted):
        raise ConfigError(f"{path} holds another Fisher ({'; '.join(differences)}); remove it, or choose another file with --output")
    console.note(f"{path} is there already: {found.estimator}, mean {found.mean:.3g}; use it with methods.ewc.fisher={path}")
    return True


def _build(config: RunConfig, pad_id: int) -> TrainingEngine:
    seed_generators(config.train.seed)
    loaded, store = load_model(config.model)
    model = LanguageModel(loaded)
    check_head(model)
    attention, _ = choose_attention(config.model.attention)
    packed = config.train.packing == "packed" or (config.train.packing == "auto" and attention == "flash_attention_2")
    if packed:
        check_packing(model)
    layout = Layout(distributed.world_size(), config.train.tokens_per_microbatch, packed, pad_id=pad_id)
    engine = TrainingEngine(model, config, layout, store)
    engine.release_store()
    return engine
