"""The Hugging Face model, wrapped in one module whose forward runs the trunk and the fused head.

Wrapping keeps every architecture as it is. It also lets ZeRO-3's own hooks gather `lm_head`, tied or not, because a
module's forward reads it. At the start `check_head` compares head(trunk(x)) with model(x).logits; where they differ,
the model's own logits are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from safecl.engine.model.adapter_penalty import AdapterPenalty
from safecl.engine.model.adapters import adapters_off, base_model
from safecl.engine.model.attention import (
    Sequences,
    attention_of,
    document_arguments,
    rows_are_not_packed,
    rows_are_packed,
)
from safecl.engine.model.features import Layers, features_at, final_norm, noise_distances
from safecl.engine.model.head import (
    FusedHeadLosses,
    HeadLosses,
    LogitsLosses,
    constrained_weights,
    gradient_shares,
    head_scaling,
    label_information,
)
from safecl.engine.model.loss_inputs import (
    Constrained,
    HiddenDistance,
    LabelInformation,
    NoiseDistance,
    OutputDistance,
)
from safecl.evaluation.answers.model import cache_name
from safecl.evaluation.answers.sketch import gradient_sketches
from safecl.kernels import SortedRows, linear_distill_loss, linear_topk

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class _Outputs(NamedTuple):
    """Outputs of a forward pass; None for what was not computed."""

    hidden: Tensor | None  # [batch * length, H], last hidden states
    logits: Tensor | None  # [batch * length, vocab]
    each: tuple[Tensor, ...] = ()  # hidden states before and behind every layer, [batch * length, H] each


class LanguageModel(nn.Module):
    """Trunk and fused head as one module.

    `forward(task="loss", ...)` calls `losses`; `task` may also be "logits", "topk", "gradient", "sketch" or
    "hidden". All of
    them return plain dictionaries: a dataclass that crosses a module's boundary crashes ZeRO-3. `sequences` says where
    documents begin; without it transformers finds out from the positions.
    """

    vocab_size: int
    """Width of the logits, padding included."""
    runs_anywhere: str
    """The attention kernel with which the model was made, which also runs on the CPU."""
    fused: bool
    """Whether the fused head gives the model's logits; `check_head` sets it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.scaling = head_scaling(model)
        self.fused = True
        self.runs_anywhere = attention_of(model)
        self._documents: dict[str, Any] = {}
        # A plain number: under ZeRO-3 reading a weight's shape during a forward pass gathers the weight, and the thread
        # that prepares the next step needs the number in the middle of one.
        self.vocab_size = getattr(self.head.weight, "ds_shape", self.head.weight.shape)[0]

    @property
    def trunk(self) -> nn.Module:
        return cast(nn.Module, base_model(self.model).get_decoder())

    @property
    def head(self) -> nn.Linear:
        return cast(nn.Linear, base_model(self.model).get_output_embeddings())

    @property
    def text_settings(self) -> PretrainedConfig:
        """transformers' settings of the language model, also inside a model of several parts."""
        return base_model(self.model).config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.text_settings.num_hidden_layers)

    def forward(self, *, task: str, sequences: Sequences | None = None, **inputs: Any) -> dict[str, Tensor]:
        tasks: dict[str, Callable[..., dict[str, Tensor]]] = {
            "loss": self.losses,
            "logits": self.logits,
            "topk": self.topk,
            "hidden": self.hidden,
            "labels": self.label_probs,
            "gradient": self.gradient_shares,
            "sketch": self.gradient_sketches,
        }
        self._documents = document_arguments(self.model, sequences)
        with self._telling_documents(sequences):
            return tasks[task](**inputs)

    def _telling_documents(self, sequences: Sequences | None) -> AbstractContextManager[None]:
        """Tell transformers whether rows are packed, where the caller knows. It would ask the device."""
        if sequences is None:
            return nullcontext()
        needs_mask = sequences["packed"] and len(sequences["cu_seqlens"]) > 2 and not self._documents
        return rows_are_packed() if needs_mask else rows_are_not_packed()

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
    ) -> dict[str, Tensor]:
        """The model's own logits, [batch, length or 1, vocab]."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=1 if last_only else 0,
            **self._documents,
            **{cache_name(base_model(self.model)): past},
        )
        return {"logits": output.logits}

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        reference: bool = False,
        layers: Layers = (),
    ) -> dict[str, Tensor]:
        """Hidden states at flat positions [n]: {"hidden": [n, H]}, those behind the final norm.

        reference: switch the adapters off. layers: those of these layers side by side instead, [n, len(layers) * H].
        """
        with adapters_off(self.model) if reference else nullcontext():
            last, each = self._hidden_of_layers(input_ids, position_ids, bool(layers))
            return {"hidden": features_at(layers, last, each, positions)}

    def label_probs(
        self, input_ids: Tensor, position_ids: Tensor, positions: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Probabilities of the labels [k] alone at flat positions [n]: {"probs": fp32 [n, k]}."""
        head_losses, _ = self._head_losses(input_ids, position_ids, positions, None, False, False)
        rows = torch.arange(len(positions), device=positions.device)
        return {"probs": head_losses.log_probs_of(labels, rows).exp()}

    def gradient_shares(
        self, input_ids: Tensor, position_ids: Tensor, positions: Tensor, targets: Tensor, row_of: Tensor
    ) -> dict[str, Tensor]:
        """Shares of the tokens at flat positions [n] in the squared norm of their row's gradient at the head:
        {"share": fp32 [n]}. row_of: int64 [n], the row of each, counted from 0."""
        head_losses, outputs = self._head_losses(input_ids, position_ids, positions, None, True, False)
        assert outputs.hidden is not None
        return {"share": gradient_shares(head_losses, outputs.hidden[positions], targets, row_of)}

    def gradient_sketches(
        self, input_ids: Tensor, position_ids: Tensor, positions: Tensor, targets: Tensor, row_of: Tensor, num_rows: int
    ) -> dict[str, Tensor]:
        """Sketches of the gradients at the head of answers whose tokens are at flat positions [n]: {"sketches": fp32
        [num_rows, 4096]}. row_of: int64 [n], the answer of each, counted from 0."""
        head_losses, outputs = self._head_losses(input_ids, position_ids, positions, None, True, False)
        assert outputs.hidden is not None
        logits = head_losses.logits_of(torch.arange(len(positions), device=positions.device))
        hidden = outputs.hidden[positions]
        return {"sketches": gradient_sketches(logits, hidden, targets, row_of, num_rows)}

    def topk(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        k: int,
        temperature: float,
        targets: Tensor | None = None,
        reference: bool = False,
    ) -> dict[str, Tensor]:
        """Top-k outputs at flat positions [n]: log_probs [n, k], indices [n, k], log_tail [n].

        With targets [n] also `nll` [n], their negative log-likelihood at temperature 1. reference: switch the adapters
        off.
        """
        with adapters_off(self.model) if reference else nullcontext():
            if self.fused:
                return self._fused_topk(input_ids, position_ids, positions, k, temperature, targets)
            return self._own_topk(input_ids, position_ids, positions, k, temperature, targets)

    def _fused_topk(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        k: int,
        temperature: float,
        targets: Tensor | None,
    ) -> dict[str, Tensor]:
        hidden, head, scaling = self._hidden(input_ids, position_ids)[positions], self.head, asdict(self.scaling)
        stored = linear_topk(hidden, head.weight, k, bias=head.bias, temperature=temperature, **scaling)
        found = {"log_probs": stored.log_probs, "indices": stored.indices, "log_tail": stored.log_tail}
        if targets is not None:
            found["nll"] = linear_distill_loss(hidden, head.weight, bias=head.bias, labels=targets, **scaling).ce
        return found

    def _own_topk(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        k: int,
        temperature: float,
        targets: Tensor | None,
    ) -> dict[str, Tensor]:
        logits = self._own_logits(input_ids, position_ids)[positions].float()
        log_probs = (logits / temperature).log_softmax(-1)
        top = log_probs.topk(k, dim=-1)
        rest = log_probs.scatter(-1, top.indices, float("-inf"))
        found = {"log_probs": top.values, "indices": top.indices, "log_tail": rest.logsumexp(-1)}
        if targets is not None:
            found["nll"] = nn.functional.cross_entropy(logits, targets, reduction="none")
        return found

    def losses(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        ce_weights: Tensor,
        distillations: Sequence[OutputDistance] = (),
        features: Sequence[HiddenDistance] = (),
        reference: bool = False,
        adapter_penalty: AdapterPenalty | None = None,
        constrained: Sequence[Constrained] = (),
        labels: Sequence[LabelInformation] = (),
        every_layer: bool = False,
        each_layer: bool = False,
        noise: NoiseDistance | None = None,
        sorted_rows: Sequence[SortedRows] = (),
        sorted_targets: SortedRows | None = None,
    ) -> dict[str, Tensor]:
        """Weighted sum of all losses of a micro-batch; the arguments are those of LossInputs.

        adapter_penalty joins the sum. Returns loss (0-dim); and detached and without weights ce [n], kd0, kd1, ... [n]
        by distillation, feature0, ... [m] by feature, label0, ... [m] by information, noise [rows], and adapters
        (0-dim, with its strength).
        """
        taught = self._reference(input_ids, position_ids, each_layer) if reference else None
        need_hidden = each_layer or bool(features)
        head_losses, outputs = self._head_losses(input_ids, position_ids, positions, taught, need_hidden, each_layer)
        if constrained:
            ce_weights = constrained_weights(head_losses, targets, ce_weights, constrained, sorted_targets)
        first, *others = distillations or (None,)
        known, *others_known = sorted_rows or (None,) * max(1, len(distillations))
        if every_layer:
            loss, ce, kd = *self._loss_of_every_layer(outputs, positions, targets, ce_weights), []
        else:
            output = head_losses(targets, ce_weights, first, known)
            loss, ce, kd = output.loss, output.ce, [output.kd] if first is not None else []
        for distance, known in zip(others, others_known, strict=True):
            more = head_losses(torch.full_like(targets, -100), torch.zeros_like(ce_weights), distance, known)
            loss, kd = loss + more.loss, [*kd, more.kd]
        result = {"ce": ce, **{f"kd{index}": value for index, value in enumerate(kd)}}
        for index, feature in enumerate(features):
            squares = _hidden_distance(feature, outputs, taught)
            loss, result[f"feature{index}"] = loss + (feature["weights"] * squares).sum(), squares.detach()
        for index, one in enumerate(labels):
            information = label_information(head_losses, one)
            loss, result[f"label{index}"] = loss + (one["weights"] * information).sum(), information.detach()
        # Under ZeRO-3 a module's hooks run once for each of its outputs that gets a gradient, and all ranks must agree.
        loss = loss + sum(states[:0].sum() for states in outputs.each)
        if noise is not None:
            distances = noise_distances(outputs.each[1:], noise["positions"], noise["counts"], noise["seeds"])
            loss, result["noise"] = loss + (noise["weights"] * distances).sum(), distances.detach()
        if adapter_penalty is not None:
            penalty = adapter_penalty(self.model)
            loss, result["adapters"] = loss + penalty, penalty.detach()
        return {"loss": loss, **result}

    def _loss_of_every_layer(
        self, outputs: _Outputs, positions: Tensor, targets: Tensor, ce_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss (0-dim) and detached cross-entropies [n], both means over the outputs behind the embedding and every
        layer. One call of the norm and one of the head are for all of them."""
        *between, last = [states[positions] for states in outputs.each]
        hidden = torch.cat([final_norm(self.trunk)(torch.cat(between)), last])
        head_losses: HeadLosses
        if self.fused:
            head_losses = FusedHeadLosses(hidden, self.head, self.scaling, self.vocab_size, None)
        else:
            head_losses = LogitsLosses(self.scaling.apply(self.head(hidden).float()), self.vocab_size, None)
        count = len(outputs.each)
        found = head_losses(targets.repeat(count), ce_weights.repeat(count) / count, None)
        return found.loss, found.ce.view(count, -1).mean(0)

    def _head_losses(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        positions: Tensor,
        taught: _Outputs | None,
        need_hidden: bool,
        each_layer: bool,
    ) -> tuple[HeadLosses, _Outputs]:
        """The losses of these positions, and the hidden states that are needed for others."""
        if self.fused:
            hidden, each = self._hidden_of_layers(input_ids, position_ids, each_layer)
            reference = None if taught is None or taught.hidden is None else taught.hidden[positions]
            head_losses = FusedHeadLosses(hidden[positions], self.head, self.scaling, self.vocab_size, reference)
            return head_losses, _Outputs(hidden, None, each)
        own = self._own_outputs(input_ids, position_ids, need_hidden)
        assert own.logits is not None
        reference = None if taught is None or taught.logits is None else taught.logits[positions]
        return LogitsLosses(own.logits[positions], self.vocab_size, reference), own

    def _hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self._hidden_of_layers(input_ids, position_ids, False)[0]

    def _hidden_of_layers(
        self, input_ids: Tensor, position_ids: Tensor, each_layer: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states [batch * length, H], and those before and behind every layer where they are asked for."""
        asked = {"output_hidden_states": True} if each_layer else {}
        # No mask and no cache: with either, packed documents would see each other, silently.
        output = self.trunk(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=position_ids,
            use_cache=False,
            **asked,
            **self._documents,
        )
        each = tuple(states.flatten(0, 1) for states in output.hidden_states) if each_layer else ()
        return output.last_hidden_state.flatten(0, 1), each

    def _own_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits = self._own_outputs(input_ids, position_ids).logits
        assert logits is not None
        return logits

    def _own_outputs(self, input_ids: Tensor, position_ids: Tensor, need_hidden: bool = False) -> _Outputs:
        """The model's own logits, and its hidden states where they are needed."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=need_hidden,
            **self._documents,
        )
        each = tuple(states.flatten(0, 1) for states in output.hidden_states) if need_hidden else ()
        return _Outputs(each[-1] if need_hidden else None, output.logits.flatten(0, 1), each)

    @torch.no_grad()
    def _reference(self, input_ids: Tensor, position_ids: Tensor, each_layer: bool = False) -> _Outputs:
        """Outputs of the model with its adapters and dropout off; no logits where the fused head makes them."""
        with adapters_off(self.model):
            if self.fused:
                hidden, each = self._hidden_of_layers(input_ids, position_ids, each_layer)
                return _Outputs(hidden, None, each)
            return self._own_outputs(input_ids, position_ids, need_hidden=True)


def _hidden_distance(feature: HiddenDistance, outputs: _Outputs, taught: _Outputs | None) -> Tensor:
    """Mean of the squared differences of the features, fp32 [m]; the differences are formed in fp32."""
    layers, where = feature["layers"], feature["positions"]
    if "hidden" in feature:
        target = feature["hidden"]
    else:
        assert taught is not None and taught.hidden is not None, "the pass with the adapters off was not asked for"
        target = features_at(layers, taught.hidden, taught.each, where)
    assert outputs.hidden is not None
    difference = features_at(layers, outputs.hidden, outputs.each, where).float() - target.float()
    return (difference.clamp_max(0.0) if feature["larger"] else difference).square().mean(-1)
