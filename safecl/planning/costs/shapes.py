"""The shapes of the models of a run: that of the trained model on any number of ranks, and those of its teachers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from transformers import PreTrainedModel

from safecl.config import ModelConfig, RunConfig
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.settings import read_model_settings
from safecl.engine.model.structure import empty_model
from safecl.engine.teachers.checks import other_models
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.passes import largest_passes
from safecl.planning.plans import RunPlan


def model_structure(config: ModelConfig) -> PreTrainedModel:
    """Return the model without its weights. Raises ConfigError for one that cannot be tuned."""
    read_model_settings(config)
    return empty_model(config.path, CONFIG_DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)


def shapes_of(model: PreTrainedModel, plan: RunPlan) -> Callable[[int], ModelShape]:
    """Return a function that gives the model's shape in this run on a number of ranks."""
    shape_with = functools.cache(functools.partial(ModelShape.of, model, plan.config))
    vocabulary = model.config.get_text_config().vocab_size
    return functools.cache(lambda ranks: shape_with(largest_passes(plan, ranks, vocabulary)))


def teacher_shapes(config: RunConfig) -> list[ModelShape]:
    """Return the sizes of the online teachers, the further models that compute outputs in every step."""
    return [ModelShape.without_activations(model_structure(other)) for other in other_models(config)]
