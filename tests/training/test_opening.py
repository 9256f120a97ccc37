"""Runs that repeat bitwise on a GPU: what is asked of torch and of the libraries, before the model is opened."""

from __future__ import annotations

import os

import pytest
import torch

from safecl.distributed import devices
from safecl.training import opening
from tests.engine import scenes


class Opened(Exception):
    """The model would be opened now."""


def settings_of(monkeypatch, *, gpu: bool, deterministic: bool) -> dict:
    asked: dict = {}
    monkeypatch.setattr(devices, "on_gpu", lambda: gpu)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: asked.update(torch=mode))
    monkeypatch.setattr(os, "environ", asked)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)

    def open_language_model(*_, **__):
        raise Opened

    monkeypatch.setattr(opening, "open_language_model", open_language_model)
    with pytest.raises(Opened):
        opening.open_engine(
            scenes.run_config(train={"deterministic": deterministic}), pad_id=0, keep_store=False, note=print
        )
    return asked


def test_only_operations_with_a_fixed_order_are_allowed_on_gpus_that_are_asked_to_repeat(monkeypatch):
    asked = settings_of(monkeypatch, gpu=True, deterministic=True)
    assert asked == {"torch": True, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


@pytest.mark.parametrize(("gpu", "deterministic"), [(False, True), (True, False)])
def test_nothing_is_asked_on_a_cpu_or_by_default(monkeypatch, gpu, deterministic):
    assert settings_of(monkeypatch, gpu=gpu, deterministic=deterministic) == {}
