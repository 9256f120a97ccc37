"""Experience replay (Rolnick et al. 2019, arXiv 1811.11682; Chaudhry et al. 2019, arXiv 1902.10486).

    L = CE(task rows) + weight * CE(rows drawn from the memory)

Both are means over their own supervised tokens, so `weight` does not depend on how many tokens are replayed.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base


class Config(MethodConfig):
    """Experience replay."""

    needs_memory: ClassVar[bool] = True

    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the cross-entropy on replayed rows."""


class Method(base.Method[Config]):
    def replay_terms(self) -> list[base.ReplayTerm]:
        return [base.ReplayTerm("replay", ce_weight=self.config.weight)]
