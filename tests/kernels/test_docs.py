"""The example of docs/kernels-head.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "kernels-head.md").read_text(encoding="utf-8")


def test_the_example_of_the_head_gives_what_it_says():
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (6,), generator=generator)
    labels[2] = -100
    names = {
        "hidden": torch.randn(6, 8, generator=generator, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 50, bias=False),
        "labels": labels,
        "ce_weights": torch.full((6,), 0.2),
        "rows": torch.tensor([1, 4]),
        "kd_weights": torch.full((6,), 0.5),
        "teacher_hidden": torch.randn(2, 8, generator=generator),
        "teacher_weight": torch.randn(50, 8, generator=generator),
    }
    exec(compile(example, "docs/kernels-head.md", "exec"), names)
    out = names["out"]
    assert names["hidden"].grad.abs().sum() > 0 and not out.ce.requires_grad
    assert out.ce.shape == out.logsumexp.shape == (6,) and out.ce[2] == 0 and out.kd.shape == (6,)
