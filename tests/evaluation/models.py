"""Models and tokenizers for these tests: tiny random ones, and one that answers by script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from safecl.data import Message

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 6}),
}


def tiny_model(family: str = "llama", seed: int = 0) -> torch.nn.Module:
    """fp32, with weights large enough that answers differ from prompt to prompt."""
    name, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**SIZES, **options, initializer_range=0.5)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_prompts(num: int, seed: int = 0, shortest: int = 1, longest: int = 14) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{{ '<end>' if m['role'] == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def byte_tokenizer(template: str = CHAT_TEMPLATE, control: Sequence[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """One token per byte, control tokens for the roles and for the end of an answer, and further ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", "<end>", *control]
    vocab = {token: place for place, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=specials[3:],
    )
    fast.chat_template = template
    return fast


@dataclass(frozen=True)
class Ask:
    """A prompt as `safecl.data.read_prompts` gives it."""

    messages: tuple[Message, ...]
    path: str = "prompts.jsonl"
    line: int = 1
    tags: dict[str, str] = field(default_factory=dict)


def ask(*texts: str, path: str = "prompts.jsonl") -> list[Ask]:
    return [Ask((Message("user", text),), path, line) for line, text in enumerate(texts, start=1)]


class ScriptedModel:
    """Answers each prompt (its token ids) with the scripted token ids; `calls` counts forward passes, on this rank."""

    def __init__(
        self, script: Mapping[tuple[int, ...], Sequence[int]], vocab_size: int, rank: int = 0, world_size: int = 1
    ):
        self.script, self.vocab_size = dict(script), vocab_size
        self.device, self.rank, self.world_size = torch.device("cpu"), rank, world_size
        self.calls = 0

    def logits(self, input_ids, attention_mask, position_ids, past=None, use_cache=False, last_only=False):
        self.calls += 1
        seen = input_ids if past is None else torch.cat([past, input_ids], dim=1)
        assert attention_mask.shape == seen.shape, "the mask must cover the cache and the new tokens"
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row in range(len(seen)):
            real = tuple(seen[row][attention_mask[row].bool()].tolist())
            assert int(position_ids[row, -1]) == len(real) - 1, "positions count real tokens only"
            logits[row, -1, self._next(real)] = 1.0
        return (logits[:, -1:] if last_only else logits), seen

    def _next(self, seen: tuple[int, ...]) -> int:
        for prompt, answer in self.script.items():
            if seen[: len(prompt)] == prompt and len(seen) - len(prompt) < len(answer):
                return answer[len(seen) - len(prompt)]
        return 0

    def any(self, flag: bool) -> bool:
        return bool(flag)

    def gather(self, items: list) -> list:
        return list(items)
