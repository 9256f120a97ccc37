"""Methods of one run: what cannot be combined is refused, and the order of the others in the config does not matter."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from safecl.config import ConfigError, validate_tree
from safecl.config.method_registry import builtin_methods, method_module
from safecl.methods.base import BEFORE
from tests.methods import every_method, scenes

SHARED = {"anchor", "fisher", "ema", BEFORE}
"""theta_0, the memory's Fisher information under the aligned model, the one average, the weights before a step."""
STEP = {"project": "step"}
ALIGN = [{"name": "a", "train": "a.jsonl", "role": "align"}, {"name": "b", "train": "b.jsonl"}]
HARMFUL = {"harmful": "harmful.jsonl"}


def validated(tasks: list[dict] | None = None, **methods):
    tree = scenes.run_config().model_dump(mode="json") | {"methods": methods}
    return validate_tree(tree | ({"tasks": tasks} if tasks else {}), "run.yaml")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"vaccine": {}, "t_vaccine": HARMFUL}, "vaccine and t_vaccine each move the hidden states"),
        ({"vaa": HARMFUL, "tests.methods.sharpness_aware": {}}, "vaa and tests.*aware each move the weights"),
        ({"agem": STEP, "osft": {}}, "agem and osft each change every step, and one undoes what another makes hold"),
        ({"swat": {}, "agem": STEP}, "swat and agem each change every step"),
        ({"osft": {}, "mudman": {"mask": "step"}}, "osft and mudman each change every step"),
        ({"agem": {}, "safe_grad": {}, "mudman": {}}, "agem and safe_grad and mudman each change every gradient"),
        ({"ogpsa": {}, "safe_anchor": {}}, "ogpsa and safe_anchor each change every gradient"),
    ],
)
def test_methods_that_undo_each_other_are_refused(methods, message):
    of_alignment = any(method_module(name).Config().acts_on == "align" for name in methods)
    with pytest.raises(ConfigError, match=message):
        validated(ALIGN if of_alignment else None, **methods)


def test_methods_that_leave_each_other_true_are_combined():
    assert validated(osft={}, swat={}, segment_rates={}, ogpsa={})
    assert validated(agem=STEP, mudman={})
    assert validated(ALIGN, t_vaccine=HARMFUL, vaa=HARMFUL, booster=HARMFUL, rep_noise=HARMFUL)
    assert validated(ALIGN, t_vaccine=HARMFUL, agem=STEP), "they act on different tasks"


def test_methods_share_no_state_but_what_means_the_same_in_all():
    settings = [
        method_module(name).Config(**own)
        for name in builtin_methods()
        for own in [{}, *every_method.VARIANTS.get(name, {}).values()]
    ]
    for one, other in combinations(settings, 2):
        if type(one) is not type(other):
            assert set(one.state_kinds) & set(other.state_kinds) <= SHARED, (type(one), type(other))


def settings_of(*names: str, **others: dict) -> dict[str, dict]:
    return {name: every_method.SETTINGS.get(name, {}) for name in names} | others


STAGE = settings_of("vaa", "booster", "t_vaccine")
NOISE = settings_of("vaa", "rep_noise")
GRADIENTS = settings_of("mudman", "psmt", "refresh", agem=STEP)


@pytest.mark.parametrize(
    ("methods", "sections"), [(STAGE, every_method.ALIGNMENT), (NOISE, every_method.ALIGNMENT), (GRADIENTS, {})]
)
def test_the_order_of_the_config_does_not_matter(rank_pool, tmp_path, methods, sections):
    """Moves for the step's own gradient come last and lasting moves first, wherever the config has them."""
    orders = methods, dict(reversed(methods.items()))
    one, other = (
        rank_pool(1).run(every_method.train, method=None, folder=str(tmp_path / str(i)), methods=order, **sections)[0]
        for i, order in enumerate(orders)
    )
    assert one["state"].keys() == other["state"].keys()
    for kind, values in one["state"].items():
        assert all(torch.equal(value, other["state"][kind][name]) for name, value in values.items()), kind


def test_rows_are_scheduled_where_some_steps_train_none_of_them(rank_pool, tmp_path):
    methods = settings_of("lisa", "bds")
    found = rank_pool(1).run(every_method.train, method=None, folder=str(tmp_path), methods=methods)[0]
    assert len(found["losses"]) == every_method.STEPS


def undeclared(folder: str) -> str:
    """The error of a method that leaves the weights moved and does not say so."""
    from tests.methods import sharpness_aware

    declared, sharpness_aware.Config.moves_weights = sharpness_aware.Config.moves_weights, None
    try:
        every_method.train(None, folder, methods={sharpness_aware.__name__: {}})
    except ConfigError as error:
        return str(error)
    finally:
        sharpness_aware.Config.moves_weights = declared
    return "no error"


def test_a_method_that_leaves_the_weights_moved_must_say_so(rank_pool, tmp_path):
    assert 'must say so, by `moves_weights = "until_update"`' in rank_pool(1).run(undeclared, folder=str(tmp_path))[0]
