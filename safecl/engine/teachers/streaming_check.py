"""The check that a streamed pass gives the logits of the model itself, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from safecl.config import ConfigError, RunConfig
from safecl.distributed import collectives
from safecl.distributed.node import this_node
from safecl.engine.model.checks import check_head
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.model.settings import choose_attention
from safecl.engine.model.structure import empty_model
from safecl.engine.passes.live_model import evaluating
from safecl.engine.passes.training_engine import TrainingEngine
from safecl.engine.reference.loading import take_weights
from safecl.engine.reference.store import ReferenceStore
from safecl.engine.teachers.checks import STREAMING_ERRORS, cannot_be_streamed
from safecl.engine.teachers.questions import TeacherBatch
from safecl.engine.teachers.streamed import StreamedTeacher
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMITS = {"fp32": 1e-4, "bf16": 2.0**-5}
"""Largest relative difference of the logits, by the run's dtype."""


@torch.no_grad()
def check_streamed(
    teacher: StreamedTeacher, source: str, plain: LanguageModel | None, live: TrainingEngine | None, dtype: str
) -> None:
    """Compare the teacher's logits of a few tokens with the model's own. A collective call; raises ConfigError.

    live: the engine, where its model is the teacher's now. plain: otherwise the model as transformers runs it, on the
    first rank of each node (`plain_model`).
    """
    ids = torch.arange(2, 10)[None]
    positions = torch.arange(ids.shape[1])[None]
    try:
        found = teacher.logits(TeacherBatch(ids, positions)).cpu()
    except STREAMING_ERRORS as error:
        raise ConfigError(cannot_be_streamed(source, source, str(error))) from None
    is_linear = live.module.fused if live is not None else plain is None or check_head(plain)
    if collectives.any_rank(not is_linear):
        problem = "its logits are more than a linear head with a softcap and a scale"
        raise ConfigError(cannot_be_streamed(source, source, problem))
    expected: torch.Tensor | None = None
    if live is not None:
        expected = _live_logits(live, ids, positions)
    elif plain is not None:
        expected = plain.logits(ids, positions)["logits"].float()
    difference = max(collectives.gather_objects([_difference(found, expected)]))
    if difference > LIMITS[dtype]:
        problem = f"its logits differ by {difference:.1%} from the model's own"
        raise ConfigError(cannot_be_streamed(source, source, problem))


def _live_logits(engine: TrainingEngine, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    with evaluating(engine, average=False):
        return engine.logits(ids.to(engine.device), None, positions.to(engine.device)).float().cpu()


def _difference(found: torch.Tensor, expected: torch.Tensor | None) -> float:
    """||found - expected|| / ||expected||; 0 on a rank that has nothing to compare with."""
    if expected is None:
        return 0.0
    return float((found - expected[..., : found.shape[-1]]).norm() / expected.norm().clamp_min(1e-20))


def plain_model(config: RunConfig, store: ReferenceStore, path: str) -> LanguageModel | None:
    """The model as transformers runs it, in host memory, without a copy of its weights.

    None except on the first rank of each node.
    """
    if not this_node().is_first:
        return None
    plain = empty_model(path, store.dtype, trust_remote_code=config.model.trust_remote_code)
    take_weights(plain, store)
    return LanguageModel(plain)


def teacher_structure(config: RunConfig, path: str) -> PreTrainedModel:
    """Return the teacher's model without weights. Raises ConfigError."""
    settings = config.model
    attention, _ = choose_attention(settings.attention, settings.dtype)
    chosen = None if settings.attention == "auto" and attention == "sdpa" else attention
    dtype = CONFIG_DTYPES[settings.dtype]
    try:
        return empty_model(path, dtype, attention=chosen, trust_remote_code=settings.trust_remote_code)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # the library's classes check their sizes in many ways
        raise ConfigError(f"teacher: {path}: no model can be read there: {library_error(error)}") from None
