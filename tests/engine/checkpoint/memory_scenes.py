"""The memory that loading a checkpoint and writing a model folder take beyond what stays."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from unittest import mock

import torch

from safecl.distributed import collectives
from tests.engine import scenes

METHODS = {"ema": {"decay": 0.9}}


def large_model(hidden: int, layers: int, vocabulary: int):
    """A random Llama whose size is chosen."""
    import transformers

    torch.manual_seed(7)
    settings = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(settings)


def build(folder: str, size: dict, stage: int, methods: dict | None = None, **train):
    """(run, task, writer of checkpoints) of a run without a memory, whose first task has begun."""
    from safecl.engine.checkpoint.publishing import CheckpointFolder
    from safecl.engine.checkpoint.writing import CheckpointWriter

    methods = METHODS if methods is None else methods
    config = scenes.run_config(tmp=folder, memory=None, methods=methods, deepspeed={"stage": stage}, train=train)
    run, task = scenes.make_run(config, large_model(**size))
    checkpoints = CheckpointFolder(Path(folder) / "checkpoints")
    return run, task, CheckpointWriter(run.engine.shards, run.engine.optimizer, checkpoints)


def save_once(folder: str, size: dict, stage: int) -> int:
    """One step, then one checkpoint; returns the number of weights."""
    run, task, writer = build(folder, size, stage)
    run.train_step(task)
    writer.save(1, keep=1, files={})
    assert writer.finish().problem is None
    writer.close()
    return run.engine.shards.numel


def peak_of_loading(folder: str, size: dict, stage: int) -> dict[str, int]:
    """Bytes: the state that loading makes and that stays (the weights are there before), and the most that was taken in
    between.

    `peak` is until everything is read; in stages 1 and 2 the live weights are then gathered, as after every step
    (`with_gather`).
    """
    from safecl.engine.checkpoint.reading import CheckpointReader

    run, _, writer = build(folder, size, stage)
    for kind in list(run.engine.optimizer.shards()[0].state):
        for shard in run.engine.optimizer.shards():
            shard.state.pop(kind)
    reader = CheckpointReader(run.engine.shards, run.engine.optimizer, writer.folder)
    publish, read = run.engine.shards.publish, []
    before = _start_watching()
    with mock.patch.object(run.engine.shards, "publish", lambda: (read.append(_peak() - before), publish())):
        reader.load(reader.find(lambda message: None))
    stays = sum(tensor.nbytes for shard in run.engine.optimizer.shards() for tensor in shard.state.values())
    writer.close()
    return {"stays": stays, "peak": read[0], "with_gather": _peak() - before}


def peak_of_exporting(folder: str, size: dict, stage: int) -> dict[str, int]:
    """Bytes: the largest parameter, the whole model, and the most that was taken while its folder was written."""
    from safecl.engine.checkpoint.model_export import save_model

    run, _, writer = build(folder, size, stage, methods={})
    writer.close()
    before = _start_watching()
    save_model(run.engine, None, Path(folder) / "model")
    peak = _peak() - before
    sizes = [4 * torch.Size(shape).numel() for shape in run.engine.shards.shapes.values()]
    collectives.barrier()
    if collectives.rank() == 0:
        shutil.rmtree(Path(folder) / "model")
    return {"largest": max(sizes), "model": sum(sizes), "peak": peak}


def _start_watching() -> int:
    """Resets this process's peak; returns what it has now, without what it has freed and could use again."""
    from safecl.storage.sizes import give_back_freed_memory

    collectives.barrier()
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])
