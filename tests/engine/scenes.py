"""Small runs for engine tests: a tiny model, rows of unequal length, training in any ZeRO stage on the ranks of the
pool."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch

VOCAB = 131


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
    """(run, task plan) on this rank: everything that the trainer builds, without files."""
    run, task = build_run(config, model)
    begin(run, task, methods_active)
    return run, task


def build_run(config, model=None, store=None, dataset=None):
    """(run, task plan) before the task has begun; `store` is what the model's weights are views of. By default 60 short
    rows."""
    from safecl.data import TaskOrder
    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import Layout
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.planning.plans import TaskPlan
    from safecl.planning.run_plan import build_methods
    from safecl.training.run import Run

    train = config.train
    layout = Layout(collectives.world_size(), train.tokens_per_microbatch, packed=train.packing == "packed")
    model = model if model is not None else tiny_model()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = TrainingEngine(LanguageModel(model), config, layout, store)
    dataset = random_dataset(60, seed=1) if dataset is None else dataset
    order = TaskOrder(
        dataset, seed=train.seed, tokens_per_batch=train.tokens_per_batch, epochs=None, max_steps=train.max_steps
    )
    task = TaskPlan(config.tasks[0], dataset, train.tokens_per_batch, order)
    return Run(config, engine, build_methods(config), log=lambda message: None), task


def begin(run, task, methods_active: bool = True, memory_folder=None) -> None:
    """Fills the memory and begins the task."""
    from safecl.training.replay_memory import fill_memory

    config = run.config
    if config.memory is not None:
        needs_teacher = any(getattr(settings, "needs_teacher", False) for settings in config.methods.values())
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
    """Weights, EMA, anchor and Fisher of the whole model, by parameter name."""
    shards, optimizer = run.engine.shards, run.engine.optimizer
    found = {"weights": {name: shards.read(name) for name in shards.shapes}}
    for kind in ("ema", "anchor", "fisher"):
        if optimizer.has(kind):
            found[kind] = {name: shards.read(name, optimizer.tensors(kind)).float() for name in shards.shapes}
    return found


def train_to_state(steps: int, tied: bool = False, bf16: bool = False, family: str = "llama", **changes):
    """Trains on this rank; returns the whole state, the losses of each step and which ranks had replay tokens."""
    config = run_config(**changes)
    run, task = make_run(config, tiny_model(tied, torch.bfloat16 if bf16 else torch.float32, family))
    losses = [run.train_step(task).totals() for _ in range(steps)]
    return state_of(run) | {"losses": losses}


def shape_of_steps(steps: int, **changes) -> list[dict]:
    """How this rank's steps look: micro-batches, replay targets, gradient norm."""
    from safecl.engine.passes.micro_batches import micro_batches

    run, task = make_run(run_config(**changes))
    shapes = []
    for _ in range(steps):
        rows = run.step_rows(task)
        batches = micro_batches(rows, ["task", "replay"], run.engine.layout, run.engine.rank)
        run.train_step(task)
        norm = float(run.engine.optimizer.result.grad_norm)
        replay = sum(int((batch.terms == 1).sum()) for batch in batches)
        shapes.append({"micro_batches": len(batches), "replay_targets": replay, "grad_norm": norm})
    return shapes


def train_broken(mutation: str, **arguments):
    """train_to_state with one deliberate mistake in the engine."""
    from unittest import mock

    from safecl.engine.passes import micro_batches, training_engine
    from safecl.engine.zero import optimizer

    adamw, accumulate, build = optimizer.adamw_step_, training_engine.fisher_accumulate_, micro_batches._build

    def without_ema(*tensors, ema=None, ema_decay=None, **options):
        return adamw(*tensors, **options)

    def pushing_away(param, grad, exp_avg, exp_avg_sq, *, anchor=None, **options):
        mirrored = None if anchor is None else 2 * param - anchor
        return adamw(param, grad, exp_avg, exp_avg_sq, anchor=mirrored, **options)

    def without_clip(*tensors, clip_coef=None, **options):
        return adamw(*tensors, **options)

    def mean_per_micro_batch(*arguments):
        built = build(*arguments)
        weights = built.inputs["ce_weights"]
        weights[weights > 0] /= max(1, int((weights > 0).sum())) / 40
        return built

    patches = {
        "ema_no_op": mock.patch.object(optimizer, "adamw_step_", without_ema),
        "penalty_sign": mock.patch.object(optimizer, "adamw_step_", pushing_away),
        "fisher_doubled": mock.patch.object(
            training_engine, "fisher_accumulate_", lambda f, g, w: accumulate(f, g, 2 * w)
        ),
        "clip_off": mock.patch.object(optimizer, "adamw_step_", without_clip),
        "normaliser_per_micro_batch": mock.patch.object(micro_batches, "_build", mean_per_micro_batch),
    }
    with patches[mutation]:
        return train_to_state(**arguments)


def bf16_reference(steps: int, ema_decay: float, lr: float = 1e-2, eps: float = 1e-4):
    """Plain PyTorch in bf16 with fp32 masters, over the same packed micro-batches and the same head."""
    from safecl.data import TaskOrder, collate
    from safecl.kernels import adamw_step_, linear_distill_loss

    config = run_config()
    model = tiny_model(dtype=torch.bfloat16).train()
    data = random_dataset(60, seed=1)
    order = TaskOrder(data, seed=config.train.seed, tokens_per_batch=160, max_steps=steps)
    params = dict(model.named_parameters())
    master = {name: p.detach().float().clone() for name, p in params.items()}
    ema = {name: p.clone() for name, p in master.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in master.items()}
    for step in range(1, steps + 1):
        rows = data.rows(order.rows_of_step(step - 1))
        batch = collate(rows, packed=True, pad_id=0)
        positions = (batch.targets != -100).nonzero().flatten()
        hidden = model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state.flatten(0, 1)
        weight = torch.full((len(positions),), 1.0 / len(positions))
        loss = linear_distill_loss(
            hidden[positions], model.lm_head.weight, labels=batch.targets[positions], ce_weights=weight
        ).loss
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, p in params.items():
                adamw_step_(
                    master[name],
                    p.grad.float(),
                    *moments[name],
                    step=step,
                    lr=lr,
                    betas=(0.9, 0.999),
                    eps=eps,
                    weight_decay=0.0,
                    ema=ema[name],
                    ema_decay=ema_decay,
                )
                p.copy_(master[name])
    return {"weights": master, "ema": ema}


def bf16_gradient(**changes) -> dict[str, torch.Tensor]:
    """The reduced gradient of the first step's long rows, each a micro-batch of its own, by parameter name."""
    run, task = make_run(run_config(**changes), tiny_model(dtype=torch.bfloat16))
    run.engine.gradient_pass([row for row in run.step_rows(task) if row.length > 12], run.engine.stash("seen"))
    shards = run.engine.shards
    return {name: shards.read(name, run.engine.optimizer.tensors("seen")) for name in shards.shapes}


def summed_bf16_gradients() -> dict[str, torch.Tensor]:
    """fp32 sum of each long row's own bf16 gradient, in plain PyTorch, with the weights of the step's mean."""
    from safecl.data import TaskOrder
    from safecl.kernels import linear_distill_loss

    data = random_dataset(60, seed=1)
    rows = data.rows(TaskOrder(data, seed=3, tokens_per_batch=160, max_steps=10).rows_of_step(0))
    model = tiny_model(dtype=torch.bfloat16)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    count = sum(row.num_targets for row in rows)
    for row in (row for row in rows if len(row) > 12):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        mask = torch.from_numpy(row.loss_mask[1:].copy())
        weights = torch.full((int(mask.sum()),), 2.0 / count)  # times the two ranks, as DeepSpeed's mean expects
        loss = linear_distill_loss(hidden[mask], model.lm_head.weight, labels=ids[0, 1:][mask], ce_weights=weights).loss
        for (name, _), grad in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total[name] += grad.float() / 2
    return total
