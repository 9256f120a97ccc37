"""Which weights a penalty is about: all, attention, or patterns of parameter names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from safecl.config import ConfigError, MethodConfig

ATTENTION = ("*.self_attn.*", "*.attn.*", "*.attention.*", "*.self_attention.*")


class ScopedConfig(MethodConfig):
    """A method whose penalty can be restricted to some modules."""

    modules: Literal["all", "attention"] | list[str] = "all"
    """Which weights: all, attention, or patterns of parameter names with shell wildcards, e.g. ["*.self_attn.v_proj.*",
    "*.layers.0.*"]."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Empty for all weights."""
        return (
            {"all": (), "attention": ATTENTION}[self.modules] if isinstance(self.modules, str) else tuple(self.modules)
        )

    def check_patterns(self, method: str, names: list[str]) -> None:
        """Raises ConfigError where no weight is meant."""
        if self.patterns and not any(fnmatchcase(name, pattern) for pattern in self.patterns for name in names):
            examples = ", ".join(names[len(names) // 2 :][:3])
            raise ConfigError(
                f"methods.{method}.modules: no trained weight is named like {', '.join(self.patterns)}; there are {examples}, ..."
            )
