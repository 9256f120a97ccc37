"""`check` and `train` plan a run with the same code, so what the plan refuses about a model, both refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safecl.config import ConfigError, RunConfig
from safecl.engine.model.outline import Outline
from safecl.planning.run_plan import plan_run
from tests.catalogue.models import DAMAGES, EMBEDDING, HEAD, LORA, rewrite, save_model, tokenizer, without_a_layer


def plan(
    folder: Path,
    eval_prompt: str | None = None,
    prompts: list[str] = (),
    max_length: int = 256,
    weight_decay: float = 0.0,
    methods: dict | None = None,
    **model,
):
    rows = [{"prompt": f"what is {i} plus {i}", "completion": f"the answer is {2 * i}"} for i in range(30)]
    write(folder / "t.jsonl", rows)
    task = {"name": "t", "train": str(folder / "t.jsonl")}
    if eval_prompt is not None:
        write(folder / "e.jsonl", [{"prompt": eval_prompt, "completion": "the answer is 4"}])
        task["eval"] = {"path": str(folder / "e.jsonl"), "metric": "answer_nll"}
    tree = {
        "model": {"path": str(folder), "dtype": "fp32", **model},
        "tasks": [task],
        "train": {"max_length": max_length, "allow_few_steps": True, "max_steps": 2, "weight_decay": weight_decay},
        "output": str(folder / "out"),
    }
    if methods is not None:
        tree["methods"] = methods
    if prompts:
        write(folder / "p.jsonl", [{"prompt": prompt} for prompt in prompts])
        tree["safety"] = {"prompts": str(folder / "p.jsonl")}
    return plan_run(RunConfig.model_validate(tree))


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("damage", "told"), DAMAGES)
def test_a_plan_refuses_weights_that_a_run_would_refuse(tmp_path, damage, told):
    rewrite(save_model(tmp_path), damage)
    with pytest.raises(ConfigError, match=told):
        plan(tmp_path)


def with_layers(tensors):
    tensors |= {
        name.replace("layers.1.", "layers.2."): value.clone() for name, value in tensors.items() if "layers.1." in name
    }


def with_biases(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(16)


def with_a_value_head(tensors):
    tensors["v_head.summary.weight"] = torch.ones(1, 16)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_layers, "9 unused tensors"),
        (with_biases, "1 unused tensor, .*layers.0.self_attn.q_proj.bias"),
        (with_a_value_head, "1 unused tensor, .*v_head.summary.weight"),
    ],
)
def test_tensors_without_a_place_are_named(tmp_path, change, told):
    import re

    rewrite(save_model(tmp_path), change)
    assert any(re.search(told, note) for note in plan(tmp_path).notes)


@pytest.mark.parametrize("metric", ["row", "prompt"])
def test_a_token_that_the_model_does_not_know_is_found_in_evaluations_too(tmp_path, metric):
    save_model(tmp_path)
    added = tokenizer().__class__.from_pretrained(tmp_path)
    added.add_tokens(["<tool>"])
    added.save_pretrained(tmp_path)
    given = {"eval_prompt": "use the <tool> now"} if metric == "row" else {"prompts": ["use the <tool> now"]}
    place = "e.jsonl" if metric == "row" else "p.jsonl"
    with pytest.raises(
        ConfigError, match=rf"token id {len(tokenizer())} occurs in .*{place}:1, but the model knows only"
    ):
        plan(tmp_path, **given)
    notes = plan(tmp_path, eval_prompt="what is 1 plus 3").notes
    assert any("none of the others occurs" in note for note in notes)


def test_a_pad_token_that_the_model_does_not_know_is_refused(tmp_path):
    save_model(tmp_path)
    added = tokenizer().__class__.from_pretrained(tmp_path)
    added.add_special_tokens({"pad_token": "<pads>"})
    added.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its pad token '<pads>' has the id"):
        plan(tmp_path)


GPT2 = {"max_position_embeddings": 28, "n_inner": 24}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("GPT2", GPT2), ("OPT", {"max_position_embeddings": 28, "ffn_dim": 24, "word_embed_proj_dim": 16})],
)
def test_rows_beyond_a_table_of_positions_are_refused_with_file_and_line(tmp_path, family, settings):
    folder = save_model(tmp_path, family, **settings)
    with pytest.raises(ConfigError, match=r"t\.jsonl:\d+: the row has .* set train\.max_length: 28"):
        plan(folder)
    assert plan(folder, max_length=28)


def test_rows_beyond_the_positions_of_a_model_with_rotary_embeddings_are_named(tmp_path):
    notes = plan(save_model(tmp_path, max_position_embeddings=16)).notes
    assert any("the model positions for 16" in note for note in notes)


def test_prompts_without_room_for_an_answer_are_refused_as_the_evaluation_refuses_them(tmp_path):
    save_model(tmp_path, max_position_embeddings=60)
    with pytest.raises(
        ConfigError, match=r"p\.jsonl:1: the prompt has .* leaves no room for an answer in the model's 60"
    ):
        plan(tmp_path, prompts=["what is 1 plus 2 " * 20])


@pytest.mark.parametrize(
    ("targets", "told"),
    LORA,
)
def test_lora_targets_that_are_no_modules_are_named(tmp_path, targets, told):
    with pytest.raises(ConfigError, match=told):
        plan(save_model(tmp_path), lora={"r": 2, "target_modules": targets})


def separate(tensors):
    tensors[HEAD] = tensors[EMBEDDING] + 1


def equal(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_head(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


@pytest.mark.parametrize(("change", "tied"), [(separate, False), (equal, True), (only_head, True)])
@pytest.mark.parametrize("binary", [False, True])
def test_a_tied_config_with_a_head_gives_the_model_that_transformers_loads(tmp_path, change, tied, binary):
    import transformers

    from safecl.config import ModelConfig
    from safecl.engine.reference.loading import load_model

    rewrite(save_model(tmp_path, tie_word_embeddings=True), change)
    if binary:
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(path=str(tmp_path), dtype="fp32", gradient_checkpointing=False))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    ids = torch.arange(3, 12)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert any("ties lm_head.weight" in note for note in plan(tmp_path).notes) is not tied


@pytest.mark.parametrize("kind", ["one file", "shards", "none", "broken"])
def test_weights_in_torchs_own_format_have_one_answer(tmp_path, kind):
    save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if kind == "one file":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    if kind == "shards":
        names = sorted(tensors)
        files = {"a.bin": names[:5], "b.bin": names[5:]}
        for file, own in files.items():
            torch.save({name: tensors[name] for name in own}, tmp_path / file)
        weight_map = {name: file for file, own in files.items() for name in own}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if kind == "broken":
        (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    if kind in ("one file", "shards"):
        assert plan(tmp_path)
        return
    with pytest.raises(
        ConfigError, match="holds no weights" if kind == "none" else r"pytorch_model\.bin: cannot be read"
    ):
        plan(tmp_path)


VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)


def save_model_with_vision(folder: Path) -> Path:
    text = dict(vocab_size=len(tokenizer()), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(intermediate_size=24, max_position_embeddings=256, num_key_value_heads=2, head_dim=8)
    return save_model(folder, "Gemma3", text_config=text, vision_config=VISION | {"patch_size": 14})


def test_parts_that_text_does_not_reach_are_named(tmp_path):
    save_model_with_vision(tmp_path)
    (note,) = (note for note in plan(tmp_path).notes if "text does not reach" in note)
    assert "vision_tower, multi_modal_projector" in note and "stay as they are" in note
    with pytest.raises(ConfigError, match=r"train\.weight_decay would shrink them; set train\.weight_decay: 0"):
        plan(tmp_path, weight_decay=0.1)


def test_text_reaches_every_weight_of_a_text_model():
    import transformers

    from tests.engine.checkpoint.families import FAMILIES

    for family, sizes in FAMILIES.items():
        settings = transformers.AutoConfig.for_model(family.partition("-")[0], **sizes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings)
        assert bool(Outline.of(model).without_text) == (family == "gemma3"), family


@pytest.mark.parametrize(
    ("targets", "methods", "named"),
    [
        (["embed_tokens", "q_proj"], {"l2_sp": {}}, ["methods.l2_sp: the adapter of model.embed_tokens is not pulled"]),
        (["q_proj"], {"l2_sp": {}}, []),
        (["embed_tokens"], {}, []),
        (["embed_tokens"], {"l2_sp": {"strength": 0}}, []),
    ],
)
def test_an_adapter_that_no_penalty_pulls_is_named(tmp_path, targets, methods, named):
    notes = plan(save_model(tmp_path), methods=methods, lora={"target_modules": targets}).notes
    found = [note.partition(",")[0] for note in notes if "not pulled" in note]
    assert found == named


def _cut_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: rewrite(folder, without_a_layer), "model.layers.1"),
        (lambda folder: (folder / "model.safetensors").unlink(), "methods.lwf.teacher"),
        (_cut_file, "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "methods.lwf.teacher"),
        (lambda folder: None, None),
    ],
)
def test_the_files_of_an_online_teacher_are_checked_before_the_run(tmp_path, damage, told):
    teacher = save_model(tmp_path / "teacher")
    damage(teacher)
    methods = {"lwf": {"teacher": str(teacher), "outputs": "online"}}
    student = save_model(tmp_path / "student")
    if told is None:
        plan(student, methods=methods)
        return
    with pytest.raises(ConfigError) as refused:
        plan(student, methods=methods)
    assert told in str(refused.value) and str(teacher) in str(refused.value)
    assert "model.path" not in str(refused.value)
