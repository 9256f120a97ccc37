"""The outline of a model: the names and sizes that planning needs, without the model and without transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Outline:
    """Names and sizes of a causal language model."""

    model_type: str
    parameters: Mapping[str, tuple[int, ...]]
    """Shape of each parameter, in the model's order; tied parameters occur once."""
    fixed: tuple[str, ...]
    """Parameters that take no gradient, whatever the config says."""
    layers: tuple[str, ...]
    """Names of the decoder layers."""
    linear: Mapping[str, tuple[int, int]]
    """Numbers of inputs and outputs of each linear map but the head."""
    vocabulary: int
    """Rows of the input embedding."""
    tables: tuple[int, ...]
    """Rows of each other embedding, such as one of positions."""
    without_text: tuple[str, ...]
    """Parameters that belong neither to the decoder nor to the head, so that text does not reach them."""
    untied: tuple[str, str] | None
    """Parameters of head and embedding where the settings tie them and the files hold two different tensors."""
    vocab_size: int
    """By the settings; so are the following."""
    hidden_size: int
    num_hidden_layers: int
    positions: int | None
    tied: bool

    @classmethod
    def of(cls, model: nn.Module, settings: PretrainedConfig | None = None) -> Outline:
        """Return the outline of transformers' model, whose parameters may be on the meta device.

        settings: those that its files hold, where the model's own were changed.
        """
        from torch import nn

        pretrained = cast("PreTrainedModel", model)
        text = pretrained.config.get_text_config()
        words, head = (cast(Any, m) for m in (pretrained.get_input_embeddings(), pretrained.get_output_embeddings()))
        parts = [cast("nn.Module", part) for part in (pretrained.get_decoder(), head) if part is not None]
        reached = {id(p) for part in parts for p in part.parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        modules = list(model.named_modules())
        stack, layers = max(
            ((name, module) for name, module in modules if isinstance(module, nn.ModuleList)),
            key=lambda found: sum(p.numel() for p in found[1].parameters()),
        )
        ties = getattr(settings or pretrained.config, "tie_word_embeddings", False)
        is_untied = bool(ties) and head is not None and head.weight is not words.weight
        return cls(
            model_type=pretrained.config.model_type,
            parameters={name: tuple(p.shape) for name, p in model.named_parameters()},
            fixed=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
            layers=tuple(f"{stack}.{number}" for number in range(len(layers))),
            linear={
                name: (module.in_features, module.out_features)
                for name, module in modules
                if isinstance(module, nn.Linear) and module is not head
            },
            vocabulary=words.num_embeddings,
            tables=tuple(m.num_embeddings for _, m in modules if isinstance(m, nn.Embedding) and m is not words),
            without_text=tuple(name for key, name in names.items() if key not in reached),
            untied=(names[id(head.weight)], names[id(words.weight)]) if is_untied else None,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            positions=getattr(text, "max_position_embeddings", None),
            tied=bool(text.tie_word_embeddings),
        )

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.parameters.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each parameter."""
        return {name: math.prod(shape) for name, shape in self.parameters.items()}

    @property
    def trained(self) -> dict[str, int]:
        """Number of weights of each parameter that takes a gradient."""
        return {name: size for name, size in self.sizes.items() if name not in self.fixed}

    def in_layer(self, layer: str) -> Iterator[tuple[int, ...]]:
        """Yield the shapes of a layer's parameters."""
        return (shape for name, shape in self.parameters.items() if name.startswith(f"{layer}."))

    def to_json(self) -> dict[str, Any]:
        """Return the outline as JSON can hold it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, found: Any) -> Outline | None:
        """Return the outline that `to_json` has written; None for anything else."""
        try:
            values: dict[str, Any] = dict(found)
            values |= {key: _shapes(values[key]) for key in ("parameters", "linear")}
            values |= {key: tuple(map(str, values[key])) for key in ("fixed", "layers", "without_text")}
            values |= {key: int(values[key]) for key in ("vocabulary", "vocab_size", "hidden_size")}
            values["tables"] = tuple(map(int, values["tables"]))
            values["untied"] = None if values["untied"] is None else tuple(map(str, values["untied"]))
            outline = cls(**values)
        except (TypeError, ValueError, KeyError, AttributeError):
            return None
        return outline if outline.parameters and outline.layers else None


def _shapes(found: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): tuple(map(int, shape)) for name, shape in found.items()}
