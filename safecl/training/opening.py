"""Opens a model under DeepSpeed, ready to be trained, and the run around it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import torch

from safecl.config import RunConfig, dump_config
from safecl.distributed import collectives, devices
from safecl.distributed.host_memory import give_back_large_blocks, keep_freed_blocks
from safecl.engine.checkpoint.random_state import seed_generators
from safecl.engine.model.attention import attention_of
from safecl.engine.model.settings import choose_attention
from safecl.engine.passes.attention import start_attention
from safecl.engine.passes.open_model import open_language_model
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.zero.state_placement import needs_reference
from safecl.planning.plans import RunPlan
from safecl.storage.sizes import give_back_freed_memory
from safecl.training.folder import RunFolder
from safecl.training.identity import identity_of
from safecl.training.output.console import Console
from safecl.training.run import Run


def open_run(plan: RunPlan, folder: RunFolder, console: Console) -> Run:
    """Write the identity and the config into the folder, open the model, and make the run. A collective call.

    Raises ConfigError.
    """
    config = plan.config
    if collectives.rank() == 0:
        folder.write_identity(identity_of(plan))
        folder.write_text("config.yaml", dump_config(config))
    collectives.barrier()
    engine, store = open_engine(
        config,
        pad_id=plan.tokenizer.pad_token_id,
        keep_store=needs_reference(config),
        keep_freed=plan.keeps_freed_memory,
        note=console.note,
    )
    if collectives.rank() == 0:
        folder.write_text("deepspeed.json", json.dumps(engine.deepspeed_config, indent=2))
    chosen, reason = choose_attention(config.model.attention, config.model.dtype)
    attention = attention_of(engine.module.model)
    reason = reason if attention == chosen else f"in place of {chosen}"
    console.fact("attention", f"{attention} ({reason}), rows {'packed' if engine.layout.packed else 'padded'}")
    console.fact("activations", "recomputed" if config.model.gradient_checkpointing else "kept")
    ranks = f"{collectives.world_size()} rank{'s' if collectives.world_size() > 1 else ''}"
    console.fact("trained", f"{engine.shards.numel:,} weights on {ranks}, {engine.device}")
    run = Run(config, engine, plan.methods, console.note, plan.tasks)
    run.plan = run.row_scores.plan = plan
    run.base_digest, run.harmful = store.digest, plan.harmful
    return run


def open_engine(
    config: RunConfig,
    *,
    pad_id: int | None,
    keep_store: bool,
    keep_freed: bool = False,
    note: Callable[[str], None],
) -> tuple[TrainingEngine, ReferenceStore]:
    """Seed the generators and open the config's model. A collective call. Raises ConfigError.

    Returns the engine, and the store of the model's weights, whose memory is free already unless `keep_store`.
    keep_freed: without a GPU, freed host memory is kept and not given back. note: gets messages for the user.
    """
    seed_generators(config.train.seed)
    if not devices.on_gpu():
        keep_freed_blocks() if keep_freed else give_back_large_blocks()
    if config.train.deterministic and devices.on_gpu():
        _add_in_a_fixed_order()
    model, layout, store = open_language_model(
        config.model,
        packing=config.train.packing,
        tokens_per_microbatch=config.train.tokens_per_microbatch,
        pad_id=pad_id,
        note=note,
    )
    engine = TrainingEngine(model, config, layout, store, keep_store=keep_store)
    start_attention(engine, config.model, packing=config.train.packing, note=note)
    return engine, store


def stop_keeping_memory() -> None:
    """Give back freed memory that a run has kept. Its process may go on, and a fork needs room for the whole heap."""
    give_back_large_blocks()
    give_back_freed_memory()


def _add_in_a_fixed_order() -> None:
    """Let torch, cuBLAS and flash-attention use operations only that repeat bitwise. Call it before cuBLAS is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for one of two values
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # read by transformers
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over new tensors
