"""Proofs that hold for every method: it trains the same numbers in every ZeRO stage, on one rank and on two, with
offload and with LoRA, and a run that is stopped at any step and resumed is bitwise the uninterrupted one.

A new method is part of them by its file alone; tests/methods/every_method.py has settings for a run of a few steps. The
ordinary suite takes one layout for each method, `make test-long` all. Further settings of some methods (VARIANTS) are
proven in one layout: ZeRO-3 with offload.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import pytest

from safecl.config.method_registry import builtin_methods, method_module
from tests.engine.passes import oracle
from tests.methods import every_method

LORA = {"lora": {"r": 4, "alpha": 8}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "stage 0": {"deepspeed": {"stage": 0}},
    "stage 1": {"deepspeed": {"stage": 1}},
    "stage 2, offload": {"deepspeed": {"stage": 2, "offload": {"optimizer": "cpu"}}},
    "stage 3": {"deepspeed": {"stage": 3}},
    "stage 3, offload": {"deepspeed": {"stage": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}}},
    "stage 2, LoRA": {"deepspeed": {"stage": 2}, "model": LORA},
    "stage 3, LoRA": {"deepspeed": {"stage": 3}, "model": LORA},
}
HARDEST = "stage 3, offload"

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Means of gradients that partly cancel, so that their rounding weighs more."""


def layouts_of(method: str) -> list[str]:
    """The layouts of a method: with adapters unless it refuses them, without unless it needs them."""
    config = method_module(method).Config
    plain, adapted = (config(**every_method.settings_of(method, with_lora)) for with_lora in (False, True))
    fits = {True: adapted.refuses_lora is None, False: plain.needs_lora is None}
    return [name for name in LAYOUTS if fits["LoRA" in name]]


def cases() -> list[Any]:
    """All methods in all layouts; one layout of each method is part of the ordinary suite."""
    found = []
    for method in builtin_methods():
        layouts = layouts_of(method)
        ordinary = layouts[zlib.crc32(method.encode()) % len(layouts)]
        marks = {name: () if name == ordinary else (pytest.mark.long,) for name in layouts}
        found += [pytest.param(method, None, name, marks=marks[name], id=f"{method}, {name}") for name in layouts]
    for method, variants in every_method.VARIANTS.items():
        found += [pytest.param(method, variant, HARDEST, id=f"{method}, {variant}, {HARDEST}") for variant in variants]
    return found


@pytest.fixture(scope="module")
def on_one_rank(rank_pool, tmp_path_factory):
    """A method's run in stage 0 on one rank, made once."""

    @functools.cache
    def run(method: str | None, lora: bool, variant: str | None = None) -> dict[str, Any]:
        folder = str(tmp_path_factory.mktemp("one"))
        changes = {"deepspeed": {"stage": 0}, **({"model": LORA} if lora else {})}
        return rank_pool(1).run(every_method.train, method=method, variant=variant, folder=folder, **changes)[0]

    return run


@pytest.mark.parametrize(("method", "variant", "layout"), cases())
def test_a_method_is_the_same_in_every_layout_and_resumes_bitwise(
    rank_pool, on_one_rank, tmp_path, method, variant, layout
):
    found, other = rank_pool(2).run(
        every_method.train,
        method=method,
        variant=variant,
        folder=str(tmp_path),
        cut=every_method.cut_of(method, layout),
        **LAYOUTS[layout],
    )
    assert not found["differences"] and not other["differences"], found["differences"]
    lora = "LoRA" in layout
    wanted, plain = on_one_rank(method, lora, variant), on_one_rank(None, lora)
    assert found["state"].keys() == wanted["state"].keys()
    for kind, values in wanted["state"].items():
        moves_from_the_start = kind in ("weights", "slow") or kind.endswith("ema")
        error = distance(found["state"][kind], values, wanted["start"] if moves_from_the_start else None)
        assert error <= (1e-2 if kind in MOMENTS else 1e-3), kind
    assert acts(wanted, plain), f"the run with {method} is that of plain fine-tuning"


def acts(found: dict[str, Any], plain: dict[str, Any]) -> bool:
    """True where a method has changed the weights, keeps state of its own, or trains fewer weights."""
    if found["state"].keys() != plain["state"].keys() or found["start"].keys() != plain["start"].keys():
        return True
    return distance(found["state"]["weights"], plain["state"]["weights"], plain["start"]) > 1e-3


def distance(found, wanted, start=None) -> float:
    if all(bool((value == 0).all()) for values in (found, wanted) for value in values.values()):
        return 0.0
    return oracle.relative_distance(found, wanted, start)


@pytest.mark.parametrize("name", builtin_methods())
def test_a_plan_may_ask_a_method_before_any_run_begins(name):
    """`safecl check` asks what a method adds to a step; its state is then what a checkpoint may hold."""
    from safecl.training.resume import dump_plain

    config = method_module(name).Config()
    method = method_module(name).Method(name, config)
    for asked in (method.replay_terms, method.task_terms, method.penalty, method.ema_mask, method.hidden_move):
        asked()
    assert len(method.gradient_draws(0)) >= (config.gradient_passes >= 1)
    assert config.needs_memory or config.needs_harmful or not [*method.replay_terms(), *method.gradient_draws(0)]
    assert method.memory_step(0, 10) is None or config.needs_memory
    dump_plain(method.state_dict())


def test_a_method_that_lacks_a_layout_says_why():
    """Stages, offload and two ranks are there for all; the config's own words refuse adapters, or weights without."""
    for method in builtin_methods():
        config = method_module(method).Config()
        missing = {name for name in LAYOUTS if name not in layouts_of(method)}
        with_lora = {name for name in LAYOUTS if "LoRA" in name}
        assert missing in (set(), with_lora if config.refuses_lora else set(), set(LAYOUTS) - with_lora), method
        assert not missing or config.refuses_lora or config.needs_lora, method
