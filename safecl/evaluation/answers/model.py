"""The interface between evaluation and a model, and its implementation for a Hugging Face folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from safecl.config import ConfigError
from safecl.distributed import collectives
from safecl.distributed.library_warnings import no_future_warnings
from safecl.evaluation.answers.folders import check_is_model
from safecl.evaluation.answers.sketch import gradient_sketches, padded
from safecl.kernels.finite import count_nonfinite
from safecl.storage.model_folder import adapter_base, is_adapter, settings_source
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

Item = TypeVar("Item")


class EvalModel(Protocol):
    """A causal language model on one or several ranks.

    Under ZeRO-3 each forward pass gathers weights from all ranks, so every rank must call `logits`, `any` and `gather`
    equally often and in the same order; the loops in `generate` and `likelihood` ensure that.

    Optional: `mean_states(prompts, depth)`, mean hidden states of prompts, which the scan's probe needs;
    `answer_sketches(prompts, answers)`, sketches of answers' gradients at the head, which its view of answers needs;
    `max_positions` (int), where longer inputs would be wrong or crash (`max_positions_of` reads it);
    `rows_at_once(width, new)`, the number of prompts that should share a pass at least;
    `eos_ids`, further token ids that end an answer; `generate`, which answers in the place of `generate_greedy`
    (safecl.evaluation.serving).
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

        Returns logits [batch, new, vocab], or [batch, 1, vocab] of the last position with `last_only`; and the
        key-value cache, to be passed as `past` to the next call.
        """
        ...

    def any(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is true on any rank."""
        ...

    def gather(self, items: list[Item]) -> list[Item]:
        """Concatenate the lists of all ranks, in rank order, on every rank."""
        ...


def max_positions_of(model: EvalModel) -> int | None:
    """Return the largest number of tokens that the model takes; None where it has no limit."""
    return getattr(model, "max_positions", None)


def shard_of(model: EvalModel, items: Sequence[Item]) -> list[Item]:
    """Return this rank's items: item i belongs to rank i mod world_size."""
    return list(items[model.rank :: model.world_size])


def gather_in_order(model: EvalModel, own: Sequence[Item]) -> list[Item]:
    """Undo `shard_of`: return the results of all ranks, in the original order, on every rank."""
    numbered = [(model.rank + position * model.world_size, item) for position, item in enumerate(own)]
    return [item for _, item in sorted(model.gather(numbered), key=lambda pair: pair[0])]


class HFEvalModel:
    """A Hugging Face causal model as an `EvalModel`. Each rank of the process group, if there is one, holds a whole
    copy."""

    def __init__(self, model: PreTrainedModel):
        model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.model = model
        self.device = next(model.parameters()).device
        self.rank, self.world_size = collectives.rank(), collectives.world_size()
        head: torch.nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # as above
        self.vocab_size = head.weight.shape[0]
        self.max_positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
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
    ) -> Self:
        """Load a model folder or hub id.

        Args: `dtype` bf16, fp32 or auto (as saved); `device` the GPU of this rank where there is one, else CPU;
        `attention` auto (the model's default), sdpa, eager or flash_attention_2.
        Raises: ConfigError where there is no such model, its files cannot be read, or a weight is NaN or infinite.
        """
        check_is_model(path)
        options = {} if attention == "auto" else {"attn_implementation": attention}
        try:
            with no_future_warnings():
                model, info = _load(str(path), dtype=_DTYPES[dtype], trust_remote_code=trust_remote_code, **options)
        except MemoryError:
            raise
        except Exception as error:  # the library, its file formats and the model's own code raise many kinds
            raise ConfigError(f"{path}: cannot be loaded as a causal language model: {library_error(error)}") from error
        _refuse_random_weights(path, info)
        _refuse_nonfinite_weights(path, model)
        return cls(model.to(device or collectives.device()))

    @torch.no_grad()
    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, Any]:
        more = {self._cache: past} | ({"logits_to_keep": 1} if last_only and self._keeps_last else {})
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **more
        )
        logits = output.logits[:, -1:] if last_only else output.logits
        return logits, getattr(output, self._cache) if use_cache else None

    @torch.no_grad()
    def mean_states(self, prompts: Sequence[Sequence[int]], depth: float) -> torch.Tensor:
        """Return the mean over each prompt's tokens of the hidden states at this depth, fp32 [prompts, H].

        depth: share of the layers, in (0, 1].
        """
        width, layers = max(map(len, prompts)), self.model.config.get_text_config().num_hidden_layers
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        for place, prompt in enumerate(prompts):
            ids[place, : len(prompt)] = torch.as_tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        inside = (torch.arange(width) < lengths[:, None]).to(self.device)
        output = self.model.get_decoder()(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
            input_ids=ids.to(self.device), attention_mask=inside.long(), use_cache=False, output_hidden_states=True
        )
        states: torch.Tensor = output.hidden_states[max(1, round(depth * layers))].float()
        return (states * inside[..., None]).sum(1) / lengths.to(self.device)[:, None]

    @torch.no_grad()
    def answer_sketches(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
        """Return the sketch of each answer's gradient at the output head, fp32 [answers, 4096], see `sketch.py`."""
        batch = {key: value.to(self.device) for key, value in padded(prompts, answers).items()}
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["inside"].long(),
            use_cache=False,
            output_hidden_states=True,
        )
        logits, hidden = (
            values.flatten(0, 1)[batch["positions"]] for values in (output.logits, output.hidden_states[-1])
        )
        return gradient_sketches(logits, hidden, batch["targets"], batch["row_of"], len(prompts))

    def any(self, flag: bool) -> bool:
        return collectives.any_rank(bool(flag))

    def gather(self, items: list[Item]) -> list[Item]:
        return collectives.gather_objects(items)


_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


def cache_name(model: torch.nn.Module) -> str:
    """Return the name of the key-value cache in `forward` and its output; transformers versions differ."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def eos_ids_of(model: torch.nn.Module) -> tuple[int, ...]:
    """Return the token ids that end an answer according to the model's generation config."""
    return _ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _load(path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model, or an adapter on its base, which may be named relative to the adapter's place. Also return what
    transformers tells about its weights."""
    from transformers import AutoModelForCausalLM

    if is_adapter(path):
        model, info = _load(adapter_base(path), **options)
        model.load_adapter(path)
        return model, info
    source, more = settings_source(path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options, **more)
    return loaded[0], loaded[1]


def _refuse_random_weights(path: str | Path, info: dict[str, Any]) -> None:
    """Refuse a folder that lacks weights: transformers fills in random ones, and their model would be measured."""
    missing = sorted({*info.get("missing_keys", ()), *(entry[0] for entry in info.get("mismatched_keys", ()))})
    if missing:
        raise ConfigError(
            f"{path}: {len(missing)} weights are missing or of another shape than config.json says, first {missing[0]}"
        )


def _refuse_nonfinite_weights(path: str | Path, model: PreTrainedModel) -> None:
    """Refuse a model whose weights are not finite: its answers are noise, in which a scorer may find no harm."""
    for name, p in model.named_parameters():
        if count := count_nonfinite(p):
            raise ConfigError(
                f"{path}: {count:,} of the {p.numel():,} values of {name} are not finite (NaN or infinite); such a "
                "model cannot be trained or measured"
            )
