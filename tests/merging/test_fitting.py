"""Models that differ in ways that can be aligned: padded vocabularies, added tokens, tied heads, names, buffers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safecl.config import ConfigError
from safecl.merging import merge
from tests.merging import models


def rewrite(folder: Path, change) -> None:
    """Write a folder's weights again in one file, after `change(state)`."""
    state = models.state(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def set_keys(folder: Path, **values) -> None:
    (folder / "config.json").write_text(json.dumps(models.settings(folder) | values))


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_rows(folder: Path, rows: int) -> None:
    """Give embedding and head another number of rows; further ones hold 9."""

    def change(state):
        for name in (EMBEDDING, HEAD):
            longer = torch.full((rows, state[name].shape[1]), 9.0, dtype=state[name].dtype)
            longer[: min(rows, len(state[name]))] = state[name][:rows]
            state[name] = longer

    rewrite(folder, change)
    set_keys(folder, vocab_size=rows)


@pytest.mark.parametrize("rows", [320, 280])
def test_the_result_has_the_rows_of_the_tuned_model_and_a_missing_row_stays_as_it_is_there(parents, rows, tmp_path):
    folders = parents()
    base, tuned = folders["base"], models.copy(folders["tuned"], tmp_path / "tuned")
    with_rows(tuned, rows)
    report = merge("wise_ft", base=base, tuned=tuned, out=tmp_path / "out", alpha=0.25)
    old, new, found = models.exact(base), models.exact(tuned), models.exact(tmp_path / "out")
    assert found[EMBEDDING].shape[0] == found[HEAD].shape[0] == models.settings(tmp_path / "out")["vocab_size"] == rows
    common = min(rows, len(old[EMBEDDING]))
    expected = 0.75 * old[EMBEDDING][:common] + 0.25 * new[EMBEDDING][:common]
    models.assert_rounded({"x": found[EMBEDDING][:common].bfloat16()}, {"x": expected})
    assert bool((found[EMBEDDING][common:] == 9).all())
    kind = "the others are those of tuned" if rows > common else "are padding and left out"
    assert any(EMBEDDING in note and kind in note for note in report.notes)


def test_added_tokens_of_the_tuned_model_stay_and_those_of_another_model_are_not_lost_silently(parents, tmp_path):
    folders = parents()
    tuned = models.copy(folders["tuned"], tmp_path / "tuned")
    with_rows(tuned, 292)
    tokenizer = json.loads((tuned / "tokenizer.json").read_text())
    place = max(token["id"] for token in tokenizer["added_tokens"])
    last = max(place, *tokenizer["model"]["vocab"].values()) + 1
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": last, "content": "<|tool|>"})
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer))
    merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out")
    assert "<|tool|>" in (tmp_path / "out" / "tokenizer.json").read_text()
    with pytest.raises(ConfigError, match=r"tuned 2 .*has 1 token that tuned .* does not have, first '<\|tool\|>'"):
        merge("soup", tuned=[folders["tuned"], tuned], out=tmp_path / "other")


def test_vocabularies_of_another_size_without_tokenizers_are_refused(parents, tmp_path):
    folders = parents()
    tuned = models.copy(folders["tuned"], tmp_path / "tuned")
    with_rows(tuned, 320)
    (tuned / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"a vocabulary of 288 rows, that of tuned .* has 320, and tuned .* no tokenizer"
    ):
        merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out")


def test_a_tokenizer_that_gives_an_id_to_another_token_is_refused_or_ignored(parents, tmp_path):
    folders = parents()
    tuned = models.copy(folders["tuned"], tmp_path / "tuned")
    tokenizer = json.loads((tuned / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ConfigError, match=r"base .*its tokenizer is another.*id \d+ is 'A' there and 'B' in .*, and 1 more"
    ):
        merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out")
    merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out", same_tokens=False)


@pytest.mark.parametrize("stored_by", ["base", "tuned", "both"])
def test_a_tied_head_that_is_stored_as_well_is_merged_once(parents, stored_by, tmp_path):
    folders = {name: models.copy(path, tmp_path / name) for name, path in parents("gemma").items()}
    assert HEAD not in models.state(folders["base"])
    for name in ("base", "tuned"):
        if stored_by in (name, "both"):
            rewrite(folders[name], lambda state: state.update({HEAD: state[EMBEDDING].clone()}))
    merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out")
    found = models.state(tmp_path / "out")
    assert HEAD not in found
    plain = merge("wise_ft", base=parents("gemma")["base"], tuned=parents("gemma")["tuned"], out=tmp_path / "plain")
    assert all(torch.equal(value, found[name]) for name, value in models.state(tmp_path / "plain").items())
    assert plain.num_tensors == len(found)


@pytest.mark.parametrize("untied", ["base", "tuned"])
def test_a_head_that_one_model_has_apart_from_the_embedding_is_merged_apart(parents, untied, tmp_path):
    import transformers

    folders = {name: models.copy(path, tmp_path / name) for name, path in parents("gemma").items()}
    rewrite(folders[untied], lambda state: state.update({HEAD: state[EMBEDDING] * 1.5}))
    report = merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", alpha=0.25)
    states = {name: models.exact(folders[name]) for name in ("base", "tuned")}
    heads = {name: state.get(HEAD, state[EMBEDDING]) for name, state in states.items()}
    found = models.state(tmp_path / "out")
    expected = {
        HEAD: 0.75 * heads["base"] + 0.25 * heads["tuned"],
        EMBEDDING: 0.75 * states["base"][EMBEDDING] + 0.25 * states["tuned"][EMBEDDING],
    }
    models.assert_rounded({name: found[name] for name in expected}, expected)
    assert models.settings(tmp_path / "out")["tie_word_embeddings"] is False
    assert any("becomes a tensor of its own" in note for note in report.notes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(loaded.lm_head.weight, found[HEAD])


def test_names_of_another_version_are_matched_through_the_model(parents, tmp_path):
    folders = parents("neox")
    tuned = models.copy(folders["tuned"], tmp_path / "tuned")
    assert "embed_out.weight" in models.state(tuned)
    rewrite(tuned, lambda state: state.update({"lm_head.weight": state.pop("embed_out.weight")}))
    merge("wise_ft", base=folders["base"], tuned=tuned, out=tmp_path / "out", alpha=0.25)
    merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "plain", alpha=0.25)
    found, plain = models.state(tmp_path / "out"), models.state(tmp_path / "plain")
    assert torch.equal(found.pop("lm_head.weight"), plain.pop("embed_out.weight"))
    assert all(torch.equal(value, found[name]) for name, value in plain.items())


def test_buffers_that_a_model_makes_itself_are_left_out_where_not_all_store_them(parents, tmp_path):
    folders = parents()
    base = models.copy(folders["base"], tmp_path / "base")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(base, lambda state: state.update({name: torch.rand(4)}))
    merge("wise_ft", base=base, tuned=folders["tuned"], out=tmp_path / "out")
    assert models.state(tmp_path / "out").keys() == models.state(folders["tuned"]).keys()


def test_tensors_without_floating_point_numbers_are_copied_where_they_agree(parents, tmp_path):
    folders = {name: models.copy(parents()[name], tmp_path / name) for name in ("base", "tuned")}
    for folder in folders.values():
        rewrite(folder, lambda state: state.update({"model.steps": torch.tensor([3, 4])}))
    merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out")
    assert models.state(tmp_path / "out")["model.steps"].tolist() == [3, 4]
    rewrite(folders["base"], lambda state: state.update({"model.steps": torch.tensor([3, 5])}))
    with pytest.raises(ConfigError, match=r"model.steps holds no floating-point numbers, and others than tuned"):
        merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "other")


def test_parents_of_different_dtypes_are_merged_in_fp32(parents, tmp_path):
    folders = parents()
    models.save(models.tiny("llama"), models.moved(models.tiny("llama"), 1), tmp_path / "tuned", torch.float32)
    merge("wise_ft", base=folders["base"], tuned=tmp_path / "tuned", out=tmp_path / "out", alpha=0.5)
    found = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert {value.dtype for value in found.values()} == {torch.float32}
    old, new = models.exact(folders["base"]), models.exact(tmp_path / "tuned")
    for name, value in found.items():
        torch.testing.assert_close(value.double(), 0.5 * old[name] + 0.5 * new[name], rtol=1e-6, atol=1e-7)


def test_models_that_were_not_tuned_from_one_base_are_refused_or_merged_on_demand(parents, tmp_path):
    import transformers

    folders = parents()
    torch.manual_seed(11)
    other = transformers.AutoModelForCausalLM.from_config(models.tiny("llama").config, dtype=torch.bfloat16)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ConfigError, match=r"base .*its weights have nothing in common with those of tuned .*cosine -?0\.0"
    ):
        merge("wise_ft", base=tmp_path / "other", tuned=folders["tuned"], out=tmp_path / "out")
    merge("wise_ft", base=tmp_path / "other", tuned=folders["tuned"], out=tmp_path / "out", related=False)
