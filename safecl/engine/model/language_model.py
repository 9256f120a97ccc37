"""The Hugging Face model, wrapped in one module whose forward runs the trunk and the fused head.

Wrapping (instead of patching) keeps every architecture as it is, and lets ZeRO-3's own hooks gather `lm_head`, tied or
not, because it is read inside a module's forward. At the start head(trunk(x)) is compared with model(x).logits; where
they differ, the model's own logits are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn

from safecl.engine.model.adapters import base_model
from safecl.evaluation.answers.model import cache_name
from safecl.kernels import DenseTeacher, TopKTeacher, linear_distill_loss, linear_topk
from safecl.kernels.head.logits import logits_distill_loss


@dataclass(frozen=True)
class HeadScaling:
    """What lies between lm_head's product and the logits that the model returns."""

    softcap: float | None = None
    logit_scale: float | None = None


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def head_scaling(model: nn.Module) -> HeadScaling:
    """Softcap and scale of the logits, read from the settings that dense architectures of transformers use;
    `check_head` tells whether that is all there is."""
    settings = base_model(model).config.get_text_config()
    scale = getattr(settings, "logit_scale", None)
    if (divisor := getattr(settings, "logits_scaling", None)) is not None:
        scale = 1.0 / divisor
    return HeadScaling(
        next((cap for name in _SOFTCAPS if (cap := getattr(settings, name, None)) is not None), None), scale
    )


class LanguageModel(nn.Module):
    """Trunk and fused head as one module.

    `forward(task="loss", ...)` returns {"loss", "ce", "kd0", ...}; `forward(task="logits", ...)` returns {"logits"},
    and so on. Plain dicts only: a dataclass that crosses a module boundary crashes ZeRO-3.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.scaling = head_scaling(model)
        self.fused = True
        # A number, not read from the weight when it is asked for: under ZeRO-3 a look at a weight during a forward pass
        # gathers it, and the thread that makes the next step ready asks in the middle of one.
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

    def logits(
        self, input_ids, position_ids, attention_mask=None, past=None, use_cache=False, last_only=False
    ) -> dict[str, torch.Tensor]:
        """The model's own logits, [batch, length or 1, vocab]."""
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            logits_to_keep=1 if last_only else 0, **{cache_name(base_model(self.model)): past},
        )  # fmt: skip
        return {"logits": output.logits}

    def hidden(self, input_ids, position_ids, positions, reference=False) -> dict[str, torch.Tensor]:
        """Last hidden states (behind the final norm, before the head) at flat positions [n]: {"hidden": [n, hidden
        size]}.

        reference: of the model with its adapters off.
        """
        with _adapters_off(self.model) if reference else nullcontext():
            return {"hidden": self._hidden(input_ids, position_ids)[positions]}

    def topk(
        self, input_ids, position_ids, positions, k: int, temperature: float, targets=None, reference=False
    ) -> dict[str, torch.Tensor]:
        """What a teacher stores of chosen positions [n]: log_probs [n, k], indices [n, k], log_tail [n]; reference: as
        in `hidden`.

        With targets [n] also their negative log-likelihood `nll` [n], at temperature 1.
        """
        with _adapters_off(self.model) if reference else nullcontext():
            return self._topk(input_ids, position_ids, positions, k, temperature, targets)

    def _topk(self, input_ids, position_ids, positions, k: int, temperature: float, targets) -> dict[str, torch.Tensor]:
        if self.fused:
            hidden, head = self._hidden(input_ids, position_ids)[positions], self.head
            stored = linear_topk(
                hidden, head.weight, k, bias=head.bias, temperature=temperature, **asdict(self.scaling)
            )
            found = {"log_probs": stored.log_probs, "indices": stored.indices, "log_tail": stored.log_tail}
            if targets is None:
                return found
            return found | {
                "nll": linear_distill_loss(
                    hidden, head.weight, bias=head.bias, labels=targets, **asdict(self.scaling)
                ).ce
            }
        logits = self._own_outputs(input_ids, position_ids)[1][positions].float()
        log_probs = (logits / temperature).log_softmax(-1)
        top = log_probs.topk(k, dim=-1)
        rest = log_probs.scatter(-1, top.indices, float("-inf"))
        found = {"log_probs": top.values, "indices": top.indices, "log_tail": rest.logsumexp(-1)}
        return (
            found
            if targets is None
            else found | {"nll": torch.nn.functional.cross_entropy(logits, targets, reduction="none")}
        )

    def losses(
        self,
        input_ids,
        position_ids,
        positions,
        targets,
        ce_weights,
        distillations=(),
        features=(),
        reference=False,
        adapter_pull=None,
    ) -> dict[str, torch.Tensor]:
        """Weighted sum of all losses of a micro-batch.

        input_ids, position_ids: int64 [batch, length]. positions: int64 [n], flat indices that have a target. targets:
        int64 [n]. ce_weights: fp32 [n]; they carry the normaliser.
        distillations: dicts with rows (int64 [m], indices into positions, what the teacher speaks about), kd_weights
        fp32 [n], divergence, temperature, and what was stored of the teacher: log_probs, indices, log_tail; without
        these it is the model with its adapters off. features: dicts with positions (int64 [m], flat indices), weights
        fp32 [m], and the teacher's last hidden states `hidden` [m, H]; without these, of the model with its adapters
        off. The distance is the mean over H of the squared difference, formed in fp32. reference: whether a forward
        pass with the adapters off is needed, alike on all ranks.
        adapter_pull: a penalty of LoRA's products, a function of the model (safecl.engine.model.adapters). Returns loss
        (0-dim), ce [n], kd0, kd1, ... [n], feature0, ... [m], adapters (0-dim), detached and unweighted but for the
        last.
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

    def _scorer(
        self, input_ids, position_ids, positions, teacher, need_hidden: bool
    ) -> tuple[Callable, torch.Tensor | None]:
        """The losses of these positions as a function of targets, weights and a teacher; and all hidden states [batch *
        length, H]."""
        if self.fused:
            every = self._hidden(input_ids, position_ids)
            hidden = every[positions]
            teacher = None if teacher is None else teacher[0][positions]
            return lambda targets, ce_weights, distillation: linear_distill_loss(
                hidden,
                self.head.weight,
                bias=self.head.bias,
                labels=targets,
                ce_weights=ce_weights,
                **asdict(self.scaling),
                **self._teacher_arguments(distillation, teacher),
            ), every
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

    def _own_outputs(
        self, input_ids, position_ids, need_hidden: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The model's own last hidden states [batch * length, H] where needed, and logits [batch * length, vocab]."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=need_hidden,
        )
        return output.hidden_states[-1].flatten(0, 1) if need_hidden else None, output.logits.flatten(0, 1)

    @torch.no_grad()
    def _reference(self, input_ids, position_ids) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Last hidden states and logits of the model with its adapters and dropout off; of the two, what the head does
        not make itself."""
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
            teacher=teacher,
            teacher_rows=rows,
            kd_weights=distillation["kd_weights"],
            divergence=distillation["divergence"],
            temperature=temperature,
        )


def _whole_vocabulary(logits: torch.Tensor, temperature: float) -> TopKTeacher:
    """Logits [m, vocab] as a teacher that has stored every token."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    indices = torch.arange(logits.shape[-1], device=logits.device).expand_as(log_probs)
    return TopKTeacher(
        log_probs, indices, log_probs.new_full(log_probs.shape[:1], float("-inf")), temperature, logits.shape[-1]
    )


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
def logits_of(
    engine, input_ids, attention_mask, position_ids, past=None, use_cache=False, last_only=False
) -> torch.Tensor:
    """The logits of an engine's live model. With ZeRO-3 every rank must call it equally often. A method of every
    engine."""
    output = engine.deepspeed(
        task="logits",
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past=past,
        use_cache=use_cache,
        last_only=last_only,
    )
    return output["logits"]
