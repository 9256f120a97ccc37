"""What evaluation needs of a model, and the plain Hugging Face folder that gives it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from safecl.config import ConfigError
from safecl.evaluation.answers.folders import check_is_model

Item = TypeVar("Item")


class EvalModel(Protocol):
    """A causal language model on one or several ranks.

    Under ZeRO-3 each forward pass gathers weights from all ranks, so every rank must call `logits`, `any` and `gather`
    equally often and in the same order; the loops in `generate` and `likelihood` see to that.

    Optional: `max_positions` (int), where longer inputs would be wrong or crash; `eos_ids`, further token ids that end
    an answer.
    """

    device: torch.device
    rank: int
    world_size: int
    vocab_size: int

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, Any]:
        """input_ids and position_ids int64 [batch, new]; attention_mask [batch, past + new], 1 for real tokens.

        Returns logits [batch, new, vocab], or [batch, 1, vocab] of the last position with `last_only`, and the cache to
        hand back.
        """
        ...

    def any(self, flag: bool) -> bool:
        """True on every rank where any rank says true."""
        ...

    def gather(self, items: list[Item]) -> list[Item]:
        """Concatenation of the ranks' lists, in rank order, on every rank."""
        ...


def shard_of(model: EvalModel, items: Sequence[Item]) -> list[Item]:
    """This rank's items: item i belongs to rank i mod world_size."""
    return list(items[model.rank :: model.world_size])


def gather_in_order(model: EvalModel, own: Sequence[Item]) -> list[Item]:
    """Undoes `shard_of`: the results of all ranks, in the original order, on every rank."""
    numbered = [(model.rank + position * model.world_size, item) for position, item in enumerate(own)]
    return [item for _, item in sorted(model.gather(numbered), key=lambda pair: pair[0])]


class HFEvalModel:
    """A Hugging Face causal model as an `EvalModel`. Every rank of the process group, if there is one, holds a whole
    copy."""

    def __init__(self, model: torch.nn.Module):
        self.model = model.eval()
        self.device = next(model.parameters()).device
        in_group = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.eos_ids = eos_ids_of(model)
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache = cache_name(model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> HFEvalModel:
        """Loads a model folder or hub id.

        Args: `dtype` bf16, fp32 or auto (as saved); `device` the GPU of this rank where there is one, else CPU;
        `attention` auto (the model's default), sdpa, eager or flash_attention_2.
        Raises: ConfigError where there is no such model, or its files cannot be read.
        """
        from transformers import AutoModelForCausalLM

        check_is_model(path)
        options = {} if attention == "auto" else {"attn_implementation": attention}
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=_DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
        except MemoryError:
            raise
        except Exception as error:  # the library, its file formats and the model's own code raise many kinds
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{path}: cannot be loaded as a causal language model: {first_line}") from error
        _refuse_random_weights(path, info)
        return cls(model.to(device or _default_device()))

    @torch.no_grad()
    def logits(self, input_ids, attention_mask, position_ids, past=None, use_cache=False, last_only=False):
        more = {self._cache: past} | ({"logits_to_keep": 1} if last_only and self._keeps_last else {})
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **more
        )  # fmt: skip
        return (output.logits[:, -1:] if last_only else output.logits), (
            getattr(output, self._cache) if use_cache else None
        )

    def any(self, flag: bool) -> bool:
        if self.world_size == 1:
            return bool(flag)
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather(self, items: list) -> list:
        if self.world_size == 1:
            return list(items)
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]


_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


def cache_name(model: torch.nn.Module) -> str:
    """What this version of transformers calls the key-value cache, in `forward` and in its output."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def eos_ids_of(model: torch.nn.Module) -> tuple[int, ...]:
    """Token ids that end an answer by the model's own generation config."""
    return _ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _refuse_random_weights(path: str | Path, info: dict[str, Any]) -> None:
    """transformers fills in random weights for those that a folder lacks; such a model would be measured in earnest."""
    missing = sorted({*info.get("missing_keys", ()), *(entry[0] for entry in info.get("mismatched_keys", ()))})
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} weights are missing or of another shape than config.json says, first {missing[0]}"
        )
