"""The shapes of the models of a run: that of the trained model on any number of ranks, and those of its teachers."""

from __future__ import annotations

import functools
from collections.abc import Callable

from safecl.config import RunConfig
from safecl.engine.teachers.checks import other_models
from safecl.planning.costs.model_shape import ModelShape
from safecl.planning.costs.planned_model import PlannedModel, planned_model
from safecl.planning.passes import largest_passes
from safecl.planning.plans import RunPlan
from safecl.storage.model_records import ModelRecords


def trained_model(config: RunConfig) -> PlannedModel:
    """Return what is known of the model that a run trains. Raises ConfigError for one that cannot be tuned."""
    return planned_model(config.model, ModelRecords.of(config))


def shapes_of(model: PlannedModel, plan: RunPlan) -> Callable[[int], ModelShape]:
    """Return a function that gives the model's shape in this run on a number of ranks."""
    shape_with = functools.cache(functools.partial(ModelShape.of, model, plan.config))
    vocabulary = model.outline.vocab_size
    return functools.cache(lambda ranks: shape_with(largest_passes(plan, ranks, vocabulary)))


def teacher_shapes(config: RunConfig) -> list[ModelShape]:
    """Return the sizes of the online teachers, the further models that compute outputs in every step."""
    records = ModelRecords.of(config)
    return [ModelShape.without_activations(planned_model(other, records).outline) for other in other_models(config)]
