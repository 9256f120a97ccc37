"""Small runs for engine tests: a tiny model and rows of unequal length, in any ZeRO stage on the pool's ranks."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch

VOCAB = 131
REFUSAL_IDS = (9, 41, 17)


def answer_ids(text: str) -> tuple[int, ...]:
    """The tokens of a text in runs that have no tokenizer: one for a letter, and those of a refusal for a sentence."""
    return (ord(text) - 90,) if len(text) == 1 else REFUSAL_IDS


def tiny_model(tied: bool = False, dtype: torch.dtype = torch.float32, family: str = "llama"):
    """A random causal language model of about 30 k parameters, sizes odd on purpose."""
    import transformers

    torch.manual_seed(7)
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "gemma": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    }[family]
    if family == "gemma":
        sizes |= dict(head_dim=8, final_logit_softcapping=5.0)
    return model(config(**sizes)).to(dtype)


def random_dataset(num_rows: int, seed: int, min_length: int = 4, max_length: int = 24):
    """Rows of random tokens, of unequal length, with a prompt part that is not supervised."""
    from safecl.data import TokenDataset
    from safecl.data.tokens import PreparedFile

    rng = np.random.default_rng(seed)
    lengths = rng.integers(min_length, max_length + 1, num_rows)
    masks = [np.arange(length) >= rng.integers(1, length) for length in lengths]
    arrays = {
        "tokens": rng.integers(3, VOCAB, lengths.sum()).astype(np.int32),
        "loss_mask": np.concatenate(masks),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "row_ids": np.arange(1, num_rows + 1, dtype=np.uint64) + np.uint64(1000 * seed),
        "num_targets": np.array([mask.sum() for mask in masks], np.int32),
        "lines": np.arange(1, num_rows + 1),
        "tags": np.zeros(0, np.uint8),
        "tag_offsets": np.zeros(num_rows + 1, np.int64),
    }
    return TokenDataset.from_store(PreparedFile(arrays, path="test.jsonl"))


def run_config(tmp: str = "unused", **changes):
    """A RunConfig for engine tests; `changes` are sections."""
    from safecl.config import RunConfig

    tree = {
        "model": {"path": "unused", "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [{"name": "t", "train": "unused"}],
        "memory": {"source": "unused", "replay_ratio": 0.25, "teacher": {"k": 8}},
        "train": {
            "learning_rate": 1e-2,
            "eps": 1e-4,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "clip_norm": 1.0,
            "tokens_per_batch": 160,
            "tokens_per_microbatch": 64,
            "max_length": 64,
            "max_steps": 10,
            "seed": 3,
            "packing": "packed",
        },
        "output": tmp,
    }
    for section, values in changes.items():
        tree[section] = (
            {**tree[section], **values} if isinstance(tree.get(section), dict) and isinstance(values, dict) else values
        )
    return RunConfig.model_validate(tree)


def make_run(config, model=None, methods_active: bool = True):
    """Return (run, task plan) on this rank: everything that the trainer builds, without files."""
    run, task = build_run(config, model)
    begin(run, task, methods_active)
    return run, task


def build_run(config, model=None, store=None, dataset=None):
    """Return (run, task plan) before the task has begun.

    store: the store whose memory the model's weights are views of. dataset: 60 short rows by default.
    """
    from safecl.data import TaskOrder
    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.planning.plans import TaskPlan
    from safecl.planning.run_plan import build_methods
    from safecl.training.run import Run

    train = config.train
    layout = MicroBatchLayout(collectives.world_size(), train.tokens_per_microbatch, packed=train.packing == "packed")
    model = model if model is not None else tiny_model()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = TrainingEngine(LanguageModel(model), config, layout, store)
    dataset = random_dataset(60, seed=1) if dataset is None else dataset
    order = TaskOrder(
        dataset, seed=train.seed, tokens_per_batch=train.tokens_per_batch, epochs=None, max_steps=train.max_steps
    )
    task = TaskPlan(config.tasks[0], dataset, train.tokens_per_batch, order)
    run = Run(config, engine, build_methods(config), log=lambda message: None)
    run.row_scores.answer_ids = answer_ids
    return run, task


def begin(run, task, methods_active: bool = True, memory_folder=None) -> None:
    """Fill the memory and begin the task."""
    from safecl.training.replay_memory import fill_memory

    config = run.config
    if config.memory is not None:
        needs_teacher = config.needs_teacher
        run.memory = fill_memory(
            run.engine,
            random_dataset(20, seed=2),
            config.memory,
            seed=config.train.seed,
            source="test",
            with_teacher=needs_teacher,
            folder=memory_folder,
        )
    run.begin_task(task, active=methods_active)


def state_of(run) -> dict[str, dict[str, torch.Tensor]]:
    """The whole model's weights, EMA, anchor and Fisher, by parameter name."""
    shards, optimizer = run.engine.shards, run.engine.optimizer
    found = {"weights": {name: shards.read(name) for name in shards.shapes}}
    for kind in ("ema", "anchor", "fisher"):
        if optimizer.has(kind):
            found[kind] = {name: shards.read(name, optimizer.tensors(kind)).float() for name in shards.shapes}
    return found


def train_to_state(steps: int, tied: bool = False, bf16: bool = False, family: str = "llama", **changes):
    """Train on this rank; return the whole state and the losses of each step."""
    config = run_config(**changes)
    run, task = make_run(config, tiny_model(tied, torch.bfloat16 if bf16 else torch.float32, family))
    losses = [run.train_step(task).totals() for _ in range(steps)]
    return state_of(run) | {"losses": losses}
