"""The setting of methods that learn from harmful rows what must not happen."""

from __future__ import annotations

from safecl.config import MethodConfig
from safecl.config.base import Text


class HarmfulConfig(MethodConfig):
    """Config of a method that takes gradients on harmful rows; the model is never trained towards them."""

    harmful: Text | None = None
    """Harmful rows, which the method needs: a file or hub id of disallowed prompts with answers that comply. They must
    not repeat a prompt that is measured."""

    @property
    def needs_harmful(self) -> bool:
        return True

    @property
    def harmful_source(self) -> str | None:
        return self.harmful
