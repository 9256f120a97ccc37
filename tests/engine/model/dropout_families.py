"""Tiny models with dropout in every place where their family has some, and estimates of them on the pool's ranks."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.checkpoint.families import FAMILIES
from tests.engine.scenes import VOCAB, random_dataset, run_config
from tests.methods import scenes

GPT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
PLACES = {
    "gpt2": GPT,
    "gptj": GPT,
    "gpt_neo": ("resid_dropout", "embed_dropout", "attention_dropout"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "opt": ("dropout", "attention_dropout", "layerdrop"),
    "phi": ("resid_pdrop", "embd_pdrop", "attention_dropout"),
    "bloom": ("hidden_dropout", "attention_dropout"),
    "falcon": ("hidden_dropout", "attention_dropout"),
    "llama": ("attention_dropout",),
}
"""The settings of dropout that each family has."""


def model_of(family: str, dropout: float) -> torch.nn.Module:
    """A random model with checkpointed layers; its weights are the same for every rate of dropout."""
    import transformers

    from safecl.config import ModelConfig
    from safecl.distributed import collectives
    from safecl.engine.model.structure import prepare_for_training

    torch.manual_seed(1)
    places = [place for place in PLACES[family] if place != "layerdrop" or collectives.world_size() == 1]
    sizes = FAMILIES[family] | dict.fromkeys(places, dropout)  # ranks would drop different layers
    assert sizes["vocab_size"] == VOCAB
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
    return prepare_for_training(model, ModelConfig(path="unused", dtype="fp32", gradient_checkpointing=True))


def estimates(families: list[str], stage: int = 0) -> dict[str, dict[str, Any]]:
    """By family: {"estimates": one with dropout, the same again, one without, each a 1-D tensor; "losses": two of the
    same training step; "repeated": whether the estimate computes layers again in its backward pass}."""
    return {family: _estimates(family, stage) for family in families}


def _estimates(family: str, stage: int) -> dict[str, Any]:
    found: list[torch.Tensor] = []
    for dropout, times in ((0.3, 2), (0.0, 1)):
        config = run_config(deepspeed={"stage": stage})
        run, (task,) = scenes.make_run(
            config, model_of(family, dropout), [random_dataset(20, seed=1)], random_dataset(8, seed=2)
        )
        for _ in range(times):
            with _CountedLayers(run.engine.module) as calls:
                found.append(_fisher(run))
        modes = {module.training for module in run.engine.module.modules()}
        assert modes == {True}, "the model is not back in training mode"
        if dropout:
            repeated = calls.in_backward > 0
            run.begin_task(task, active=True)
            rows = run.step_rows(task)
            losses = [float(run.engine.gradient_pass(rows, run.engine.stash("g")).totals()["task"]) for _ in range(2)]
    return {"estimates": found, "losses": losses, "repeated": repeated}


def _fisher(run) -> torch.Tensor:
    from safecl.engine.fisher.estimate import estimate_fisher

    rows, ids = run.memory.all_rows(), run.memory.keys()
    estimate_fisher(run.engine, rows, ids, seed=3, sign_batches=2, rows_per_batch=4, kind="fisher")
    tensors = run.engine.optimizer.tensors("fisher")
    return torch.cat([run.engine.shards.read(name, tensors).flatten() for name in run.engine.shards.shapes])


class _CountedLayers:
    """Counts the calls of MLPs and attentions inside decoder layers that happen in a backward pass."""

    def __init__(self, model: torch.nn.Module):
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._parts = [part for layer in layers for part in layer.children()]
        self.in_backward = 0

    def __enter__(self) -> _CountedLayers:
        self._handles = [part.register_forward_pre_hook(self._count) for part in self._parts]
        return self

    def _count(self, module: torch.nn.Module, arguments: tuple) -> None:
        self.in_backward += torch._C._current_graph_task_id() != -1

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
