"""The parents of the merges, made once for all tests."""

from __future__ import annotations

import pytest

from tests.merging import models


@pytest.fixture(scope="session")
def parents(tmp_path_factory):
    """`parents(family)` gives folders of a base and two tuned models in bf16, by `base`, `tuned` and `tuned2`."""
    made = {}

    def get(family: str = "llama") -> dict:
        if family not in made:
            made[family] = models.make_parents(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get
