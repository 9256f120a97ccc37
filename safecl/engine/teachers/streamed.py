"""The streamed teacher: a frozen forward pass of a model whose weights stay in host memory, one copy per node.

    embeddings     rows of the batch's tokens only, gathered on the host
    layers         one after the other through two device buffers: layer i + 1 is copied while layer i works on all
                   micro-batches
    head           in slices of the vocabulary through the same buffers; only top-k outputs are kept (SlicedTopK)

There are no collective calls: every rank may run it as often as it needs. It runs once per optimizer step over the rows
of all micro-batches, because copies are hidden only if a layer has enough tokens to work on
(safecl.engine.teachers.break_even).

No architecture is rewritten. A pass has three parts:

 1. The model's own trunk runs with stand-ins for its layers. They note their arguments (masks, positions, rotary
    embeddings) and return the hidden states unchanged.
 2. The real layers are called with these arguments, one after the other.
 3. The trunk runs again with the last layer's result, for what comes after the layers, such as the final norm.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.func import functional_call

from safecl.config import ConfigError
from safecl.engine.model.attention import document_arguments
from safecl.engine.model.head import head_scaling
from safecl.engine.passes.micro_batches import to_device
from safecl.engine.passes.step_rows import Answer, Question
from safecl.engine.teachers.questions import TeacherBatch
from safecl.engine.teachers.weight_stream import Unit, WeightPlacement, WeightStream, unit_bytes
from safecl.kernels import SlicedTopK


class WeightSource(Protocol):
    """Gives weights by name, as safecl.engine.reference.store.ReferenceStore does."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return the whole parameter on the CPU, not copied."""


LayerArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a layer's call besides the hidden states."""
StandIns = dict[nn.Module, Callable[..., Any]]
"""Functions that are called in place of modules."""


@dataclass
class _Call:
    """A micro-batch on its way through the layers."""

    hidden: torch.Tensor  # [batch, length, H]
    arguments: list[LayerArguments]  # by layer


class StreamedTeacher:
    """A causal language model whose weights are streamed from `source`.

    model: its structure, with parameters on the meta device and real buffers
    (safecl.engine.model.structure.empty_model). placement: see WeightStream. vocab_size: number of compared tokens; a
    wider head is cut. slice_bytes: size of a slice of the head; by default the size of a layer, so that slices need no
    larger buffers.
    Raises ConfigError for a model whose head is more than one linear map.
    """

    def __init__(
        self,
        model: nn.Module,
        source: WeightSource,
        device: torch.device,
        placement: WeightPlacement = "streamed",
        *,
        vocab_size: int | None = None,
        slice_bytes: int | None = None,
    ):
        self.model, self.device = model.eval(), device
        self._keys = {id(p): name for name, p in model.named_parameters()}
        head = cast(Any, model).get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ConfigError(
                f"the teacher's head is a {type(head).__name__}, not one linear map; use recorded outputs instead"
            )
        self.trunk: nn.Module = cast(Any, model).get_decoder()
        self.scaling = head_scaling(model)
        self.layers = _decoder_layers(self.trunk)
        self._embedding: nn.Embedding = cast(Any, self.trunk).get_input_embeddings()
        self._embedding.padding_idx = None  # an index of the whole table; `_look_up` uses the batch's rows of it
        self._table = source.tensor(self._keys[id(self._embedding.weight)])
        self._settle_the_rest(source)
        units = [self._unit(layer, source) for layer in self.layers]
        slices = head_slices(head, self._keys, source, vocab_size, slice_bytes or max(map(unit_bytes, units)))
        self._starts = [start for start, _ in slices]
        self._num_extra: dict[type[nn.Module], int | None] = {}
        """Number of values that a layer of this kind returns besides hidden states; None: it returns no tuple."""
        self.stream = WeightStream([*units, *(unit for _, unit in slices)], device, placement)

    @property
    def dtype(self) -> torch.dtype:
        return self._table.dtype

    def _unit(self, layer: nn.Module, source: WeightSource) -> Unit:
        return {name: source.tensor(self._keys[id(p)]) for name, p in layer.named_parameters()}

    def _settle_the_rest(self, source: WeightSource) -> None:
        """Put buffers, norms and other small weights outside of the layers on the device."""
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
        """Return the answers of each batch, in the order of its questions.

        The weights are copied once for any number of batches.
        """
        with_head = any(question.form == "topk" for batch in batches for question, _ in batch.asked)
        order = range(len(self.stream.units) if with_head else len(self.layers))
        with contextlib.closing(self.stream.run(order)) as weights:
            answers = self._hidden_states(batches, weights)
            if with_head:
                self._through_head(batches, answers, weights)
        return answers

    def _hidden_states(self, batches: Sequence[TeacherBatch], weights: Iterator[Unit]) -> list[list[Answer]]:
        """Return the hidden states that the questions of each batch are about, of several layers side by side."""
        kept: dict[tuple[int, int], list[torch.Tensor]] = {}

        def keep(number: int, index: int, hidden: torch.Tensor) -> None:
            for place, (question, positions) in enumerate(batches[index].asked):
                if number in (question.layers or (len(self.layers),)):
                    kept.setdefault((index, place), []).append(hidden.flatten(0, -2)[positions.to(self.device)])

        for index, states in enumerate(self._hidden(batches, weights, keep)):
            keep(len(self.layers), index, states)
        return [[torch.cat(kept[i, n], -1) for n in range(len(batch.asked))] for i, batch in enumerate(batches)]

    def _hidden(
        self,
        batches: Sequence[TeacherBatch],
        weights: Iterator[Unit],
        see: Callable[[int, int, torch.Tensor], None] = lambda number, index, hidden: None,
    ) -> list[torch.Tensor]:
        """Return the last hidden states [batch * length, H] of each batch.

        see: is shown the layer's number (from 1), the batch and its hidden states [batch, length, H], behind every
        layer but the last.
        """
        calls = [self._begin(batch) for batch in batches]
        for number, (layer, unit) in enumerate(zip(self.layers, weights, strict=False)):
            for index, call in enumerate(calls):
                arguments, options = call.arguments[number]
                output = functional_call(layer, unit, (call.hidden, *arguments), options)
                call.hidden = output[0] if isinstance(output, tuple) else output
                if number + 1 < len(self.layers):
                    see(number + 1, index, call.hidden)
        return [self._finish(batch, call) for batch, call in zip(batches, calls, strict=True)]

    def _begin(self, batch: TeacherBatch) -> _Call:
        """Run the trunk without its layers, and note the arguments of each layer."""
        noted: list[LayerArguments] = []
        embedded: list[torch.Tensor] = []

        def note(number: int, *arguments: Any, **options: Any) -> Any:
            if "hidden_states" not in options:
                arguments, options = arguments[1:], options | {"hidden_states": arguments[0]}
            hidden = options.pop("hidden_states")
            if not noted:
                embedded.append(hidden)
            noted.append((arguments, options))
            self._see_what_is_returned(number, hidden, noted[-1])
            return self._as_returned(number, hidden)

        stand_ins: StandIns = {layer: functools.partial(note, number) for number, layer in enumerate(self.layers)}
        with _standing_in(stand_ins | {self._embedding: self._look_up}):
            self._run_trunk(batch)
        if len(noted) != len(self.layers):
            raise ValueError(f"of its {len(self.layers)} layers {len(noted)} were called")
        return _Call(embedded[0], noted)

    def _see_what_is_returned(self, number: int, hidden: torch.Tensor, called_with: LayerArguments) -> None:
        """Call one layer of each kind, to see whether it returns hidden states or a tuple of them and other values."""
        layer = self.layers[number]
        if type(layer) in self._num_extra:
            return
        (arguments, options), unit = called_with, self.stream.units[number]
        near = {name: tensor.to(self.device) for name, tensor in unit.items()}
        with _standing_in({layer: functools.partial(type(layer).forward, layer)}):
            returned = functional_call(layer, near, (hidden, *arguments), options)
        self._num_extra[type(layer)] = len(returned) - 1 if isinstance(returned, tuple) else None

    def _as_returned(self, number: int, hidden: torch.Tensor) -> Any:
        """Return hidden states in the form in which the layer returns them."""
        num_extra = self._num_extra[type(self.layers[number])]
        return hidden if num_extra is None else (hidden, *[None] * num_extra)

    def _finish(self, batch: TeacherBatch, call: _Call) -> torch.Tensor:
        """Run the trunk with the layers' result in place of the embeddings, for what comes after the layers."""

        def embedding(*arguments: Any, **options: Any) -> torch.Tensor:
            return call.hidden

        def layer(number: int, *arguments: Any, **options: Any) -> Any:
            return self._as_returned(number, call.hidden)

        stand_ins: StandIns = {module: functools.partial(layer, number) for number, module in enumerate(self.layers)}
        with _standing_in(stand_ins | {self._embedding: embedding}):
            return self._run_trunk(batch).last_hidden_state.flatten(0, 1)

    def _run_trunk(self, batch: TeacherBatch) -> Any:
        # No mask and no cache, as in LanguageModel: with either, packed documents would see each other.
        return self.trunk(
            input_ids=batch.input_ids,
            attention_mask=None,
            position_ids=batch.position_ids.to(self.device),
            use_cache=False,
            **document_arguments(self.model, to_device(batch.sequences, self.device)),
        )

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """Call the model's own embedding on the rows of its table that the batch needs."""
        tokens, places = ids.cpu().unique(return_inverse=True)
        whole = self._embedding._parameters["weight"]
        self._embedding._parameters["weight"] = _frozen(self._table[tokens].to(self.device, non_blocking=True))
        try:
            return type(self._embedding).forward(self._embedding, places.to(self.device))
        finally:
            self._embedding._parameters["weight"] = whole

    def _through_head(
        self, batches: Sequence[TeacherBatch], answers: list[list[Answer]], weights: Iterator[Unit]
    ) -> None:
        """Replace hidden states by top-k outputs where a question asks for these."""
        places: dict[Question, list[tuple[int, int]]] = {}
        for number, batch in enumerate(batches):
            for place, (question, _) in enumerate(batch.asked):
                if question.form == "topk":
                    places.setdefault(question, []).append((number, place))
        hidden = {question: [cast(torch.Tensor, answers[n][i]) for n, i in where] for question, where in places.items()}
        found = {question: self._collector(question, states) for question, states in hidden.items()}
        for start, unit in zip(self._starts, weights, strict=True):
            for collector in found.values():
                collector.add(start, unit["weight"], unit.get("bias"))
        for question, where in places.items():
            outputs, begin = found[question].result(), 0
            for (n, i), states in zip(where, hidden[question], strict=True):
                end = begin + len(states)
                answers[n][i], begin = outputs[begin:end], end

    def _collector(self, question: Question, hidden: list[torch.Tensor]) -> SlicedTopK:
        return SlicedTopK(torch.cat(hidden), question.k, temperature=question.temperature, **asdict(self.scaling))

    @torch.no_grad()
    def logits(self, batch: TeacherBatch) -> torch.Tensor:
        """fp32 logits of every position [batch, length, vocab], for checks; all slices of the head are kept."""
        with contextlib.closing(self.stream.run(range(len(self.stream.units)))) as weights:
            (hidden,) = self._hidden([batch], weights)
            parts = [
                torch.nn.functional.linear(hidden.float(), *(unit[key].float() for key in unit)) for unit in weights
            ]
        return self.scaling.apply(torch.cat(parts, -1)).view(*batch.input_ids.shape, -1)


def _decoder_layers(trunk: nn.Module) -> list[nn.Module]:
    """The trunk's layers: the list of modules that has the most weights."""
    lists = [module for module in trunk.modules() if isinstance(module, nn.ModuleList)]
    num_weights = [sum(p.numel() for p in layers.parameters()) for layers in lists]
    return list(lists[num_weights.index(max(num_weights))])


_TILE_ROWS = 64


def head_slices(
    head: nn.Linear, keys: dict[int, str], source: WeightSource, vocab_size: int | None, slice_bytes: int
) -> list[tuple[int, Unit]]:
    """Cut the output head into slices of at most `slice_bytes`, or one row; return (first token, weights) of each.

    Slices are nearly equal, in whole tiles: a product of an odd width leaves the fast path of a GPU, and so does every
    later slice.
    """
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
def _standing_in(forwards: StandIns) -> Iterator[None]:
    """Call these functions in place of the modules' forwards, inside the block."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
