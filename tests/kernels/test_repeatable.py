"""Sums by index: their order never changes, and no kernel of safecl adds atomically."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from safecl.kernels import repeatable

PACKAGE = Path(repeatable.__file__).parents[1]


def test_the_form_for_gpus_has_the_sums_of_the_form_for_cpus(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 7, (100,), generator=generator)
    values, total = torch.randn(100, 3, generator=generator).double(), torch.ones(7, 3, dtype=torch.float64)
    expected = torch.stack([total[i] + values[index == i].sum(0) for i in range(7)])
    torch.testing.assert_close(repeatable.add_at_(total.clone(), index, values), expected)
    device = type("Elsewhere", (), {"type": "cuda"})
    moved = type("Moved", (torch.Tensor,), {"device": property(lambda self: device)})
    found = repeatable.add_at_(total.clone().as_subclass(moved), index, values).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pattern", [r"\.index_add_?\(", r"atomic_", r"\.scatter_reduce"])
def test_no_module_adds_in_an_order_that_a_gpu_may_change(pattern):
    """Exceptions, whose order does not matter: `repeatable` itself on a CPU, one addition per element, and a count."""
    once = {"kernels/repeatable.py", "kernels/head/logits.py", "kernels/flat/triton_kernels.py"}
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if re.search(pattern, path.read_text())}
    assert found <= once, found
