"""Small runs for tests of methods: one or more tasks and a memory of chosen rows, on the ranks of the pool."""

from __future__ import annotations

import contextlib
import functools
import io
import threading

import numpy as np
import torch

from tests.engine.scenes import VOCAB, answer_ids, random_dataset, run_config, state_of, tiny_model


def dataset_of(rows: list[tuple[list[int], list[bool]]], first_id: int):
    """A data set of these (ids, mask) rows."""
    from safecl.data import TokenDataset
    from safecl.data.tokens import PreparedFile

    lengths = [len(ids) for ids, _ in rows]
    arrays = {
        "tokens": np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        "loss_mask": np.concatenate([mask for _, mask in rows]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "row_ids": np.arange(len(rows), dtype=np.uint64) + np.uint64(first_id),
        "num_targets": np.array([sum(mask) for _, mask in rows], np.int32),
        "lines": np.arange(1, len(rows) + 1),
        "tags": np.zeros(0, np.uint8),
        "tag_offsets": np.zeros(len(rows) + 1, np.int64),
    }
    return TokenDataset.from_store(PreparedFile(arrays, path="test.jsonl"))


def conflicting_datasets():
    """(task rows, memory rows) with the same prompts and opposite answers."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(12, VOCAB, rng.integers(2, 9)).tolist() for _ in range(24)]

    def answered(token: int) -> list[tuple[list[int], list[bool]]]:
        return [([*prompt, token, token + 1], [False] * len(prompt) + [True, True]) for prompt in prompts]

    return dataset_of(answered(3), 100), dataset_of(answered(6), 900)


def harmful_dataset():
    """The same prompts with a third answer."""
    task, _ = conflicting_datasets()
    rows = [(row.input_ids[:-2].tolist(), row.loss_mask.tolist()) for row in task.rows(range(len(task)))]
    return dataset_of([([*ids, 9, 10], mask) for ids, mask in rows], 500)


def random_model(seed: str):
    """An engine for the forward passes of a model with other random weights."""
    from safecl.config import DeepSpeedConfig
    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.forward_engine import ForwardEngine
    from safecl.engine.passes.micro_batches import MicroBatchLayout

    layout = MicroBatchLayout(collectives.world_size(), 64, packed=False)
    return ForwardEngine(LanguageModel(other_model(seed)), layout, dtype="fp32", sharding=DeepSpeedConfig(stage=0))


def other_model(seed: str, noise: float = 0.05):
    """The tiny model with noise on its weights."""
    model, generator = tiny_model(), torch.Generator().manual_seed(int(seed))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator))
    return model


def save_on_first_rank(model, folder: str) -> None:
    """Save a model where all ranks find it. A collective call."""
    from safecl.distributed import collectives

    if collectives.rank() == 0:
        model.save_pretrained(folder)
    collectives.barrier()


def undecided_model():
    """A model that gives either answer to the prompts above about half of its belief, so that the gradients of both
    conflict."""
    model = tiny_model()
    model.load_state_dict(_undecided_weights())
    return model


@functools.cache
def _undecided_weights() -> dict[str, torch.Tensor]:
    from safecl.data import collate

    model = tiny_model()
    rows = [row for data in conflicting_datasets() for row in data.rows(range(len(data)))]
    batch = collate(rows, packed=False, pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        optimizer.step()
    return model.state_dict()


def make_run(config, model, task_rows: list, memory_rows=None):
    """(run, task plans): what the trainer builds, without files. No task is begun yet."""
    from safecl.data import TaskOrder
    from safecl.distributed import collectives
    from safecl.engine.model.checks import check_head
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.planning.plans import TaskPlan
    from safecl.planning.run_plan import build_methods
    from safecl.training.replay_memory import fill_memory
    from safecl.training.run import Run

    train = config.train
    layout = MicroBatchLayout(collectives.world_size(), train.tokens_per_microbatch, packed=train.packing == "packed")
    wrapped = LanguageModel(model)
    check_head(wrapped)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = TrainingEngine(wrapped, config, layout)
    tasks = []
    for settings, rows in zip(config.tasks, task_rows, strict=True):
        order = TaskOrder(rows, seed=train.seed, tokens_per_batch=train.tokens_per_batch, max_steps=train.max_steps)
        tasks.append(TaskPlan(settings, rows, train.tokens_per_batch, order))
    run = Run(config, engine, build_methods(config), lambda message: None, tasks)
    run.row_scores.answer_ids = answer_ids
    if memory_rows is not None:
        needs_teacher = config.needs_teacher
        run.memory = fill_memory(
            engine, memory_rows, config.memory, seed=train.seed, source="test", with_teacher=needs_teacher
        )
    return run, tasks


def with_adapters(model, config):
    from safecl.engine.model.adapters import add_adapters

    model = add_adapters(model, config.model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def train(steps: int, **changes):
    """State and losses after some steps on the random task, with the random memory where the config has one."""
    config = run_config(**changes)
    model = with_adapters(tiny_model(), config) if config.model.lora else tiny_model()
    memory = random_dataset(20, seed=2) if config.memory is not None else None
    run, (task,) = make_run(config, model, [random_dataset(60, seed=1)], memory)
    run.begin_task(task, active=True)
    losses = [run.train_step(task).totals() for _ in range(steps)]
    found = state_of(run) | {"losses": losses, "fused": run.engine.module.fused}
    run.end_task()
    run.finish()
    return found


def threads_that_look_at_parameters(steps: int, **changes) -> set[str]:
    """Under ZeRO-3 a look may be a collective, which only the main thread may begin."""
    from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict

    found, look = set(), ZeROOrderedDict.__getitem__

    def noted(self, key):
        found.add(threading.current_thread().name)
        return look(self, key)

    ZeROOrderedDict.__getitem__ = noted
    try:
        train(steps, **changes)
    finally:
        ZeROOrderedDict.__getitem__ = look
    return found


SEQUENCE = [{"name": "first", "train": "first.jsonl"}, {"name": "second", "train": "second.jsonl"}]


def train_sequence(steps: int, resumed: bool = False, **changes):
    """Weights and anchors after each of two random tasks, the memory's size before each, and what the run said.
    resumed: between the tasks the run knows nothing any more but its own state."""
    from safecl.training import resume

    config = run_config(tasks=SEQUENCE, **changes)
    run, tasks = make_run(
        config, tiny_model(), [random_dataset(60, seed=1), random_dataset(60, seed=4)], random_dataset(20, seed=2)
    )
    said, history = [], []
    run.log = said.append
    for task in tasks:
        run.begin_task(task, active=True)
        history.append({"memory": len(run.memory.buffer)})
        for _ in range(steps):
            run.train_step(task)
        history[-1] |= {"weights": state_of(run)["weights"], "kinds": sorted(run.view.shards()[0].state)}
        run.end_task()
        if resumed:
            state, run.previous = resume.state_of(run), None
            resume.restore(run, state, task)
    return history, said
