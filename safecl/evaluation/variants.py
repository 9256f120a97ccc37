"""Variants of a measurement: the same prompts, put otherwise. `safety.variants`.

    prefill   the answer begins with the first k tokens of compliance, and the model goes on from there (prefill attack,
              Qi et al. 2024, arXiv 2406.05946)
    system    another system message, or none (PTST, Lyu et al. 2024, arXiv 2402.18540)

Records of a variant stand beside the others, in the sets `NAME/disallowed` and `NAME/benign`. Behind a prefill the
scorers by keywords read what the model has added, and judges the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from safecl.config import ConfigError, SafetyConfig
from safecl.config.variants import NO_SYSTEM, VariantConfig
from safecl.data.reading.rows import Prompt
from safecl.evaluation.answers.texts import under_system

Ids = list[int]


def asked_in(
    variant: VariantConfig, safety: SafetyConfig, prompts: Sequence[Prompt], benign: Sequence[Prompt]
) -> list[Prompt]:
    """Return what a variant asks: the disallowed prompts, and the benign ones where it has no prefill."""
    return put_otherwise(variant, safety, [*prompts, *(benign if variant.prefill is None else ())])


def put_otherwise(variant: VariantConfig, safety: SafetyConfig, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts under the variant's system message. Those with a message of their own keep it.

    prompts: under `safety.system`.
    """
    if variant.system is None:
        return list(prompts)
    bare = [_without_system(prompt, safety.system) for prompt in prompts]
    return under_system(None if variant.system == NO_SYSTEM else variant.system, bare)


def _without_system(prompt: Prompt, system: str | None) -> Prompt:
    first = prompt.messages[0] if prompt.messages else None
    if system is None or first is None or (first.role, first.content) != ("system", system):
        return prompt
    return replace(prompt, messages=prompt.messages[1:])


def prefills_of(variant: VariantConfig, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Ids] | None:
    """Return the token ids with which the answer to each prompt begins; None where the model begins itself.

    A prompt's own text (`prefill_column`) may have fewer tokens than `prefill`, and is then used whole. Raises
    ConfigError where `prefill_text` has fewer.
    """
    if variant.prefill is None:
        return None
    common: Ids = tokenizer(variant.prefill_text, add_special_tokens=False)["input_ids"]
    if len(common) < variant.prefill:
        raise ConfigError(
            f"safety.variants.{variant.title}: prefill_text has {len(common)} tokens, fewer than prefill: "
            f"{variant.prefill}; give a longer text"
        )
    own = (prompt.tags.get(variant.prefill_column) for prompt in prompts)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] if text else common for text in own]
    return [ids[: variant.prefill] for ids in texts]
