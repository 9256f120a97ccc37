"""The example of docs/embedding.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

DOCUMENT = Path(__file__).parents[3] / "docs" / "embedding.md"


def run_example(code: str):
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(code, "docs/embedding.md", "exec"), names)
    live = {name: names["shards"].read(name) for name in names["shards"].shapes}
    return names["average"], live, float(names["optimizer"].result.penalty)


def test_the_embedding_example_trains_averages_and_swaps(rank_pool):
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL).group(1)
    for average, live, penalty in rank_pool(2).run(run_example, code=code):
        assert penalty > 0
        assert all(torch.equal(average[name], live[name]) for name in average)
