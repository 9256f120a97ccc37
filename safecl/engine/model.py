"""The Hugging Face model, wrapped in one module whose forward runs the trunk and the fused head.

Wrapping (instead of patching) keeps every architecture as it is, and lets ZeRO-3's own hooks gather `lm_head`, tied or not, because it
is read inside a module's forward. At the start head(trunk(x)) is compared with model(x).logits; where they differ, the model's own logits
are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from safecl.config import ConfigError, ModelConfig
from safecl.data.hub import refuse_unreachable
from safecl.engine.adapters import base_model as base_model
from safecl.evaluation.model import cache_name
from safecl.kernels import DenseTeacher, TopKTeacher, linear_distill_loss, linear_topk
from safecl.kernels.logits_head import logits_distill_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class HeadScaling:
    """What lies between lm_head's product and the logits that the model returns."""

    softcap: float | None = None
    logit_scale: float | None = None


def choose_attention(wanted: str) -> tuple[str, str]:
    """(attention implementation, why)."""
    if wanted != "auto":
        return wanted, "as configured"
    if not torch.cuda.is_available():
        return "sdpa", "no GPU"
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return "sdpa", "flash_attn is not installed"
    return "flash_attention_2", "flash_attn is installed"


def read_model_settings(config: ModelConfig) -> PretrainedConfig:
    """The model's own settings (transformers' config), without reading weights. Raises ConfigError for a model that cannot be tuned."""
    refuse_unreachable("model.path", config.path)
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {config.path}: no model can be read there: {first_line(error)}") from None
    _refuse_unsupported(settings, config.path)
    return settings


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _refuse_unsupported(settings, path: str) -> None:
    text = settings.get_text_config()
    if any(getattr(text, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ConfigError(f"model.path: {path} ({settings.model_type}) is a mixture of experts; safecl tunes dense decoder-only models")
    if getattr(settings, "is_encoder_decoder", False):
        raise ConfigError(f"model.path: {path} ({settings.model_type}) is an encoder-decoder; safecl tunes dense decoder-only models")
    if getattr(settings, "quantization_config", None):
        raise ConfigError(f"model.path: {path} holds quantised weights; safecl trains bf16 or fp32 weights")


def add_adapters(model: nn.Module, config: ModelConfig) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise ConfigError("model.lora needs the extra `lora`: pip install 'safecl[lora]'") from None
    lora = config.lora
    settings = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, task_type="CAUSAL_LM"
    )
    try:
        model = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"model.lora: {first_line(error)}") from None
    for p in model.parameters():  # one dtype per shard
        if p.requires_grad:
            p.data = p.data.to(DTYPES[config.dtype])
    return model


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def head_scaling(model: nn.Module) -> HeadScaling:
    """Softcap and scale of the logits, read from the settings that dense architectures of transformers use; `check_head` tells whether
    that is all there is."""
    settings = base_model(model).config.get_text_config()
    scale = getattr(settings, "logit_scale", None)
    if (divisor := getattr(settings, "logits_scaling", None)) is not None:
        scale = 1.0 / divisor
    return HeadScaling(next((cap for name in _SOFTCAPS if (cap := getattr(settings, name, None)) is not None), None), scale)


class LanguageModel(nn.Module):
    """Trunk and fused head as one module.

    `forward(task="loss", ...)` returns {"loss", "ce", "kd0", ...}; `forward(task="logits", ...)` returns {"logits"}, and so on. Plain dicts
    only: a dataclass that crosses a module boundary crashes ZeRO-3.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.scaling = head_scaling(model)
        self.fused = True
        # A number, not read from the weight when it is asked for: under ZeRO-3 a look at a weight during a forward pass gathers it, and the
        # thread that makes the next step ready asks in the middle of one.
        self.vocab_size = getattr(self.head.weight, "ds_shape", self.head.weight.shape)[0]
        """Width of the logits, padding included."""

    @property
    def trunk(self) -> nn.Module:
        return base_model(self.model).get_decoder()

    @property
    def head(self) -> nn.Module:
        return base_model(self.model).get_output_embeddings()

    def forward(self, *, task: str, **inputs) -> dict[str, torch.Tensor]:
        return {"loss": self.losses, "logits": self.logits, "topk": self.topk, "hidden": self.hidden}[task](**inputs)

    def logits(self, input_ids, position_ids, attention_mask=None, past=None, use_cache=False, last_only=False) -> dict[str, torch.Tensor]:
        """The model's own logits, [batch, length or 1, vocab]."""
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            logits_to_keep=1 if last_only else 0, **{cache_name(base_model(self.model)): past},
        )  # fmt: skip
        return {"logits": output.logits}

    def hidden(self, input_ids, position_ids, positions, reference=False) -> dict[str, torch.Tensor]:
        """Last hidden states (behind the final norm, before the head) at flat positions [n]: {"hidden": [n, hidden size]}.

        reference: of the model with its adapters off.
        """
        with _adapters_off(self.model) if reference else nullcontext():
            return {"hidden": self._hidden(input_ids, position_ids)[positions]}

    def topk(
        self, input_ids, position_ids, positions, k: int, temperature: float, targets=None, reference=False
    ) -> dict[str, torch.Tensor]:
        """What a teacher stores of chosen positions [n]: log_probs [n, k], indices [n, k], log_tail [n]; reference: as in `hidden`.

        With targets [n] also their negative log-likelihood `nll` [n], at temperature 1.
        """
        with _adapters_off(self.model) if reference else nullcontext():
            return self._topk(input_ids, position_ids, positions, k, temperature, targets)

    def _topk(self, input_ids, position_ids, positions, k: int, temperature: float, targets) -> dict[str, torch.Tensor]:
        if self.fused:
            hidden, head = self._hidden(input_ids, position_ids)[positions], self.head
            stored = linear_topk(hidden, head.weight, k, bias=head.bias, temperature=temperature, **asdict(self.scaling))
            found = {"log_probs": stored.log_probs, "indices": stored.indices, "log_tail": stored.log_tail}
            if targets is None:
                return found
            return found | {"nll": linear_distill_loss(hidden, head.weight, bias=head.bias, labels=targets, **asdict(self.scaling)).ce}
        logits = self._own_outputs(input_ids, position_ids)[1][positions].float()
        log_probs = (logits / temperature).log_softmax(-1)
        top = log_probs.topk(k, dim=-1)
        rest = log_probs.scatter(-1, top.indices, float("-inf"))
        found = {"log_probs": top.values, "indices": top.indices, "log_tail": rest.logsumexp(-1)}
        return found if targets is None else found | {"nll": torch.nn.functional.cross_entropy(logits, targets, reduction="none")}

    def losses(
        self, input_ids, position_ids, positions, targets, ce_weights, distillations=(), features=(), reference=False, adapter_pull=None
    ) -> dict[str, torch.Tensor]:
        """Weighted sum of all losses of a micro-batch.

        input_ids, position_ids: int64 [batch, length]. positions: int64 [n], flat indices that have a target. targets: int64 [n].
        ce_weights: fp32 [n]; they carry the normaliser.
        distillations: dicts with rows (int64 [m], indices into positions, what the teacher speaks about), kd_weights fp32 [n], divergence,
        temperature, and what was stored of the teacher: log_probs, indices, log_tail; without these it is the model with its adapters off.
        features: dicts with positions (int64 [m], flat indices), weights fp32 [m], and the teacher's last hidden states `hidden` [m, H];
        without these, of the model with its adapters off. The distance is the mean over H of the squared difference, formed in fp32.
        reference: whether a forward pass with the adapters off is needed, alike on all ranks.
        adapter_pull: a penalty of LoRA's products, a function of the model (safecl.engine.adapters).
        Returns loss (0-dim), ce [n], kd0, kd1, ... [n], feature0, ... [m], adapters (0-dim), detached and unweighted but for the last.
        """
        teacher = self._reference(input_ids, position_ids) if reference else None
        score, hidden = self._scorer(input_ids, position_ids, positions, teacher, need_hidden=bool(features))
        first, *others = distillations or [None]
        output = score(targets, ce_weights, first)
        loss, kd = output.loss, [output.kd] if first is not None else []
        for distillation in others:
            more = score(torch.full_like(targets, -100), torch.zeros_like(ce_weights), distillation)
            loss, kd = loss + more.loss, [*kd, more.kd]
        result = {"ce": output.ce, **{f"kd{index}": value for index, value in enumerate(kd)}}
        for index, feature in enumerate(features):
            where = feature["positions"]
            target = feature["hidden"] if "hidden" in feature else teacher[0][where]
            distance = (hidden[where].float() - target.float()).square().mean(-1)  # [m]
            loss, result[f"feature{index}"] = loss + (feature["weights"] * distance).sum(), distance.detach()
        if adapter_pull is not None:
            pull = adapter_pull(self.model)
            loss, result["adapters"] = loss + pull, pull.detach()
        return {"loss": loss, **result}

    def _scorer(self, input_ids, position_ids, positions, teacher, need_hidden: bool) -> tuple[Callable, torch.Tensor | None]:
        """The losses of these positions as a function of targets, weights and a teacher; and all hidden states [batch * length, H]."""
        if self.fused:
            every = self._hidden(input_ids, position_ids)
            hidden = every[positions]
            teacher = None if teacher is None else teacher[0][positions]
            return lambda targets, ce_weights, distillation: linear_distill_loss(
                hidden, self.head.weight, bias=self.head.bias, labels=targets, ce_weights=ce_weights, **asdict(self.scaling),
                **self._teacher_arguments(distillation, teacher),
            ), every  # fmt: skip
        every, logits = self._own_outputs(input_ids, position_ids, need_hidden)
        logits = logits[positions]
        teacher = None if teacher is None else teacher[1][positions]
        return lambda targets, ce_weights, distillation: logits_distill_loss(
            logits, labels=targets, ce_weights=ce_weights, **self._teacher_arguments(distillation, teacher)
        ), every

    def _hidden(self, input_ids, position_ids) -> torch.Tensor:
        # No mask and no cache: with either, packed documents would see each other, silently.
        output = self.trunk(input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)  # [batch * length, hidden]

    def _own_outputs(self, input_ids, position_ids, need_hidden: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The model's own last hidden states [batch * length, H] where needed, and logits [batch * length, vocab]."""
        output = self.model(
            input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False, output_hidden_states=need_hidden
        )
        return output.hidden_states[-1].flatten(0, 1) if need_hidden else None, output.logits.flatten(0, 1)

    @torch.no_grad()
    def _reference(self, input_ids, position_ids) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Last hidden states and logits of the model with its adapters and dropout off; of the two, what the head does not make itself."""
        with _adapters_off(self.model):
            if self.fused:
                return self._hidden(input_ids, position_ids), None
            return self._own_outputs(input_ids, position_ids, need_hidden=True)

    def _teacher_arguments(self, distillation: dict | None, live: torch.Tensor | None) -> dict:
        """`live` [n, H or vocab]: what the model with its adapters off says at all positions."""
        if distillation is None:
            return {}
        temperature, rows = distillation["temperature"], distillation["rows"]
        if "log_probs" in distillation:
            stored = [distillation[key] for key in ("log_probs", "indices", "log_tail")]
            teacher = TopKTeacher(*stored, temperature, self.vocab_size)
        elif self.fused:
            teacher = DenseTeacher(live[rows], self.head.weight, self.head.bias, **asdict(self.scaling))
        else:
            teacher = _whole_vocabulary(live[rows], temperature)
        return dict(
            teacher=teacher, teacher_rows=rows, kd_weights=distillation["kd_weights"], divergence=distillation["divergence"],
            temperature=temperature,
        )  # fmt: skip


def _whole_vocabulary(logits: torch.Tensor, temperature: float) -> TopKTeacher:
    """Logits [m, vocab] as a teacher that has stored every token."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    indices = torch.arange(logits.shape[-1], device=logits.device).expand_as(log_probs)
    return TopKTeacher(log_probs, indices, log_probs.new_full(log_probs.shape[:1], float("-inf")), temperature, logits.shape[-1])


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before adapters were added, without dropout."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)


@torch.no_grad()
def logits_of(engine, input_ids, attention_mask, position_ids, past=None, use_cache=False, last_only=False) -> torch.Tensor:
    """The logits of an engine's live model. With ZeRO-3 every rank must call it equally often. A method of every engine."""
    output = engine.deepspeed(
        task="logits", input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past=past, use_cache=use_cache,
        last_only=last_only,
    )  # fmt: skip
    return output["logits"]


@contextmanager
def rows_are_not_packed() -> Iterator[None]:
    """transformers looks at the positions whether documents are packed, and where they have no values takes it for granted."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


@torch.no_grad()
def check_head(wrapped: LanguageModel, tolerance: float = 1e-5) -> bool:
    """Compares head(trunk(x)) with model(x).logits on a few tokens before training; False switches to the model's own logits.

    Compared as they are, and once more with hidden states so large that logits reach 100 and more: a softcap of 30 changes logits of 3 by
    0.3 %, which bf16 hides, and logits of 300 by 90 %.
    """
    model = wrapped.model
    training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    ids = torch.arange(2, 10, device=next(model.parameters()).device)[None]
    inputs = dict(input_ids=ids, attention_mask=None, position_ids=torch.arange(8, device=ids.device)[None], use_cache=False)
    hidden = wrapped.trunk(**inputs).last_hidden_state
    largest = torch.nn.functional.linear(hidden.float(), wrapped.head.weight.float()).abs().max()
    errors = []
    for factor in (1.0, 2.0 ** round(math.log2(_LOUD / largest)) if 0 < largest < _LOUD else 1.0):
        with _louder(wrapped.trunk, factor):
            expected = model(**inputs).logits.float()
        got = scaled_logits(wrapped, hidden * factor)
        errors.append(float((got - expected).norm() / expected.norm().clamp_min(1e-20)))
    model.train(training)
    wrapped.fused = max(errors) <= (tolerance if dtype == torch.float32 else 2.0**-7) and _plain_linear(wrapped.head)
    return wrapped.fused


_LOUD = 300.0


@contextmanager
def _louder(trunk: nn.Module, factor: float) -> Iterator[None]:
    """The trunk's hidden states times a factor, a power of two, which rounds nothing."""

    def multiply(module: nn.Module, arguments: tuple, output):
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    handle = trunk.register_forward_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check_packing(wrapped: LanguageModel) -> None:
    """Refuses a model whose packed documents see each other: the second of two must give the logits that it gives alone."""
    model, device = wrapped.model, next(wrapped.parameters()).device
    training = model.training
    model.eval()
    first, second = torch.arange(2, 9, device=device), torch.arange(3, 8, device=device)
    restart = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None].to(device)
    both = torch.cat([first, second])[None]
    packed = model(input_ids=both, attention_mask=None, position_ids=restart, use_cache=False).logits[0, len(first) :]
    alone = model(input_ids=second[None], attention_mask=None, position_ids=restart[:, len(first) :], use_cache=False).logits[0]
    model.train(training)
    error = (packed.float() - alone.float()).norm() / alone.float().norm().clamp_min(1e-20)
    if error > (1e-4 if packed.dtype == torch.float32 else 5e-2):
        raise ConfigError(
            f"train.packing: packed documents see each other in this model (logits differ by {float(error):.1%}); use packing: padded"
        )


def _plain_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear


def scaled_logits(wrapped: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 logits of hidden states with the model's softcap and scale, [..., vocab]."""
    head, scaling = wrapped.head, wrapped.scaling
    logits = torch.nn.functional.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())
    logits = logits * scaling.logit_scale if scaling.logit_scale is not None else logits
    return logits if scaling.softcap is None else scaling.softcap * torch.tanh(logits / scaling.softcap)
