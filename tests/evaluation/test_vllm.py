"""Answers of a vLLM server in the place of the engine's own; a stand-in speaks its interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from safecl.config import ConfigError, VllmConfig
from safecl.evaluation import HFEvalModel, evaluate_target
from safecl.evaluation.answers.generate import generate_greedy
from safecl.evaluation.serving import server
from safecl.evaluation.serving.client import complete
from safecl.evaluation.serving.server import ServerFailed, serving, vllm_program
from tests.evaluation import vllm_stand_in
from tests.evaluation.models import random_prompts, tiny_model
from tests.evaluation.test_standalone import place  # noqa: F401  (a fixture)

ENDS = list(range(3, 12))


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """The stand-in on the PATH."""
    folder = vllm_stand_in.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny_model(seed=7).save_pretrained(folder)
    return folder


def test_the_server_answers_as_the_engine_does(vllm, folder, tmp_path, monkeypatch):
    """Answers of different lengths, tokens that are forbidden everywhere, and at the beginning only."""
    monkeypatch.setenv("RANK", "0")
    model = HFEvalModel(tiny_model(seed=7))
    prompts = random_prompts(9, seed=3)
    common = {"eos_ids": ENDS, "batch_size": 4}
    with serving(folder, VllmConfig(), tmp_path / "vllm.log") as address:
        free = complete(address, prompts, [6] * 9, **common)
        first = sorted({answer[0] for answer in free if answer})[:2]
        seen = sorted({token for answer in free for token in answer[1:]})[:2]
        for never, never_first in (((), ()), (seen, ()), (seen, first)):
            options = {"never": never, "never_first": never_first}
            expected = generate_greedy(model, prompts, max_new_tokens=6, pad_id=0, **common, **options)
            assert complete(address, prompts, [6] * 9, **common, **options) == expected
        assert len({len(answer) for answer in expected}) > 2 and expected != free
        rooms = [1, 2, 3, 4, 5, 6, 1, 2, 3]
        shorter = [answer[:room] for answer, room in zip(free, rooms, strict=True)]
        assert complete(address, prompts, rooms, **common) == shorter


def test_a_measurement_has_the_same_records_and_the_server_ends_with_it(vllm, place, tmp_path):  # noqa: F811
    own, served = (
        evaluate_target(place / "run.yaml", [f"output={tmp_path / name}", f"safety.backend={name}"])
        for name in ("model", "vllm")
    )
    assert served.evaluation.to_dict() == own.evaluation.to_dict()
    assert served.evaluation.safety.outputs == own.evaluation.safety.outputs
    assert (tmp_path / "vllm" / "eval" / "logs" / "vllm.log").is_file()
    assert not _servers(tmp_path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dies", "vllm ended with 1: ValueError: no available memory"),
        ("old", "safecl needs vllm 0.10.2 or newer"),
        ("refuses", "vllm refused a request with 400: .*maximum context length"),
    ],
)
def test_a_server_that_fails_is_named_with_what_it_said(vllm, folder, tmp_path, fault, words):
    settings = VllmConfig(arguments=["--fault", fault])
    with pytest.raises(ServerFailed, match=words), serving(folder, settings, tmp_path / "vllm.log") as address:
        complete(address, [[5, 6]], [3], eos_ids=ENDS, batch_size=4)
    assert not _servers(tmp_path)


def test_a_server_that_does_not_start_in_time_is_ended(vllm, folder, tmp_path):
    with pytest.raises(ServerFailed, match="not ready after 0 s"):
        with serving(folder, VllmConfig(start_timeout=0.01), tmp_path / "vllm.log"):
            raise AssertionError("it cannot be ready yet")
    assert not _servers(tmp_path)


def test_the_server_ends_when_its_parent_is_killed(vllm, folder, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from safecl.config import VllmConfig\n"
        "from safecl.evaluation.serving.server import serving\n"
        f"with serving({str(folder)!r}, VllmConfig(), Path({str(tmp_path / 'vllm.log')!r})) as address:\n"
        "    print('ready', flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n" and _servers(tmp_path)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _servers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _servers(tmp_path)


def test_without_the_program_the_config_is_refused_before_a_model_is_loaded(place, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(HFEvalModel, "load", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        evaluate_target(place / "run.yaml", [f"output={tmp_path}", "safety.backend=vllm"])
    with pytest.raises(ConfigError, match="pip install vllm"):
        vllm_program()


def test_an_adapter_is_served_on_its_base(tmp_path, folder, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": str(folder)}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert server._model(tmp_path) == [
        str(folder), "--enable-lora", "--max-lora-rank", "4", "--lora-modules", f"model={tmp_path}",
    ]  # fmt: skip


def _servers(folder) -> list[str]:
    """Command lines of the stand-ins that live and were installed in this folder."""
    found = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if f"{folder}/bin/vllm serve" in line]
