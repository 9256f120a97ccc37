"""Measures models that are merged of opened ones, in memory, as `safecl eval` measures folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from safecl.config import ConfigError, RunConfig
from safecl.data import load_tokenizer
from safecl.engine.model.dtypes import CONFIG_DTYPES, FLOAT_DTYPES
from safecl.evaluation import Evaluation, HFEvalModel, judge_gate
from safecl.evaluation.gates.outcomes import Record
from safecl.evaluation.questions import Questions, questions_of
from safecl.merging.base import Merge, MergeConfig, Models, Weights
from safecl.merging.choice import Measured
from safecl.merging.models.opening import Opened
from safecl.merging.points import Point, text_of
from safecl.merging.registry import kind_module
from safecl.merging.rows.loaded import load
from safecl.merging.run import entries_of
from safecl.merging.stream import merged_tensor, run_passes


@dataclass(frozen=True)
class _Merged:
    """The result of a merge as one model's weights, rounded as in a folder. Implements safecl.merging.base.Weights."""

    merge: Merge[MergeConfig]
    models: Models
    dtypes: Mapping[str, torch.dtype]
    label: str = "merged"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.models.tuned[0].shapes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        whole = merged_tensor(self.merge, self.models, name).to(self.dtypes[name]).float()
        return whole[start:stop] if whole.dim() else whole


@dataclass(frozen=True)
class Measuring:
    """Measures models that are merged of the opened ones.

    reference: records of the model before tuning, for a gate that limits a rise."""

    kind: str
    opened: Opened
    config: RunConfig
    questions: Questions
    tokenizer: Any
    reference: Sequence[Record] | None = None

    @classmethod
    def of(cls, kind: str, opened: Opened, config: RunConfig) -> Measuring:
        """Read what the config measures. Raises ConfigError where that is nothing, or does not fit."""
        questions = questions_of(config)
        if not questions:
            raise ConfigError("--eval: the config measures nothing; it needs safety.prompts, or a task with `eval`")
        settings = config.model.model_copy(update={"path": opened.models.folders["tuned"]})
        work = cls(kind, opened, config, questions, load_tokenizer(settings, "tuned"))
        before = opened.models.aligned or opened.models.base
        if config.safety is None or config.safety.gate is None or not config.safety.gate.is_relative or before is None:
            return work
        safety = work.evaluation(before, "before").safety
        return replace(work, reference=safety.outputs if safety else None)

    def point(self, own: MergeConfig, point: Point) -> Measured:
        """Measure the merge with the settings `own`, which those of the point are part of."""
        models = self.opened.models
        made: Merge[MergeConfig] = kind_module(self.kind).Merge(own, models)
        run_passes(made, models)
        dtypes = {n: FLOAT_DTYPES[e.dtype] for n, e in entries_of(own, self.opened).items() if n in models.places}
        evaluation = self.evaluation(_Merged(made, models, dtypes), text_of(point))
        safety = self.config.safety
        return Measured(point, evaluation, judge_gate(safety.gate if safety else None, evaluation, self.reference))

    @torch.no_grad()
    def evaluation(self, weights: Weights, when: str) -> Evaluation:
        """Measure one model's weights."""
        settings = self.config.model
        attention = None if settings.attention == "auto" else settings.attention
        dtype = CONFIG_DTYPES[settings.dtype]
        model = load(self.opened.models, weights, dtype, settings.trust_remote_code, attention).model
        return self.questions.measure(HFEvalModel(model), self.tokenizer, when)
