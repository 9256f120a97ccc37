"""Whatever `train` refuses from config, data, tokenizer, model files or prompts, `check` refuses in the same words.

Every failing input of the catalogue goes through both. `train` is stopped where it would open the model: what is
refused by then needs no training.
"""

from __future__ import annotations

import functools
import re

import pytest
import yaml

from safecl.commands.check import check_run
from safecl.commands.train import train_run
from safecl.config import ConfigError, load_config
from safecl.training import trainer
from tests.catalogue.models import save_model
from tests.catalogue.runs import REFUSED, sound_run


class Opens(Exception):
    """The run would open its model now."""


@pytest.fixture(autouse=True)
def not_trained(monkeypatch, tmp_path):
    def stop(*arguments: object) -> None:
        raise Opens

    monkeypatch.setattr(trainer, "open_run", stop)
    monkeypatch.setattr(trainer.collectives, "init_distributed", lambda: None)
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def outcome(verb, config_file) -> str:
    """The words of the refusal; `ready` where there is none."""
    try:
        verb(load_config(config_file))
    except ConfigError as error:
        return str(error)
    except Opens:
        pass
    return "ready"


@functools.cache
def known_to_be_missing() -> tuple[str, ...]:
    from importlib.util import find_spec

    return tuple(name for name in ("trackio",) if find_spec(name) is None)


@pytest.mark.parametrize("name", REFUSED)
def test_check_and_train_refuse_the_same_in_the_same_words(name, tmp_path, model):
    if "tracker" in name and not known_to_be_missing():
        pytest.skip("trackio is installed here")
    tree = sound_run(tmp_path, model)
    REFUSED[name].spoil(tmp_path, tree)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    checked, trained = (outcome(verb, tmp_path / "run.yaml") for verb in (check_run, train_run))
    assert checked == trained != "ready"
    assert re.search(REFUSED[name].says, checked), checked


def test_a_run_that_check_lets_pass_opens_its_model(tmp_path, model):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sound_run(tmp_path, model)))
    assert outcome(check_run, tmp_path / "run.yaml") == outcome(train_run, tmp_path / "run.yaml") == "ready"
