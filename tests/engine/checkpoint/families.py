"""Tiny models of many families, and their way through safecl: loaded, trained by an engine, saved."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = dict(
    vocab_size=131,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(vocab_size=131, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
HEADS = {"head_dim": 8}
FAMILIES: dict[str, dict] = {
    "llama": SIZES | {"rope_theta": 5e5},
    "llama-scaled": SIZES
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4}, "tie_word_embeddings": True},
    "mistral": SIZES,
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "qwen3": SIZES | HEADS,
    "gemma": SIZES | HEADS,
    "gemma2": SIZES | HEADS,
    "gemma3_text": SIZES | HEADS,
    "gemma3": {
        "text_config": SIZES | HEADS,
        "vision_config": dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        "mm_tokens_per_image": 1,
        "image_token_index": 130,
        "boi_token_index": 128,
        "eoi_token_index": 129,
    },
    "phi": SIZES | {"partial_rotary_factor": 0.5},
    "phi3": SIZES,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": SIZES | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": SIZES | {"rotary_pct": 0.5, "rotary_emb_base": 20000},
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": dict(vocab_size=131, hidden_size=32, n_layer=2, n_head=4),
    "falcon": SIZES,
    "stablelm": SIZES,
    "olmo": SIZES,
    "olmo2": SIZES,
    "granite": SIZES,
    "cohere": SIZES,
    "starcoder2": SIZES,
    "smollm3": SIZES,
    "codegen": GPT | {"rotary_dim": 4, "n_ctx": 64},
}
NOT_IN_TRANSFORMERS_4 = ("gemma3",)
"""transformers 5 itself saves the vision tower under names that transformers 4 does not read."""
IDS = torch.arange(3, 19)[None]


def save_base(family: str, folder: Path) -> None:
    """Save the family's model as transformers does, with settings that a run must not lose."""
    import transformers

    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family.partition("-")[0], **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # norms and biases, too, away from one and zero
            p.add_(torch.randn_like(p) * 0.02)
    model.save_pretrained(folder)


def export(base: Path, folder: Path) -> None:
    """Load the base as a run does, and save it from the engine, untrained."""
    from safecl.config import ModelConfig
    from safecl.engine.checkpoint.model_export import save_plain
    from safecl.engine.reference.loading import load_model
    from tests.engine import scenes

    loaded, store = load_model(ModelConfig(path=str(base), dtype="fp32", gradient_checkpointing=False))
    run, _ = scenes.build_run(scenes.run_config(memory=None), loaded, store)
    save_plain(run.engine, folder)


def outputs(folder: Path) -> tuple[torch.Tensor, float]:
    """Logits and NLL of transformers' own model."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(IDS, labels=IDS)
    return found.logits, float(found.loss)


def names(folder: Path) -> set[str]:
    from safetensors import safe_open

    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= set(opened.keys())
    return found


def exported_families(root: str, families: list[str]) -> dict[str, str]:
    """{family: what is wrong with its export}, empty where all are right."""
    import json

    wrong = {}
    for family in families:
        base, folder = Path(root) / family / "base", Path(root) / family / "model"
        save_base(family, base)
        export(base, folder)
        problems = []
        if names(base) != names(folder):
            problems.append(f"names {sorted(names(base) ^ names(folder))[:4]}")
        (expected, nll), (found, own_nll) = outputs(base), outputs(folder)
        if not torch.equal(expected, found) or nll != own_nll:
            problems.append(f"logits differ by {(expected - found).norm() / expected.norm():.1e}")
        settings = [json.loads((each / "config.json").read_text()) for each in (base, folder)]
        changed = [key for key, value in settings[0].items() if not _holds(settings[1].get(key), value)]
        if changed:
            problems.append(f"config.json: {changed}")
        if problems:
            wrong[family] = "; ".join(problems)
    return wrong


def _holds(found: object, value: object) -> bool:
    """Whether settings are there as they were; those of a part may have further keys."""
    if isinstance(value, dict) and isinstance(found, dict):
        return all(_holds(found.get(key), each) for key, each in value.items() if each is not None)
    return found == value


def save_outputs(root: str, file: str) -> None:
    """Write {family: logits} of all exports below a folder, loaded by whichever transformers is installed. A missing
    weight is an error."""
    import transformers

    found = {}
    for folder in sorted(Path(root).glob("*/model")):
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, info = load(folder, output_loading_info=True)
        assert not info["missing_keys"], (folder, info["missing_keys"])
        with torch.no_grad():
            found[folder.parent.name] = model.eval()(IDS).logits.float()
    torch.save(found | {"version": transformers.__version__}, file)
