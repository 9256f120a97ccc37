"""AsFT pulls adapters' updates out of the directions that the alignment has not taken."""

from __future__ import annotations

import pytest
import torch

from safecl.config import ConfigError, validate_tree
from tests.engine.passes import oracle
from tests.engine.scenes import tiny_model
from tests.methods import reference, scenes
from tests.methods.test_ewc_lora import STEPS, start_and_steps
from tests.methods.test_lwf import CHECKPOINTED, LORA

STRENGTH = 5.0


def expected(base: torch.nn.Module, strength: float) -> tuple[dict, dict]:
    """(start, end) with the penalty of whole products, projected by whole matrices."""
    from tests.engine.scenes import run_config

    state, start, steps = start_and_steps()
    model = scenes.with_adapters(tiny_model(), run_config(model=LORA))
    model.load_state_dict(state)
    inner, scale = model.get_base_model(), LORA["lora"]["alpha"] / LORA["lora"]["r"]
    aligned, before = dict(tiny_model().named_parameters()), dict(base.named_parameters())
    outside = {}
    for name in aligned:
        v = (aligned[name] - before[name]).detach().double()
        if v.dim() == 2:
            outside[name] = torch.eye(len(v), dtype=torch.float64) - v @ v.T / v.norm()
    layers = {f"{n}.weight": m for n, m in inner.named_modules() if hasattr(m, "lora_A")}

    def loss(rows):
        total = reference.mean_nll(inner, rows)
        for name, layer in layers.items():
            product = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            total = total + strength * ((outside[name] @ product.double()) ** 2).sum().float()
        return total

    return start, reference.train(model, [lambda rows=rows: loss(rows) for rows in steps])


@pytest.mark.parametrize(("ranks", "stage", "model"), [(2, 2, LORA), (2, 3, CHECKPOINTED)])
def test_asft_equals_plain_pytorch_with_whole_products(rank_pool, tmp_path, ranks, stage, model):
    base = scenes.other_model("3", noise=0.5)  # far enough for C to matter
    base.save_pretrained(tmp_path / "base")
    methods = {"asft": {"base": str(tmp_path / "base"), "strength": STRENGTH}}
    found = rank_pool(ranks).run(
        scenes.train, steps=STEPS, memory=None, methods=methods, deepspeed={"stage": stage}, model=model
    )[0]
    start, end = expected(base, STRENGTH)
    own = {name: found["weights"][name] for name in end}
    assert oracle.relative_distance(own, end, start) <= 1e-3
    for other in (expected(base, 0.0)[1], expected(scenes.other_model("9", noise=0.5), STRENGTH)[1]):
        assert oracle.relative_distance(own, other, start) > 1e-2
    assert found["losses"][0]["adapter_penalty"] == 0.0 < found["losses"][2]["adapter_penalty"]


def test_the_plan_counts_the_directions_on_each_rank():
    from safecl.planning.costs.model_shape import ModelShape
    from safecl.planning.costs.planned_model import PlannedModel
    from tests.engine.scenes import run_config

    model = {"path": "unused", "lora": {"r": 4, "target_modules": ["q_proj"]}}
    shape = ModelShape.of(PlannedModel.of(tiny_model()), run_config(model=model, methods={"asft": {"base": "b"}}))
    adapted = [p.numel() for name, p in tiny_model().named_parameters() if "q_proj" in name]
    assert shape.alignment_directions == 4 * sum(adapted) > 0
    assert ModelShape.of(PlannedModel.of(tiny_model()), run_config(model=model)).alignment_directions == 0


def test_what_asft_cannot_do_without_is_told():
    tree = {"model": {"path": "m"}, "tasks": [{"name": "a", "train": "a.jsonl"}], "output": "runs/a"}
    with pytest.raises(ConfigError, match=r"asft without model\.lora: its pull is that of adapters' products"):
        validate_tree(tree | {"methods": {"asft": {"base": "b"}}}, "run.yaml")
    lora = {"path": "m", "lora": {"r": 4}}
    with pytest.raises(ConfigError, match=r"asft needs `asft: {base: MODEL}`, the model before its alignment"):
        validate_tree(tree | {"model": lora, "methods": {"asft": {}}}, "run.yaml")
