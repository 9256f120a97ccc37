"""Writes a tiny Llama as a .gguf file of 8-bit weights, and compares what safecl loads with what transformers loads.

Run as a module with the file's folder, where the package `gguf` can be imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.engine import scenes

IDS = torch.arange(3, 12)[None]
PLACES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(folder: Path) -> torch.nn.Module:
    """Write m.gguf and return the model that it was made of."""
    import gguf
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=scenes.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(scenes.VOCAB)
    for name, value in model.state_dict().items():
        tensor = _interleaved(name, value)
        if tensor.dim() == 2 and "embed" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in PLACES:
        return f"{PLACES[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def _interleaved(name: str, value: torch.Tensor) -> torch.Tensor:
    """llama.cpp keeps the two halves of rotary pairs side by side."""
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
    if not heads:
        return value.contiguous()
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(value.shape).contiguous()


def compare(folder: Path) -> None:
    import transformers

    from safecl.config import ModelConfig
    from safecl.engine.reference.loading import load_model

    start = write(folder)(IDS).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
    expected = theirs.eval()(IDS).logits
    settings = ModelConfig(path=str(folder / "m.gguf"), dtype="fp32", gradient_checkpointing=False)
    model, _ = load_model(settings)
    assert torch.equal(model(IDS).logits, expected)
    assert 0 < (expected - start).norm() < 0.05 * start.norm()


if __name__ == "__main__":
    compare(Path(sys.argv[1]))
