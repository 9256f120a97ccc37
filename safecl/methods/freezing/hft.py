"""Half fine-tuning (HFT, Hui et al. 2025, arXiv 2404.18466): half of the weights stay as they are. Needs no data.

    theta_i <- theta_i + update_i   for the chosen half,      theta_i stays   for the other

The half is chosen at the level of categories, the paper's best: in every block two of the four attention maps (q, k, v,
o); of the three maps of the feed-forward part (up, down, gate) two in one half of the blocks and one in the other; one
of two norms. Embedding and head are trained. The choice is a function of the seed and the weights' names. The other
weights have no gradient, no master copy and no moments.

The paper chooses anew for each round of a sequence; here all tasks of a run train the same half.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from safecl.config import MethodConfig
from safecl.methods import base, layers

PARTS = {
    "attention": r"\.(q|k|v|o|out)_proj\.",
    "feed-forward": r"\.(up|down|gate|fc1|fc2)_proj\.|\.(fc1|fc2)\.",
    "norm": r"norm",
}


class Config(MethodConfig):
    """HFT: half of the weights stay as they are."""

    refuses_lora: ClassVar[str] = "the adapters are no half of the weights; tune all weights (model.lora: null)"

    half: Annotated[int, Field(ge=0)] = 0
    """Chooses another half with the same train.seed."""

    def frozen(self, names: Sequence[str], seed: int) -> set[str]:
        drawn = f"{seed} {self.half}"
        groups: dict[tuple[int, str], set[str]] = defaultdict(set)
        for name in names:
            number = layers.number_of(name)
            part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), None)
            if number is not None and part is not None:
                groups[number, part].add(_module_of(name))
        numbers = sorted({number for number, _ in groups})
        fuller = set(random.Random(f"{drawn} blocks").sample(numbers, len(numbers) // 2))
        stays: set[tuple[int, str]] = set()
        for (number, part), modules in groups.items():
            trained = len(modules) // 2 + (len(modules) % 2 if number in fuller else 0)
            kept = random.Random(f"{drawn} {number} {part}").sample(sorted(modules), len(modules) - trained)
            stays |= {(number, module) for module in kept}
        return {name for name in names if (layers.number_of(name), _module_of(name)) in stays}


class Method(base.Method[Config]):
    """All of it is in the choice of the weights."""


def _module_of(name: str) -> str:
    """The name of a weight's module: a bias stays with its weight."""
    return name.rpartition(".")[0]
