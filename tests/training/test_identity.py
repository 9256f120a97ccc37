"""A run goes on with the config that it began with, which may be older than keys that have been added since."""

from __future__ import annotations

import pytest

from safecl.config import ConfigError, RunConfig
from safecl.training.identity import refuse_other_config

CONFIG = {"model": {"path": "m"}, "tasks": [{"name": "t", "train": "t.jsonl"}], "output": "out"}


def resolved(**model) -> dict:
    config = {**CONFIG, "model": {**CONFIG["model"], **model}}
    return RunConfig.model_validate(config).model_dump(mode="json")


def test_a_key_that_a_saved_config_does_not_have_counts_as_its_default():
    saved = resolved()
    del saved["model"]["template_date"], saved["train"]["seed"]
    refuse_other_config(saved, resolved(), "out")
    with pytest.raises(ConfigError, match=r'model\.template_date: "2024-07-26" then, "2031-02-03" now'):
        refuse_other_config(saved, resolved(template_date="2031-02-03"), "out")


def test_a_saved_config_that_cannot_be_read_is_compared_as_it_is():
    with pytest.raises(ConfigError, match=r"model\.of_another_time: 1 then, null now"):
        refuse_other_config({**resolved(), "model": {**resolved()["model"], "of_another_time": 1}}, resolved(), "out")
