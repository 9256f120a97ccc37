"""Broken and hostile folders: each is named in one message, and nothing is written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safecl.config import ConfigError
from safecl.merging import kinds, merge
from safecl.merging.registry import kind_module
from safecl.storage import durable
from tests.merging import models
from tests.merging.test_fitting import rewrite, set_keys

NORM = "model.layers.1.input_layernorm.weight"
INDEX = "model.safetensors.index.json"


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def with_header(folder: Path, change: Callable[[dict], None] | None = None, length: int | None = None) -> None:
    """Write a file's header again; the data stays."""
    file = first_file(folder)
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :])


def entry(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


def with_value(folder: Path, value: float) -> None:
    def change(state):
        state[NORM][3] = value

    rewrite(folder, change)


def in_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def reshaped(state: dict) -> None:
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(46, 32, dtype=torch.bfloat16)


def without_weights(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def outside(folder: Path) -> None:
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").symlink_to(secret)


def nested(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def as_file(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.write_text("no folder")


def adapter(folder: Path, tensors: dict | None = None, **settings) -> None:
    """Make the folder an LoRA adapter of the base beside it."""
    for file in folder.iterdir():
        file.unlink()
    wanted = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(folder.parent / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(wanted | settings))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")


def factors(module: str, out: int = 32, given: str = "AB", rank: int = 2) -> dict:
    shapes = {"A": (rank, 32), "B": (out, rank)}
    return {f"base_model.model.{module}.lora_{x}.weight": torch.ones(shapes[x]) for x in given}


QUERY = "model.layers.0.self_attn.q_proj"

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), r"{f}: no such folder"),
    "a file": (as_file, r"{f}: is a file; a merge reads the folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"{f}/config.json: No such file"),
    "config without JSON": (lambda f: (f / "config.json").write_text("{"), r"{f}/config.json: is not JSON"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"{f}/config.json: is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), r"{f}/config.json: holds no JSON object"),
    "config nested deeply": (nested, r"{f}/config.json: is not JSON"),
    "config too long": (
        lambda f: (f / "config.json").write_text(" " * (16 * 2**20 + 1)),
        r"{f}/config.json: 16,777,217 bytes long, which no settings are",
    ),
    "no weights": (without_weights, r"{f}: holds no weights: no model.safetensors and no model.safetensors.index"),
    "pickled": (pickled, r"{f}/pytorch_model.bin: weights in torch's pickle format are not read"),
    "truncated": (
        lambda f: os.truncate(first_file(f), 20_000),
        r"{f}/model-00001\S+ 20,000 bytes long, its tensors end",
    ),
    "empty file": (lambda f: os.truncate(first_file(f), 0), r"{f}/model-00001\S+ not a safetensors file"),
    "giant header": (lambda f: with_header(f, length=2**62), r"{f}/model-00001\S+ not a safetensors file"),
    "header without JSON": (lambda f: with_header(f, length=30), r"{f}/model-00001\S+ its header cannot be read"),
    "overlap": (
        lambda f: with_header(f, lambda h: entry(h).update(data_offsets=[0, 4], shape=[2], dtype="BF16")),
        r"{f}/model-00001\S+ its tensors leave a gap or overlap",
    ),
    "negative shape": (
        lambda f: with_header(f, lambda h: entry(h).update(shape=[-1, -1])),
        r"{f}/model-00001\S+ its header cannot be read",
    ),
    "eight bits": (
        lambda f: with_header(f, lambda h: entry(h).update(dtype="F8_E4M3")),
        r"{f}/model-00001\S+ .*its dtype F8_E4M3 is none of",
    ),
    "index out of the folder": (
        lambda f: in_index(f, lambda i: i["weight_map"].update({NORM: "../base/model.safetensors"})),
        rf"{{f}}/{INDEX}: places {NORM} in '../base/model.safetensors', which is no file of the folder",
    ),
    "index names a missing file": (
        lambda f: in_index(f, lambda i: i["weight_map"].update({NORM: "model-9.safetensors"})),
        rf"{{f}}/{INDEX}: names model-9.safetensors, which is not there",
    ),
    "index names a missing tensor": (
        lambda f: in_index(f, lambda i: i["weight_map"].update(x=first_file(f).name)),
        rf"{{f}}/{INDEX}: places x in model-00001\S+, which does not hold it",
    ),
    "index without a tensor": (
        lambda f: in_index(f, lambda i: i["weight_map"].pop(NORM)),
        rf"{{f}}/model-\S+: holds {NORM}, which {INDEX} does not name",
    ),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), rf"{{f}}/{INDEX}: has no weight_map"),
    "not a number": (lambda f: with_value(f, float("nan")), rf"tuned .*: {NORM} holds values that are not finite"),
    "infinite": (lambda f: with_value(f, float("inf")), rf"tuned .*: {NORM} holds values that are not finite"),
    "integers": (
        lambda f: rewrite(f, lambda s: s.update({NORM: torch.zeros(32, dtype=torch.int8)})),
        rf"{NORM} holds no floating-point numbers",
    ),
    "a tensor less": (lambda f: rewrite(f, lambda s: s.pop(NORM)), rf"base .*: has the tensor {NORM}, which tuned"),
    "a tensor more": (
        lambda f: rewrite(f, lambda s: s.update({"model.extra.weight": torch.zeros(3)})),
        r"base .*: has no tensor model.extra.weight",
    ),
    "another shape": (
        lambda f: rewrite(f, reshaped),
        r"base .*: model.layers.0.mlp.up_proj.weight has shape \[44, 32\], that of tuned .* has \[46, 32\]",
    ),
    "another family": (
        lambda f: set_keys(f, model_type="mistral"),
        r"base .*: model_type is llama in its config.json and mistral in that of tuned",
    ),
    "other heads": (
        lambda f: set_keys(f, num_attention_heads=2),
        r"num_attention_heads is 4 .* and 2 in that of tuned",
    ),
    "another rotary base": (
        lambda f: set_keys(f, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        r"rope_theta is 10000.0 in its config.json and 1000000.0 in that of tuned",
    ),
    "quantised": (
        lambda f: set_keys(f, quantization_config={"quant_method": "gptq"}),
        r"{f}/config.json: the weights are quantised \(gptq\)",
    ),
    "a link out of the folder": (outside, r"{f}/special_tokens_map.json: is a link to .*secret.json, outside of"),
    "a broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("[]"),
        r"{f}/tokenizer.json: is not a tokenizer",
    ),
    "an adapter without weights": (lambda f: adapter(f), r"{f}/adapter_model.safetensors: no such file"),
    "an adapter without a base": (
        lambda f: adapter(f, {}, base_model_name_or_path="./nowhere"),
        r"{f}/adapter_config.json: its base model ./nowhere is not there",
    ),
    "an adapter of itself": (
        lambda f: adapter(f, {}, base_model_name_or_path=str(f)),
        r"tuned .*: an adapter of an adapter",
    ),
    "an adapter of another type": (lambda f: adapter(f, {}, peft_type="IA3"), r"an adapter of the type IA3"),
    "DoRA": (lambda f: adapter(f, {}, use_dora=True), r"{f}/adapter_config.json: uses DoRA"),
    "an adapter of nothing": (
        lambda f: adapter(f, factors("model.layers.9.mlp")),
        r"tuned .*: model.layers.9.mlp is for model.layers.9.mlp.weight, which the base .* does not have",
    ),
    "half an adapter": (
        lambda f: adapter(f, factors(QUERY, given="A")),
        rf"the adapter of {QUERY} has only A of A and B",
    ),
    "an adapter of another shape": (
        lambda f: adapter(f, factors(QUERY, out=48)),
        rf"the adapter of {QUERY}.weight has factors \[2, 32\] and \[48, 2\], the weight is \[32, 32\]",
    ),
    "an adapter of another rank": (
        lambda f: adapter(f, factors(QUERY, rank=3)),
        rf"the adapter of {QUERY} has rank 3, its settings say 2",
    ),
    "an adapter that is not finite": (
        lambda f: adapter(f, {name: value / 0 for name, value in factors(QUERY).items()}),
        r"tuned .*lora_A.weight holds values that are not finite",
    ),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_folder_is_named_and_nothing_is_written(parents, what, tmp_path):
    damage, message = BROKEN[what]
    base, tuned = (models.copy(parents()[name], tmp_path / name) for name in ("base", "tuned"))
    damage(tuned)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message.replace("{f}", str(tuned))) as error:
        merge("wise_ft", base=base, tuned=tuned, out=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_no_model_is_named_as_such_also_where_the_result_lies_in_it(parents, tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config.json: No such file"):
        merge("wise_ft", base=parents()["base"], tuned=tmp_path, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_changes_while_it_is_merged_is_named(parents, tmp_path, monkeypatch):
    base = models.copy(parents()["base"], tmp_path / "base")

    def at(point: str) -> None:
        if point == "config.json: written":
            first_file(base).touch()

    monkeypatch.setattr(durable, "at", at)
    with pytest.raises(ConfigError, match=r"base/model-00001\S+: was changed since"):
        merge("wise_ft", base=base, tuned=parents()["tuned"], out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_result_that_overflows_is_named(parents, tmp_path):
    folders = parents()
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight: the merged values are beyond 65,504"):
        merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", alpha=1e6, dtype="fp16")
    tuned = models.copy(folders["tuned"], tmp_path / "tuned")
    with_value(tuned, 3e38)
    with pytest.raises(ConfigError, match=rf"{NORM}: the merged values are not finite"):
        merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out", alpha=2)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_a_full_disk_leaves_nothing(parents, tmp_path, monkeypatch):
    folders = parents()

    def at(point: str) -> None:
        if point == "model.safetensors: partly written":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "at", at)
    with pytest.raises(OSError, match="No space left"):
        merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


NEEDS = {
    "wise_ft needs the base model: --base": ("wise_ft", {"tuned": ["tuned"]}),
    "wise_ft needs a tuned model, and got 0": ("wise_ft", {"base": "base"}),
    "wise_ft takes 1 tuned model, and got 2": ("wise_ft", {"base": "base", "tuned": ["tuned", "tuned2"]}),
    "soup has no use for a model in the role --base": ("soup", {"base": "base", "tuned": ["tuned", "tuned2"]}),
    "soup needs 2 tuned models or more, and got 1": ("soup", {"tuned": ["tuned"]}),
    "wise_ft has no use for a model in the role --aligned": (
        "wise_ft",
        {"base": "base", "tuned": ["tuned"], "aligned": "tuned2"},
    ),
    "linear needs two models or more": ("linear", {"tuned": ["tuned"]}),
    "slerp takes two models": ("slerp", {"base": "base", "tuned": ["tuned", "tuned2"]}),
    "ties.weights: 1 values for 2 models": ("ties", {"base": "base", "tuned": ["tuned", "tuned2"], "weights": [1]}),
    "wise_ft has no use for --data": ("wise_ft", {"base": "base", "tuned": ["tuned"], "data": "rows.jsonl"}),
    "fisher_average.fisher: 1 values for 2 models": (
        "fisher_average",
        {"tuned": ["tuned", "tuned2"], "fisher": ["f.safetensors"]},
    ),
    "post_hoc_ema.steps: the folder tuned has no number": ("post_hoc_ema", {"tuned": ["tuned", "tuned2"]}),
    "no merge is called `tise`; did you mean `ties`": ("tise", {}),
    "wise_ft: unknown key `aplha`; did you mean `alpha`": ("wise_ft", {"aplha": 1}),
    "no pattern of 0-1 matches model.embed_tokens.weight": (
        "wise_ft",
        {"base": "base", "tuned": ["tuned"], "alpha": {"0-1": 0.5}},
    ),
}


@pytest.mark.parametrize("message", list(NEEDS))
def test_what_a_kind_needs_and_did_not_get_is_named(parents, message, tmp_path):
    kind, given = NEEDS[message]
    folders = parents()
    paths = {key: value for key, value in given.items() if key in ("base", "aligned", "tuned")}
    paths = {key: [folders[n] for n in v] if isinstance(v, list) else folders[v] for key, v in paths.items()}
    with pytest.raises(ConfigError) as error:
        merge(kind, **{**given, **paths}, out=tmp_path / "out")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def missing() -> list[tuple[str, str]]:
    """Each kind with each thing that it needs: a base, an aligned model, a tuned one, rows."""
    found = []
    for kind in kinds():
        needs = kind_module(kind).Config.needs
        found += [(kind, role) for role in ("base", "aligned") if getattr(needs, role) == "yes"]
        found += [(kind, "tuned")] + [(kind, "data")] * (bool(needs.data) and not needs.data_optional)
    return found


@pytest.mark.parametrize(("kind", "role"), missing())
def test_every_kind_names_what_it_needs_where_that_is_left_out(parents, kind, role, tmp_path):
    needs, folders = kind_module(kind).Config.needs, parents()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "How?", "response": "No."}) + "\n")
    given = {"base": folders["base"], "aligned": folders["tuned2"], "tuned": [folders["tuned"], folders["tuned2"]]}
    given = {name: path for name, path in given.items() if name == "tuned" or getattr(needs, name) == "yes"}
    given["tuned"] = given["tuned"][: max(1, needs.fewest)]
    given |= {"data": rows} if needs.data and not needs.data_optional else {}
    given |= {"tuned": given["tuned"][: needs.fewest - 1]} if role == "tuned" else {role: None}
    wanted = {"tuned": "needs a tuned model|needs 2 tuned models or more", "data": "needs rows: --data FILE"}
    files = {"fisher": "f.safetensors", "harmful_fisher": "h.safetensors"}
    files = files if kind == "ssd" else {"fisher": ["f.safetensors"]} if kind == "fisher_average" else {}
    with pytest.raises(ConfigError, match=f"{kind} ({wanted.get(role, f'needs the {role} model: --{role}')})"):
        merge(kind, **given, **files, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [rows]
