"""`model.path` may be the folder of an adapter, whose base is followed, or a .gguf file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safecl.config import ConfigError, ModelConfig
from safecl.evaluation.answers.model import HFEvalModel
from safecl.storage.model_folder import adapter_base
from tests.engine import scenes

IDS = torch.arange(3, 12)[None]


def save_adapter(folder, base: str, **settings):
    """Save a base and an adapter that changes it; return the logits of the two together."""
    import peft

    model = scenes.tiny_model()
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], **settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return adapted.eval()(IDS).logits.detach()


@pytest.mark.parametrize("base", ["../base", "absolute", "base"])
def test_an_adapter_is_merged_into_its_base_which_is_looked_for_from_its_own_place(tmp_path, monkeypatch, base):
    from safecl.engine.reference.loading import load_model

    expected = save_adapter(tmp_path, str(tmp_path / "base") if base == "absolute" else base)
    if base == "base":
        monkeypatch.chdir(tmp_path)
    else:
        monkeypatch.chdir("/")
    path = str(tmp_path / "adapter")
    model, _ = load_model(ModelConfig(path=path, dtype="fp32", gradient_checkpointing=False))
    found = model(IDS).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    plain = scenes.tiny_model().eval()(IDS).logits
    assert (plain - expected).norm() > 1e-2 * expected.norm()
    measured = HFEvalModel.load(path, device="cpu").model(IDS).logits
    assert (measured - expected).norm() <= 1e-5 * expected.norm()


def test_an_adapter_beside_its_base_in_another_place_is_found_there(tmp_path, monkeypatch):
    save_adapter(tmp_path / "a", "../base")
    shutil.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir("/")
    assert adapter_base(str(tmp_path / "b" / "adapter")) == os.fspath((tmp_path / "b" / "base").resolve())


def test_an_adapter_without_its_base_or_with_a_second_adapter_is_refused(tmp_path):
    from safecl.engine.model.settings import read_model_settings

    save_adapter(tmp_path, "../gone/away")
    with pytest.raises(ConfigError, match=r"its base model \.\./gone/away is not there \(looked for at .*/gone/away"):
        adapter_base(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"model\.lora: .* holds an adapter already"):
        read_model_settings(ModelConfig(path=str(tmp_path / "adapter"), lora={"r": 2}))


def test_a_gguf_file_without_the_package_that_reads_it_is_refused_with_its_name(tmp_path, monkeypatch):
    from safecl.engine.model import settings

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ConfigError, match="needs the package gguf: pip install gguf"):
        settings.read_model_settings(ModelConfig(path=str(tmp_path / "m.gguf")))


@pytest.mark.long
def test_a_gguf_file_is_the_model_that_transformers_loads(tmp_path):
    packages, root = tmp_path / "packages", Path(__file__).parents[3]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), "gguf"]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("pip cannot install gguf")
    environment = os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{root}"}
    subprocess.run([sys.executable, "-m", "tests.engine.model.gguf_file", str(tmp_path)], check=True, env=environment)
