"""The modules that a penalty is restricted to: all, attention, or patterns of parameter names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from safecl.config import ConfigError, MethodConfig

ATTENTION = ("*.self_attn.*", "*.attn.*", "*.attention.*", "*.self_attention.*")


class ScopedConfig(MethodConfig):
    """Config of a method whose penalty can be restricted to some modules."""

    has_penalty: ClassVar[bool] = True

    modules: Literal["all", "attention"] | list[str] = "all"
    """The weights that are pulled: all, attention, or patterns of parameter names with shell wildcards, e.g.
    ["*.self_attn.v_proj.*", "*.layers.0.*"]."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of parameter names that are pulled; empty for all weights."""
        if isinstance(self.modules, list):
            return tuple(self.modules)
        return ATTENTION if self.modules == "attention" else ()

    def check_weight_names(self, method: str, names: list[str]) -> None:
        """Raise ConfigError where no trained weight fits the patterns."""
        if self.patterns and not any(fnmatchcase(name, pattern) for pattern in self.patterns for name in names):
            examples = ", ".join(names[len(names) // 2 :][:3])
            raise ConfigError(
                f"methods.{method}.modules: no trained weight is named like {', '.join(self.patterns)}; "
                f"there are {examples}, ..."
            )
