"""A model that cannot be had is reported at once, with the key, with and without a network."""

from __future__ import annotations

import socket

import pytest

from safecl.config import ConfigError, ModelConfig
from safecl.data import hub
from safecl.data.templates.chat import load_tokenizer


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    asked: list = []

    def refuse(address, timeout=None):
        asked.append(address)
        raise OSError(101, "Network is unreachable")

    hub._no_connection.cache_clear()
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    yield asked
    hub._no_connection.cache_clear()


def test_a_name_without_an_owner_that_is_no_folder_asks_nobody(no_network):
    with pytest.raises(ConfigError, match=r"model\.path: there is no folder foo here .*owner/name"):
        load_tokenizer(ModelConfig(path="foo"))
    assert no_network == []


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"path": "someone/foo"}, "model.path"), ({"path": "x", "tokenizer": "a/b"}, "model.tokenizer")],
)
def test_a_name_on_the_hub_is_told_where_the_hub_cannot_be_reached(no_network, settings, key):
    with pytest.raises(
        ConfigError, match=rf"{key}: .* neither a folder here nor in the hub's cache, and .*Network is unreachable"
    ):
        load_tokenizer(ModelConfig(**settings))
    assert len(no_network) == 1


def test_settings_of_a_model_and_a_teachers_tokenizer_name_their_keys():
    from safecl.engine.model.settings import read_model_settings

    with pytest.raises(ConfigError, match=r"^model\.path: a/b is neither"):
        read_model_settings(ModelConfig(path="a/b"))
    with pytest.raises(ConfigError, match=r"^methods\.lwf\.teacher: a/b is neither"):
        load_tokenizer(ModelConfig(path="a/b"), key="methods.lwf.teacher")


def test_a_folder_and_what_is_in_the_cache_need_no_network(no_network, tmp_path):
    for folder in ("here", "cache/models--gpt2/snapshots/1", "cache/models--a--b/snapshots/2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tokenizer.json").touch()
    for name in ("here", "gpt2", "a/b"):
        hub.refuse_unreachable("model.path", name)
    assert no_network == []


def test_offline_by_the_environment_asks_nobody(no_network, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError,
        match=r"model\.path: a/b is neither a folder here nor in the hub's cache, and the hub cannot be asked",
    ):
        hub.refuse_unreachable("model.path", "a/b")
    assert no_network == []
