"""The streamed teacher: a frozen forward pass of a model whose weights stay in host memory, one copy per node.

    embeddings     rows of the batch's tokens only, gathered on the host
    layers         one after the other through two device buffers, layer i + 1 copied while layer i works on all micro-batches
    head           in slices of the vocabulary through the same buffers; what is kept of it is top-k (safecl.kernels.SlicedTopK)

There are no collectives: every rank runs it as often as it likes. It is run once per optimizer step over all its
micro-batches' rows, because the copies are hidden only if a layer has enough tokens to work on
(safecl.engine.teachers.break_even).

No architecture is rewritten. The model's own trunk runs on embeddings alone, its layers standing in for themselves:
they note what they are called with (masks, positions, rotary embeddings) and hand the hidden states through. Then the
real layers are called with just that, and at the end the trunk runs once more with the last layer's result, for
whatever it does behind the layers.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.func import functional_call

from safecl.config import ConfigError
from safecl.engine.model.language_model import head_scaling
from safecl.engine.passes.step_rows import Answer, Question
from safecl.engine.teachers.weight_stream import Placement, Unit, WeightStream, unit_bytes
from safecl.kernels import SlicedTopK


@dataclass
class TeacherBatch:
    """A micro-batch for a teacher: ids and positions [batch, length] on the CPU, and what is asked of which flat
    positions."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    asked: list[tuple[Question, torch.Tensor]] = field(default_factory=list)


class Teacher(Protocol):
    """Something that answers questions about micro-batches."""

    def answer(self, batches: Sequence[TeacherBatch]) -> list[list[Answer]]:
        """Of each batch, the answers in the order of its questions."""


class WeightSource(Protocol):
    """Where weights are read: safecl.engine.reference.store.ReferenceStore."""

    def tensor(self, name: str) -> torch.Tensor:
        """The whole parameter on the CPU, not copied."""


@dataclass
class _Call:
    """A micro-batch on its way through the layers: hidden states [batch, length, H], and each layer's further
    arguments."""

    hidden: torch.Tensor
    arguments: list[tuple[tuple, dict]]


class StreamedTeacher:
    """A causal language model whose weights are streamed from `source`.

    model: its structure, with parameters on the meta device and real buffers
    (safecl.engine.model.structure.empty_model). placement: see WeightStream. vocab_size: tokens that are compared; a
    wider head is cut. slice_bytes: of a slice of the head; by default the size of a layer, so that no buffer grows for
    it.
    Raises ConfigError for a model whose head is more than one linear map.
    """

    def __init__(
        self, model: nn.Module, source: WeightSource, device: torch.device, placement: Placement = "streamed", *,
        vocab_size: int | None = None, slice_bytes: int | None = None,
    ):  # fmt: skip
        self.model, self.device = model.eval(), device
        self._keys = {id(p): name for name, p in model.named_parameters()}
        self.trunk, self.head = model.get_decoder(), model.get_output_embeddings()
        if type(self.head) is not nn.Linear:
            raise ConfigError(
                f"the teacher's head is a {type(self.head).__name__}, not one linear map; use recorded outputs instead"
            )
        self.scaling = head_scaling(model)
        self.layers = _decoder_layers(self.trunk)
        self._embedding = self.trunk.get_input_embeddings()
        self._embedding.padding_idx = None  # the table that is looked up in holds the batch's tokens only
        self._table = source.tensor(self._keys[id(self._embedding.weight)])
        self._settle_the_rest(source)
        units = [self._unit(layer, source) for layer in self.layers]
        slices = _head_slices(self.head, self._keys, source, vocab_size, slice_bytes or max(map(unit_bytes, units)))
        self._starts = [start for start, _ in slices]
        self._beside: dict[type[nn.Module], int | None] = {}
        self.stream = WeightStream([*units, *(unit for _, unit in slices)], device, placement)

    @property
    def hidden_size(self) -> int:
        return self._table.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._table.dtype

    def _unit(self, layer: nn.Module, source: WeightSource) -> Unit:
        return {name: source.tensor(self._keys[id(p)]) for name, p in layer.named_parameters()}

    def _settle_the_rest(self, source: WeightSource) -> None:
        """Buffers, norms and other small weights outside of the layers live on the device."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()} | {id(self._embedding.weight)}
        for module in self.trunk.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
            for name, p in module._parameters.items():
                if p is not None and id(p) not in inside:
                    module._parameters[name] = _frozen(source.tensor(self._keys[id(p)]).to(self.device))

    # ---------------------------------------------------------------------------------------------------------- forward

    @torch.no_grad()
    def answer(self, batches: Sequence[TeacherBatch]) -> list[list[Answer]]:
        """Of each batch, the answers in the order of its questions. The weights come by once, whatever the number of
        batches."""
        with_head = any(question.form == "topk" for batch in batches for question, _ in batch.asked)
        order = range(len(self.stream.units) if with_head else len(self.layers))
        with contextlib.closing(self.stream.run(order)) as weights:
            hidden = self._hidden(batches, weights)
            said: list[list[Answer]] = [
                [states[positions.to(self.device)] for _, positions in batch.asked]
                for batch, states in zip(batches, hidden, strict=True)
            ]
            del hidden
            if with_head:
                self._through_head(batches, said, weights)
        return said

    def _hidden(self, batches: Sequence[TeacherBatch], weights: Iterator[Unit]) -> list[torch.Tensor]:
        """Last hidden states [batch * length, H] of each batch."""
        calls = [self._begin(batch) for batch in batches]
        for number, (layer, unit) in enumerate(zip(self.layers, weights, strict=False)):
            for call in calls:
                arguments, options = call.arguments[number]
                output = functional_call(layer, unit, (call.hidden, *arguments), options)
                call.hidden = output[0] if isinstance(output, tuple) else output
        return [self._finish(batch, call) for batch, call in zip(batches, calls, strict=True)]

    def _begin(self, batch: TeacherBatch) -> _Call:
        """Runs the trunk without its layers, and notes what each of them is called with."""
        noted: list[tuple[tuple, dict]] = []
        embedded: list[torch.Tensor] = []

        def note(number, *arguments, **options):
            if "hidden_states" not in options:
                arguments, options = arguments[1:], options | {"hidden_states": arguments[0]}
            hidden = options.pop("hidden_states")
            if not noted:
                embedded.append(hidden)
            noted.append((arguments, options))
            return self._as_returned(number, hidden, noted[-1])

        layers = {layer: functools.partial(note, number) for number, layer in enumerate(self.layers)}
        with _standing_in({self._embedding: self._look_up} | layers):
            self._run_trunk(batch)
        if len(noted) != len(self.layers):
            raise ValueError(f"of its {len(self.layers)} layers {len(noted)} were called")
        return _Call(embedded[0], noted)

    def _as_returned(self, number: int, hidden: torch.Tensor, called_with: tuple[tuple, dict] | None = None):
        """Hidden states in the form in which a layer returns them: some return a tuple of them and further things. A
        layer of each kind is called once to see."""
        layer = self.layers[number]
        if type(layer) not in self._beside:
            (arguments, options), unit = called_with, self.stream.units[number]
            near = {name: tensor.to(self.device) for name, tensor in unit.items()}
            with _standing_in({layer: functools.partial(type(layer).forward, layer)}):
                returned = functional_call(layer, near, (hidden, *arguments), options)
            self._beside[type(layer)] = len(returned) - 1 if isinstance(returned, tuple) else None
        beside = self._beside[type(layer)]
        return hidden if beside is None else (hidden, *[None] * beside)

    def _finish(self, batch: TeacherBatch, call: _Call) -> torch.Tensor:
        """Runs the trunk with the layers' result in the place of the embeddings: what is left is what it does behind
        the layers."""

        def returning(number):
            return lambda *arguments, **options: self._as_returned(number, call.hidden)

        embedding = {self._embedding: lambda *arguments, **options: call.hidden}
        with _standing_in(embedding | {layer: returning(number) for number, layer in enumerate(self.layers)}):
            return self._run_trunk(batch).last_hidden_state.flatten(0, 1)

    def _run_trunk(self, batch: TeacherBatch):
        # No mask and no cache, as in LanguageModel: with either, packed documents would see each other.
        return self.trunk(
            input_ids=batch.input_ids,
            attention_mask=None,
            position_ids=batch.position_ids.to(self.device),
            use_cache=False,
        )

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's own embedding, on the rows of the table that the batch needs."""
        tokens, places = ids.cpu().unique(return_inverse=True)
        whole = self._embedding._parameters["weight"]
        self._embedding._parameters["weight"] = _frozen(self._table[tokens].to(self.device, non_blocking=True))
        try:
            return type(self._embedding).forward(self._embedding, places.to(self.device))
        finally:
            self._embedding._parameters["weight"] = whole

    def _through_head(self, batches: Sequence[TeacherBatch], said: list[list[Answer]], weights: Iterator[Unit]) -> None:
        """Puts top-k outputs into the place of the hidden states that they are made of."""
        places: dict[Question, list[tuple[int, int]]] = {}
        for number, batch in enumerate(batches):
            for place, (question, _) in enumerate(batch.asked):
                if question.form == "topk":
                    places.setdefault(question, []).append((number, place))
        found = {
            question: self._collector(question, [said[n][i] for n, i in where]) for question, where in places.items()
        }
        for start, unit in zip(self._starts, weights, strict=True):
            for collector in found.values():
                collector.add(start, unit["weight"], unit.get("bias"))
        for question, where in places.items():
            outputs, begin = found[question].result(), 0
            for n, i in where:
                end = begin + len(said[n][i])
                said[n][i], begin = outputs[begin:end], end

    def _collector(self, question: Question, hidden: list[torch.Tensor]) -> SlicedTopK:
        return SlicedTopK(torch.cat(hidden), question.k, temperature=question.temperature, **asdict(self.scaling))

    @torch.no_grad()
    def logits(self, batch: TeacherBatch) -> torch.Tensor:
        """fp32 logits of every position [batch, length, vocab], for checks: slices of the head one after the other,
        kept whole."""
        with contextlib.closing(self.stream.run(range(len(self.stream.units)))) as weights:
            (hidden,) = self._hidden([batch], weights)
            parts = [
                torch.nn.functional.linear(hidden.float(), *(unit[key].float() for key in unit)) for unit in weights
            ]
        logits = torch.cat(parts, -1) * (self.scaling.logit_scale or 1.0)
        cap = self.scaling.softcap
        return (logits if cap is None else cap * torch.tanh(logits / cap)).view(*batch.input_ids.shape, -1)


def _decoder_layers(trunk: nn.Module) -> list[nn.Module]:
    """The trunk's list of layers: of all its lists the one with the most weights."""
    lists = [module for module in trunk.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())))


_TILE_ROWS = 64


def _head_slices(
    head: nn.Linear, keys: dict[int, str], source: WeightSource, vocab_size: int | None, slice_bytes: int
) -> list[tuple[int, Unit]]:
    """(first token, weights) of slices of the output head of at most `slice_bytes` (or a row), as equal as may be in
    whole tiles: a product of an odd width, and every slice behind it, would leave the fast path of a GPU."""
    weight = source.tensor(keys[id(head.weight)])[:vocab_size]
    bias = None if head.bias is None else source.tensor(keys[id(head.bias)])[:vocab_size]
    rows = weight.shape[0]
    most = max(1, slice_bytes // (weight.shape[1] * weight.element_size()))
    tile = min(_TILE_ROWS, most)
    count = -(-rows // (most - most % tile))
    step = -(-rows // (count * tile)) * tile
    bounds = [*range(0, rows, step), rows]
    return [
        (start, {"weight": weight[start:end]} | ({} if bias is None else {"bias": bias[start:end]}))
        for start, end in itertools.pairwise(bounds)
    ]


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@contextlib.contextmanager
def _standing_in(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Calls of these modules go to functions for a while."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
