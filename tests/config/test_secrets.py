"""Secrets of a config and of the environment are written nowhere."""

from __future__ import annotations

import stat

import pytest

from safecl.config import RunConfig, dump_config
from safecl.config.secrets import HIDDEN, hide_secrets, without_secrets

SECRET = "correct horse battery staple"
KEYS = ("token", "api_key", "judge_api_key", "hf_token", "password", "client_secret", "credentials")
NO_KEYS = ("tokens", "tokenizer", "pad_token", "eos_token", "refusal_tokens", "keyword", "key_lines")


def test_settings_whose_keys_say_so_are_hidden_at_any_depth_and_others_stay():
    settings = dict.fromkeys((*KEYS, *NO_KEYS), SECRET) | {"max_tokens": 3, "secret": ""}
    hidden = without_secrets({"methods": {"mine": [settings]}})["methods"]["mine"][0]
    assert all(hidden[key] == HIDDEN for key in KEYS)
    assert all(hidden[key] == SECRET for key in NO_KEYS) and hidden["max_tokens"] == 3 and hidden["secret"] == ""


@pytest.mark.parametrize("text", ["hf_" + "a" * 34, "sk-" + "b1" * 20, "ghp_" + "c" * 36, "AKIA" + "D" * 16])
def test_values_that_look_like_keys_are_hidden_in_any_text(text):
    assert hide_secrets(f"cannot log in with {text}!") == f"cannot log in with {HIDDEN}!"
    assert without_secrets({"note": text}) == {"note": HIDDEN}


def test_secrets_of_the_environment_and_of_addresses_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setenv("SAFECL_SHORT_TOKEN", "ab")
    assert (
        hide_secrets(f"sent {SECRET} to https://me:pass@host/x, ab") == f"sent {HIDDEN} to https://{HIDDEN}@host/x, ab"
    )


def test_a_written_config_has_no_secret():
    tree = {"model": {"path": "m"}, "tasks": [{"name": "t", "train": "https://me:pass@host/rows"}], "output": "o"}
    assert "me:pass" not in dump_config(RunConfig.model_validate(tree))


def test_the_file_of_an_error_is_private_and_has_no_secret(monkeypatch, tmp_path):
    from safecl import exits

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(exits.tracebacks, "folder", tmp_path)
    for _ in range(2):  # the second replaces the first
        try:
            raise RuntimeError(f"refused: {SECRET}")
        except RuntimeError:
            path = exits._write_traceback()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert f"refused: {HIDDEN}" in path.read_text() and SECRET not in path.read_text()
