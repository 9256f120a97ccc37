"""Model folders: what is saved loads in transformers and gives the same logits, in every stage; adapters load in peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.engine import scenes

IDS = torch.arange(3, 12)[None]


class NoTokenizer:
    def save_pretrained(self, folder) -> None:
        pass


def train_and_save(folder: str, tied: bool = False, family: str = "llama", lora: bool = False, max_file_bytes: int = 2**31, **changes):
    from safecl.engine.export import save_model

    config = scenes.run_config(**changes)
    model = scenes.tiny_model(tied, family=family)
    if lora:
        from safecl.engine.model import add_adapters

        model = add_adapters(model, config.model)
    run, task = scenes.make_run(config, model)
    for _ in range(2):
        run.train_step(task)
    save_model(run.engine, NoTokenizer(), Path(folder), max_file_bytes)
    run.engine.deepspeed.eval()
    return run.engine.logits(IDS, None, torch.arange(IDS.shape[1])[None])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_in_transformers_with_the_same_logits(rank_pool, tmp_path, stage, tied):
    import transformers

    logits = rank_pool(2).run(train_and_save, folder=str(tmp_path), tied=tied, memory=None, deepspeed={"stage": stage})[0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS, use_cache=False).logits, logits)


@pytest.mark.parametrize("family", ["mistral", "qwen", "gemma"])
def test_other_families_are_trained_and_saved(rank_pool, tmp_path, family):
    import transformers

    changes = dict(memory=None, deepspeed={"stage": 3})
    logits = rank_pool(2).run(train_and_save, folder=str(tmp_path), family=family, **changes)[0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = loaded(IDS, use_cache=False).logits
    assert (found - logits).norm() <= 1e-6 * logits.norm()


def test_large_models_are_split_into_files_with_an_index(rank_pool, tmp_path):
    import transformers

    (tmp_path / "model-00001-of-00009.safetensors").write_bytes(b"left by an earlier save")
    logits = rank_pool(2).run(train_and_save, folder=str(tmp_path), memory=None, max_file_bytes=20_000, deepspeed={"stage": 3})[0]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS, use_cache=False).logits, logits)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_lora_trains_and_saves_adapters_only(rank_pool, tmp_path, stage):
    import peft

    model = {"path": "unused", "dtype": "fp32", "gradient_checkpointing": False, "lora": {"r": 4, "alpha": 8}}
    changes = dict(model=model, methods={"der": {"alpha": 0.5}, "ema": {"decay": 0.9}}, deepspeed={"stage": stage})
    logits = rank_pool(2).run(train_and_save, folder=str(tmp_path), lora=True, **changes)[0]
    base = scenes.tiny_model().eval()
    start = base(IDS, use_cache=False).logits
    loaded = peft.PeftModel.from_pretrained(scenes.tiny_model(), tmp_path).eval()
    found = loaded(IDS, use_cache=False).logits
    assert (found - logits).norm() <= 1e-6 * logits.norm()
    assert (found - start).norm() > 1e-4 * start.norm()
    assert not list(tmp_path.glob("model*.safetensors"))
