"""Makes the model that is trained, without a whole copy on every rank.

Its structure is built with parameters on the meta device; then each parameter becomes a view of the node's reference
store. DeepSpeed copies from there what a rank keeps (its shard, or the flat weights), so a node holds one whole model
while it starts, for any number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from safecl.config import ConfigError, ModelConfig
from safecl.engine.model.attention import ON_GPUS_ONLY
from safecl.engine.model.dtypes import CONFIG_DTYPES
from safecl.engine.model.settings import read_model_settings
from safecl.engine.model.structure import empty_model, prepare_for_training
from safecl.engine.reference.store import ReferenceStore
from safecl.storage.model_folder import settings_source
from safecl.storage.untrusted import library_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(config: ModelConfig) -> tuple[nn.Module, ReferenceStore]:
    """Make the causal language model in the run's dtype, with adapters where the config has them, and the store that
    its weights are views of.

    A collective call. The views are read-only: a weight needs memory of its own before it is changed in place. Raises
    ConfigError.
    """
    read_model_settings(config)
    # transformers chooses where the user does not, since not every architecture has sdpa, and where the chosen kernel
    # cannot run yet: the weights are in host memory.
    chosen = None if config.attention == "auto" or config.attention in ON_GPUS_ONLY else config.attention
    dtype = CONFIG_DTYPES[config.dtype]
    try:
        model = empty_model(config.path, dtype, attention=chosen, trust_remote_code=config.trust_remote_code)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # the library's classes check their sizes in many ways
        raise ConfigError(f"model.path: {config.path}: cannot be loaded: {library_error(error)}") from None
    store = ReferenceStore.open(config.path, dtype=dtype, model=model, trust_remote_code=config.trust_remote_code)
    take_weights(model, store)
    take_generation_settings(model, config.path)
    return prepare_for_training(model, config), store


def take_weights(model: nn.Module, store: ReferenceStore) -> None:
    """Make every parameter of an empty model a view of the store, tied parameters the same object, and set the buffers
    that a checkpoint holds."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(
                        store.tensor(f"{path}.{leaf}".lstrip(".")), requires_grad=p.requires_grad
                    )
                    made[id(made[id(p)])] = made[id(p)]
                module._parameters[leaf] = made[id(p)]
    for name, value in store.buffers.items():
        model.get_buffer(name).copy_(value)


def take_generation_settings(model: PreTrainedModel, path: str) -> None:
    """Take over the folder's generation config, which is saved again with the tuned model."""
    from transformers import GenerationConfig

    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(settings_source(path)[0])
        except (OSError, ValueError):
            return  # without one transformers derives it from the model's settings
