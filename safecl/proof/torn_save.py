"""A kill in the middle of a save that overwrites the only checkpoint leaves no checkpoint to continue from.

Both ranks train two steps, save, train one more step, and save again: in the usual way under the same tag (`latest`,
`last`, `best`), in safecl with one checkpoint to keep. In the second save the kernel kills each rank when the file that
it writes reaches a chosen size. Then two new ranks load what is left. DeepSpeed writes into the final file, so that the
old state is gone before the new one is complete. safecl writes to a new folder and renames it when all ranks are done.
"""

from __future__ import annotations

import contextlib
import hashlib
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist

from safecl.proof.finding import Finding

if TYPE_CHECKING:
    from safecl.engine.checkpoint.reading import CheckpointReader
    from safecl.engine.checkpoint.writing import CheckpointWriter

TAG = "last"
STEPS_BEFORE, WIDTH = 2, 512
LIMIT_BYTES = 2**20
"""Every file of a save is larger than this."""


class Found(TypedDict):
    """The state after a restart: the step, whether the weights are the saved ones, and the error of this rank."""

    step: int | None
    equal: bool
    error: str | None


Weights = Callable[[], Sequence[torch.Tensor]]
"""Returns the weights of this rank."""


def finding(usual: Found, ours: Found) -> Finding:
    """Make the finding from the results of `load_usual` and `load_safecl` on rank 0."""
    return Finding(
        "torn-save",
        "kill in the middle of a same-tag save",
        f"what a restart finds, saved at step {STEPS_BEFORE}",
        f"step {STEPS_BEFORE}",
        _state(usual),
        _state(ours),
        seen=not _is_saved_state(usual),
        holds=_is_saved_state(ours),
    )


def _state(found: Found) -> str:
    if found["error"] is not None:
        return "nothing whole"
    return f"step {found['step']}" + ("" if found["equal"] else ", other weights")


def _is_saved_state(found: Found) -> bool:
    return found["error"] is None and found["step"] == STEPS_BEFORE and found["equal"]


# ------------------------------------------------------------------------------------------------------------- two ways


def usual_engine() -> tuple[Any, Weights]:
    """Make DeepSpeed's engine with its own checkpoints; returns (engine, weights of this rank)."""
    import deepspeed

    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config())
    return engine, lambda: list(model.parameters())


def save_usual(folder: Path, *, die: bool = True) -> None:
    """Train and save under one tag twice. The second save kills this process, unless `die` is False."""
    engine, weights = usual_engine()
    _train(engine, STEPS_BEFORE)
    engine.save_checkpoint(str(folder), tag=TAG, client_state={"step": STEPS_BEFORE})
    _note(folder, weights())
    _train(engine, 1)
    with killed_at(LIMIT_BYTES) if die else contextlib.nullcontext():
        engine.save_checkpoint(str(folder), tag=TAG, client_state={"step": STEPS_BEFORE + 1})


def load_usual(folder: Path) -> Found:
    """Load the usual checkpoint on new ranks."""
    engine, weights = usual_engine()
    try:
        path, state = engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise FileNotFoundError(f"no checkpoint in {folder}")
    except Exception as error:
        return _found(folder, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return _found(folder, step=state["step"], weights=weights())


def safecl_checkpoints(folder: Path) -> tuple[Callable[[int], None], CheckpointWriter, CheckpointReader, Weights]:
    """Make safecl's checkpoints of the same model; returns (step function, writer, reader, weights of this rank)."""
    import deepspeed

    from safecl import ShardAdamW, ShardMap, UpdatePlan
    from safecl.engine.checkpoint.publishing import CheckpointFolder
    from safecl.engine.checkpoint.reading import CheckpointReader
    from safecl.engine.checkpoint.writing import CheckpointWriter

    model = _model()
    optimizer = ShardAdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_config())
    shards = ShardMap(engine)
    optimizer.bind(shards)

    def before_step() -> None:
        optimizer.action = optimizer.update(UpdatePlan(lr=1e-3))

    return (
        (lambda steps: _train(engine, steps, before_step)),
        CheckpointWriter(shards, optimizer, CheckpointFolder(folder)),
        CheckpointReader(shards, optimizer, CheckpointFolder(folder)),
        lambda: shards.flats,
    )


def save_safecl(folder: Path, *, die: bool = True) -> None:
    """Train and save the same with safecl's checkpoints, of which one is kept."""
    train, writer, _, weights = safecl_checkpoints(folder)
    train(STEPS_BEFORE)
    _save(writer, STEPS_BEFORE)
    _note(folder, weights())
    train(1)
    with killed_at(LIMIT_BYTES) if die else contextlib.nullcontext():
        _save(writer, STEPS_BEFORE + 1)
    writer.close()


def _save(writer: CheckpointWriter, step: int) -> None:
    writer.save(step, keep=1, files={})
    report = writer.finish()
    assert report is not None, "a save was started just now"
    if report.problem is not None:
        raise OSError(report.problem)


def load_safecl(folder: Path) -> Found:
    """Load safecl's checkpoint on new ranks."""
    _, writer, reader, weights = safecl_checkpoints(folder)
    contents = reader.find(note=lambda message: None)
    if contents is None:
        return _found(folder, error="no checkpoint")
    reader.load(contents)
    writer.close()
    return _found(folder, step=contents.manifest.step, weights=weights())


# --------------------------------------------------------------------------------------------------------------- shared


@contextlib.contextmanager
def killed_at(num_bytes: int) -> Iterator[None]:
    """Let the kernel kill this process, without any clean-up, when a file that it writes grows beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_CORE)
    handler = None
    if threading.current_thread() is threading.main_thread():  # handlers can be set in the main thread only
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1][1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        resource.setrlimit(resource.RLIMIT_CORE, before[1])
        if handler is not None:
            signal.signal(signal.SIGXFSZ, handler)


def _model() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2},
    }  # fmt: skip


def _train(engine: Any, steps: int, before_step: Callable[[], None] = lambda: None) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, WIDTH)).square().mean())
        before_step()
        engine.step()


def _note(folder: Path, weights: Sequence[torch.Tensor]) -> None:
    """Keep a digest of the weights that this rank has saved, next to the checkpoint's folder."""
    path = folder.with_name(f"{folder.name}-rank{dist.get_rank()}.digest")
    path.write_text(_digest(weights))


def _digest(weights: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in weights:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _found(
    folder: Path, *, step: int | None = None, weights: Sequence[torch.Tensor] | None = None, error: str | None = None
) -> Found:
    saved = folder.with_name(f"{folder.name}-rank{dist.get_rank()}.digest").read_text()
    return {"step": step, "equal": weights is not None and _digest(weights) == saved, "error": error}
