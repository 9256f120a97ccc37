"""Model folders: what is saved loads in transformers and gives the same logits, in every stage; adapters load in
peft."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import scenes

IDS = torch.arange(3, 12)[None]


class NoTokenizer:
    def save_pretrained(self, folder) -> None:
        pass


def train_and_save(
    folder: str, tied: bool = False, family: str = "llama", lora: bool = False, max_file_bytes: int = 2**31, **changes
):
    from safecl.engine.checkpoint.model_export import save_model

    config = scenes.run_config(**changes)
    model = scenes.tiny_model(tied, family=family)
    if lora:
        from safecl.engine.model.adapters import add_adapters

        model = add_adapters(model, config.model)
    run, task = scenes.make_run(config, model)
    for _ in range(2):
        run.train_step(task)
    exported = save_model(run.engine, NoTokenizer(), Path(folder), max_file_bytes)
    assert exported.num_bytes == sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    run.engine.deepspeed.eval()
    return run.engine.logits(IDS, None, torch.arange(IDS.shape[1])[None])


def fail_while_saving(folder: str, fault: str, **changes) -> str:
    """Saves a model once, then once more with a fault on the way; returns the message."""
    from safecl.engine.checkpoint import model_export
    from safecl.storage import durable

    run, _ = scenes.make_run(scenes.run_config(**changes), scenes.tiny_model())
    model_export.save_model(run.engine, NoTokenizer(), Path(folder))
    run.engine.shards.flats[0].detach().view(-1)[:7] += 1
    run.engine.shards.publish()
    write_all, calls = durable._write_all, []

    def write(file, block):
        calls.append(1)
        if len(calls) == 6 and fault == "disk full":
            raise OSError(28, "No space left on device")
        if len(calls) == 6 and fault == "wrong byte on the disk":
            block = bytes([block[0] ^ 1]) + bytes(block[1:])
        write_all(file, memoryview(block))

    with mock.patch.object(durable, "_write_all", write):
        try:
            model_export.save_model(run.engine, NoTokenizer(), Path(folder))
        except model_export.ExportFailed as failed:
            return str(failed)
    return ""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_in_transformers_with_the_same_logits(rank_pool, tmp_path, stage, tied):
    import transformers

    logits = rank_pool(2).run(
        train_and_save, folder=str(tmp_path / "model"), tied=tied, memory=None, deepspeed={"stage": stage}
    )[0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(IDS, use_cache=False).logits, logits)


@pytest.mark.parametrize("family", ["mistral", "qwen", "gemma"])
def test_other_families_are_trained_and_saved(rank_pool, tmp_path, family):
    import transformers

    changes = dict(memory=None, deepspeed={"stage": 3})
    logits = rank_pool(2).run(train_and_save, folder=str(tmp_path / "model"), family=family, **changes)[0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    found = loaded(IDS, use_cache=False).logits
    assert (found - logits).norm() <= 1e-6 * logits.norm()


def test_large_models_are_split_into_files_with_an_index(rank_pool, tmp_path):
    import transformers

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"left by an earlier save")
    logits = rank_pool(2).run(
        train_and_save, folder=str(tmp_path / "model"), memory=None, max_file_bytes=20_000, deepspeed={"stage": 3}
    )[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(IDS, use_cache=False).logits, logits)


@pytest.mark.parametrize(
    ("fault", "told"),
    [("disk full", "No space left on device"), ("wrong byte on the disk", "its bytes are not those that were written")],
)
def test_a_model_that_cannot_be_written_as_it_is_leaves_the_older_folder_and_a_message_on_every_rank(
    rank_pool, tmp_path, fault, told
):
    folder = tmp_path / "model"
    messages = rank_pool(2).run(fail_while_saving, folder=str(folder), fault=fault, memory=None, deepspeed={"stage": 3})
    assert all("the model could not be saved" in message and told in message for message in messages)
    start = scenes.tiny_model().state_dict()
    assert all(torch.equal(value, start[name]) for name, value in load_file(folder / "model.safetensors").items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_lora_trains_and_saves_adapters_only(rank_pool, tmp_path, stage):
    import peft

    model = {"path": "unused", "dtype": "fp32", "gradient_checkpointing": False, "lora": {"r": 4, "alpha": 8}}
    changes = dict(model=model, methods={"der": {"alpha": 0.5}, "ema": {"decay": 0.9}}, deepspeed={"stage": stage})
    logits = rank_pool(2).run(train_and_save, folder=str(tmp_path / "model"), lora=True, **changes)[0]
    base = scenes.tiny_model().eval()
    start = base(IDS, use_cache=False).logits
    loaded = peft.PeftModel.from_pretrained(scenes.tiny_model(), tmp_path / "model").eval()
    found = loaded(IDS, use_cache=False).logits
    assert (found - logits).norm() <= 1e-6 * logits.norm()
    assert (found - start).norm() > 1e-4 * start.norm()
    assert not list((tmp_path / "model").glob("model*.safetensors"))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["embed_tokens"], ["v_proj", "lm_head"]])
def test_adapters_of_embedding_and_head_are_saved_and_load_in_peft(rank_pool, tmp_path, stage, targets):
    import peft

    lora = {"r": 2, "alpha": 8, "target_modules": targets}
    model = {"path": "unused", "dtype": "fp32", "gradient_checkpointing": False, "lora": lora}
    changes = dict(model=model, memory=None, deepspeed={"stage": stage})
    logits = rank_pool(2).run(train_and_save, folder=str(tmp_path / "model"), lora=True, **changes)[0]
    loaded = peft.PeftModel.from_pretrained(scenes.tiny_model(), tmp_path / "model").eval()
    found = loaded(IDS, use_cache=False).logits
    assert (found - logits).norm() <= 1e-6 * logits.norm()
    names = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert names and all("lora_" in name for name in names)


REMOTE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n"
    "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n",
    "parts_own.py": "from transformers import LlamaForCausalLM as Base\n",
    "modeling_own.py": "from .configuration_own import OwnConfig\nfrom .parts_own import Base\n\n"
    "class OwnForCausalLM(Base):\n    config_class = OwnConfig\n",
}


def test_a_model_with_code_of_its_own_is_saved_with_that_code_and_the_settings_of_its_base(tmp_path):
    import transformers

    from safecl.config import ModelConfig
    from safecl.engine.checkpoint.model_settings import save_settings
    from safecl.engine.reference.loading import load_model

    base, folder = tmp_path / "base", tmp_path / "model"
    scenes.tiny_model().save_pretrained(base)
    for name, text in REMOTE.items():
        (base / name).write_text(text)
    settings = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own = {"model_type": "own", "auto_map": names, "architectures": ["OwnForCausalLM"]}
    (base / "config.json").write_text(json.dumps(settings | own))
    model, _ = load_model(
        ModelConfig(path=str(base), dtype="fp32", gradient_checkpointing=False, trust_remote_code=True)
    )
    folder.mkdir()
    save_settings(model, folder)
    assert {path.name for path in folder.glob("*.py")} == set(REMOTE)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["use_cache"] is settings["use_cache"] is True
    assert saved["auto_map"] == names and saved["rope_theta"] == settings["rope_parameters"]["rope_theta"]
    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(found(IDS).logits, model(IDS).logits)
