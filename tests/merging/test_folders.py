"""Merged folders: names, dtypes, files, settings, cards, memory, and whole or absent."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from safecl.config import ConfigError
from safecl.merging import merge
from safecl.merging.memory import memory_bound
from safecl.merging.registry import kind_module
from safecl.storage import durable
from safecl.storage.sizes import give_back_freed_memory
from tests.merging import models

FAMILIES = list(models.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_point_on_the_line_is_right_to_the_last_place_and_transformers_loads_it(parents, family, tmp_path):
    folders = parents(family)
    assert len(list(folders["base"].glob("*.safetensors"))) == 3
    report = merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", alpha=0.3)
    base, tuned = models.exact(folders["base"]), models.exact(folders["tuned"])
    expected = {name: 0.7 * base[name] + 0.3 * tuned[name] for name in base}
    found = models.state(tmp_path / "out")
    models.assert_rounded(found, expected)
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    assert report.num_tensors == len(base)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own = loaded.state_dict()
    in_memory = {"embed_out.weight": "lm_head.weight"} if family == "neox" else {}
    assert all(torch.equal(own[in_memory.get(name, name)], value) for name, value in found.items())


def test_a_merge_has_the_settings_the_tokenizer_the_template_and_the_generation_config_of_the_tuned_model(
    parents, tmp_path
):
    folders = parents()
    tuned = models.copy(folders["tuned"], tmp_path / "tuned")
    (tuned / "generation_config.json").write_text('{"max_new_tokens": 17}')
    (tuned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (tuned / "LICENSE").write_text("of this model")
    (tuned / "training_args.bin").write_bytes(b"not for the result")
    merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out")
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes(), name
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def test_code_of_the_models_own_is_copied_where_config_json_names_it(parents, tmp_path):
    folders = parents()
    tuned = models.copy(folders["tuned"], tmp_path / "tuned")
    (tuned / "modeling_own.py").write_text("class Own: ...\n")
    merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "plain")
    assert not (tmp_path / "plain" / "modeling_own.py").exists()
    own = models.settings(tuned) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (tuned / "config.json").write_text(json.dumps(own))
    merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out")
    assert (tmp_path / "out" / "modeling_own.py").read_text() == "class Own: ...\n"


def test_the_card_names_the_parents_with_hashes_that_tell_one_changed_weight(parents, tmp_path):
    folders = parents()
    report = merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert [parent.role for parent in report.parents] == ["base", "tuned"]
    assert all(parent.xxh3_128 in card for parent in report.parents)
    changed = models.copy(folders["base"], tmp_path / "base")
    file = min(changed.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    again = merge("wise_ft", base=changed, tuned=folders["tuned"], out=tmp_path / "again")
    assert again.parents[0].xxh3_128 != report.parents[0].xxh3_128
    assert again.parents[1].xxh3_128 == report.parents[1].xxh3_128


def test_the_hash_of_a_parent_is_the_one_that_a_run_gives_its_base_model(parents, tmp_path):
    from safecl.engine.model.structure import empty_model
    from safecl.engine.reference.layout import Layout
    from safecl.engine.reference.sources import find_weights

    folders = parents()
    report = merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out")
    model = empty_model(str(folders["base"]), torch.bfloat16)
    reader = find_weights(str(folders["base"]), Layout.of(model, torch.bfloat16), model)
    assert report.parents[0].xxh3_128 == reader.digest()


@pytest.mark.parametrize(("dtype", "wanted"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_the_result_has_the_dtype_that_was_asked_for(parents, dtype, wanted, tmp_path):
    folders = parents()
    merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", dtype=dtype)
    base, tuned = models.exact(folders["base"]), models.exact(folders["tuned"])
    found = models.state(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {wanted}
    models.assert_rounded(found, {name: 0.5 * base[name] + 0.5 * tuned[name] for name in base})
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == wanted


def test_files_have_at_most_the_size_that_was_asked_for(parents, tmp_path):
    folders = parents()
    report = merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", max_file_bytes=20_000)
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert report.num_files == len(files) > 3
    assert all(file.stat().st_size < 24_000 for file in files)
    assert models.state(tmp_path / "out").keys() == models.state(folders["tuned"]).keys()


# ---------------------------------------------------------------------------------------------------- whole or absent

KILLED = """
import os, signal, sys
import torch
from safecl.merging import merge
from safecl.storage import durable
from safecl.storage.sizes import give_back_freed_memory

torch.set_num_threads(1)
base, tuned, out, *numbers = sys.argv[1:]

def kill_at(number):
    seen = [0]
    def at(point):
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
    durable.at = at
    merge("wise_ft", base=base, tuned=tuned, out=out, max_file_bytes=30_000)

import safecl.merging.run
for number in map(int, numbers):
    if (child := os.fork()) == 0:
        kill_at(number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not os.path.exists(out), number
"""


def test_a_killed_merge_leaves_nothing_that_looks_whole_and_the_next_one_reuses_nothing(parents, tmp_path, monkeypatch):
    folders, out = parents(), tmp_path / "out"
    arguments = dict(base=folders["base"], tuned=folders["tuned"], max_file_bytes=30_000)
    points: list[str] = []
    monkeypatch.setattr(durable, "at", points.append)
    merge("wise_ft", out=tmp_path / "whole", **arguments)
    monkeypatch.setattr(durable, "at", lambda point: None)
    expected = contents(tmp_path / "whole")
    numbers = [*range(1, points.index("before the rename") + 2, 3), points.index("before the rename") + 1]
    subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, (folders["base"], folders["tuned"], out, *numbers))], check=True
    )
    assert (tmp_path / ".out.partial" / "config.json").is_file()
    (tmp_path / ".out.partial" / "config.json").write_text("half-writ")
    (tmp_path / ".out.partial" / "stale.safetensors").write_text("of another merge")
    merge("wise_ft", out=out, **arguments)
    assert contents(out) == expected
    assert not (tmp_path / ".out.partial").exists()


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files; the card names the folder, and is left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_two_merges_into_one_folder_do_not_mix(parents, tmp_path, monkeypatch):
    folders = parents()

    def at(point: str) -> None:
        if point == "before the rename":
            monkeypatch.setattr(durable, "at", lambda point: None)
            with pytest.raises(ConfigError, match="out: another process is merging into it right now"):
                merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", alpha=0.9)

    monkeypatch.setattr(durable, "at", at)
    merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", alpha=1.0)
    assert contents(tmp_path / "out")["config.json"]
    tuned = models.state(folders["tuned"])
    assert all(torch.equal(value, tuned[name]) for name, value in models.state(tmp_path / "out").items())


@pytest.mark.parametrize("where", ["there", "in a parent", "a parent"])
def test_an_existing_folder_and_those_of_the_parents_are_never_written_to(parents, where, tmp_path):
    folders = parents()
    out = {"there": tmp_path / "there", "in a parent": folders["base"] / "merged", "a parent": folders["tuned"]}[where]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    before = sorted(folders["base"].iterdir())
    with pytest.raises(ConfigError, match="is there already" if where == "there" else "lies in the folder of a model"):
        merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=out)
    assert sorted(folders["base"].iterdir()) == before
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------------------------------- memory


def peak_growth(work) -> int:
    """Bytes by which the process grows at most while it works."""
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


LARGEST = 16_000 * 512  # elements of the embedding: 33 MB in fp32


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Folders of a base and two tuned models with a large embedding."""
    config = transformers.LlamaConfig(
        vocab_size=16_000, hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    root, model = tmp_path_factory.mktemp("wide"), transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name in ("base", "tuned", "tuned2"):
        model.save_pretrained(root / name)
        for p in model.parameters():
            p.data.mul_(1.5)
    return root


KINDS = {
    "wise_ft": (1, {}),
    "magmax": (2, {}),
    "slerp": (1, {}),
    "ties": (2, {}),
    "ties over the model": (2, {"scope": "model"}),
    "dare_ties": (2, {}),
    "bang": (2, {}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_merge_holds_two_of_the_largest_tensors_per_parent_or_a_few_pieces(wide, kind, tmp_path):
    (num_tuned, settings), kind = KINDS[kind], kind.split()[0]
    parents = {"base": wide / "base", "tuned": [wide / "tuned", wide / "tuned2"][:num_tuned]}
    by_rows = kind_module(kind).Merge.by_rows
    merge(kind, **parents, out=tmp_path / "first", **settings)  # loads the libraries
    grown = peak_growth(lambda: merge(kind, **parents, out=tmp_path / "out", **settings))
    assert grown <= memory_bound(1 + num_tuned, LARGEST, by_rows)
    assert by_rows or grown > num_tuned * 4 * LARGEST


def test_a_merge_by_rows_takes_less_memory_than_one_of_whole_tensors(wide, tmp_path, monkeypatch):
    from safecl.merging.averages import wise_ft

    monkeypatch.setattr(wise_ft.Merge, "by_rows", False)
    parents = {"base": wide / "base", "tuned": wide / "tuned"}
    merge("wise_ft", **parents, out=tmp_path / "first")
    grown = [peak_growth(partial(merge, "wise_ft", **parents, out=tmp_path / f"out{i}")) for i in range(3)]
    assert max(grown) > memory_bound(2, LARGEST, True)  # beside other processes the system counts fewer pages at times
