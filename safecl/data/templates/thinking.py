"""The markers of a model's thought, the header that a template leaves to the model, and the opening of an answer.

A template of a reasoning model writes an answer as

    <|im_start|>assistant\\n  <think>\\n THOUGHT \\n</think>\\n\\n  ANSWER  <|im_end|>\\n
    header                    open               close                footer

The markers are those of `model.thinking`; else those between which the template writes the field `reasoning_content`,
`reasoning` or `thinking` of a message; and any well-known pair that the template or the tokenizer holds. `<think>` and
`</think>` are known always. A template may open the thought itself, or leave the header to the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from safecl.config import ConfigError
from safecl.config.model import ThinkingConfig, ThinkingMode
from safecl.data.messages import Message
from safecl.data.templates.chat import control_tokens, prompt_ids, stop_ids, template_source
from safecl.data.templates.turn_forms import forms_of, rendered

KNOWN_PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("Here is my thought process:", "Here is my response:"),
)
ALWAYS_KNOWN = KNOWN_PAIRS[0]
FIELDS = ("reasoning_content", "reasoning", "thinking")
OFF: dict[str, Any] = {"enable_thinking": False, "thinking": False}
_THOUGHT, _ANSWER = "safecl probe thought", "safecl probe answer"
_LAST_TAG = re.compile(r"(?:<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷]+▷)\s*$")
_QUESTION = {"role": "user", "content": "question"}
_TAIL = 32
"""Tokens at the end of a prompt in which its opening of a thought is looked for."""


class Pair(NamedTuple):
    """Texts that open and close a thought, without white space around them."""

    open: str
    close: str


@dataclass(frozen=True)
class Markers:
    """The marks of thoughts, from the tokenizer's template and the config.

    pairs: the first is the one that prompts are written with. named: whether template, tokenizer or config name it.
    block: an empty thought, as the template writes it. headers, footers: texts around the answer that the model writes
    itself, without white space around them. kept: special tokens that are part of these texts.
    """

    pairs: tuple[Pair, ...]
    named: bool
    block: str
    headers: tuple[str, ...] = ()
    footers: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def check_thinking(tokenizer: Any) -> None:
    """Refuse `mode: empty` where no markers are known. Raises ConfigError."""
    if thinking_of(tokenizer).mode == "empty" and not markers_of(tokenizer).named:
        raise ConfigError(
            f"model.thinking.mode: empty needs the markers of a thought, and neither the chat template "
            f"({template_source(tokenizer)}) nor the tokenizer has any that are known; set model.thinking.open and "
            "model.thinking.close, or mode: template"
        )


def thinking_of(tokenizer: Any) -> ThinkingConfig:
    """Return `model.thinking`, which `load_tokenizer` attaches to the tokenizer, or the defaults."""
    return getattr(tokenizer, "safecl_thinking", None) or ThinkingConfig()


def markers_of(tokenizer: Any) -> Markers:
    """Return the markers of this tokenizer, its template and `model.thinking`; worked out once for each of them."""
    if getattr(tokenizer, "chat_template", None) is None:
        return Markers((Pair(*ALWAYS_KNOWN),), named=False, block="")
    key = (tokenizer.chat_template, thinking_of(tokenizer).model_dump_json())
    known: tuple[Any, Markers] | None = getattr(tokenizer, "safecl_markers", None)
    if known is None or known[0] != key:
        tokenizer.safecl_markers = known = (key, _find(tokenizer))
    return known[1]


def markers_of_config(thinking: ThinkingConfig | None) -> Markers:
    """Return the markers where there is no tokenizer: those of `model.thinking`, else all tags that are known."""
    if thinking is not None and thinking.open is not None and thinking.close is not None:
        return Markers((Pair(thinking.open.strip(), thinking.close.strip()),), named=True, block="")
    return Markers(tuple(Pair(*pair) for pair in KNOWN_PAIRS if " " not in pair[0]), named=False, block="")


def _find(tokenizer: Any) -> Markers:
    probe, named = _probe(tokenizer), _named_pairs(tokenizer)
    pairs = list(dict.fromkeys([*named, *([] if thinking_of(tokenizer).open else [Pair(*ALWAYS_KNOWN)])]))
    opened, tokens = _opening(tokenizer), control_tokens(tokenizer)
    kept = tuple(token for token in tokens if any(token in text for pair in pairs for text in pair))
    before, after = _around(tokenizer, opened, pairs)
    headers, footers = (_visible(text, tokens, kept) for text in (before, after))
    return Markers(tuple(pairs), bool(named), _block(tokenizer, pairs[0], probe, opened), headers, footers, kept)


def _named_pairs(tokenizer: Any) -> list[Pair]:
    settings, probe = thinking_of(tokenizer), _probe(tokenizer)
    if settings.open is not None and settings.close is not None:
        return [Pair(settings.open.strip(), settings.close.strip())]
    known = [pair for pair in map(Pair._make, KNOWN_PAIRS) if _holds(tokenizer, pair)]
    return [probe.pair, *known] if probe is not None else known


def _block(tokenizer: Any, pair: Pair, probe: _Probe | None, opened: str) -> str:
    """Return an empty thought: in the template's form, where it writes one or a whole thought, else in a plain one."""
    off = _opening(tokenizer, **OFF)
    if pair.open not in opened and off.startswith(opened) and pair.close in off[len(opened) :]:
        return off[len(opened) :]
    if probe is not None and probe.pair == pair:
        return probe.block
    return f"{pair.open}\n\n{pair.close}\n\n"


class _Probe(NamedTuple):
    pair: Pair
    block: str


def _probe(tokenizer: Any) -> _Probe | None:
    """Find the texts that the template writes around a message's thought; None where it writes none."""
    given, opened = _rendered(tokenizer, [_QUESTION]), _opening(tokenizer)
    answers: list[dict[str, Any]] = [{"role": "assistant", "content": _ANSWER, field: _THOUGHT} for field in FIELDS]
    for answer in [*answers, forms_of(tokenizer).turn(Message("assistant", _ANSWER, thought=_THOUGHT))]:
        text = _rendered(tokenizer, [_QUESTION, answer])
        if not text.startswith(given) or not 0 <= text.find(_THOUGHT) < text.find(_ANSWER):
            continue
        before, _, rest = text[len(given) :].partition(_THOUGHT)
        close = rest.partition(_ANSWER)[0]
        header = opened[len(given) :]
        open = before[len(header) :] if header and before.startswith(header) else ""
        # The template may open the thought in its prompts, or write no prompt: then the last tag is the marker.
        if not open.strip() and (tag := _LAST_TAG.search(before)):
            open = tag[0]
        if open.strip() and close.strip():
            return _Probe(Pair(open.strip(), close.strip()), open + close)
    return None


def _holds(tokenizer: Any, pair: Pair) -> bool:
    """Whether the template's text or the tokenizer's added tokens hold both markers."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return all(marker in tokenizer.chat_template for marker in pair) or added.issuperset(pair)


def _around(tokenizer: Any, opened: str, pairs: Sequence[Pair]) -> tuple[str, str]:
    """Return what the template leaves to the model before an answer, an empty thought not counted, and behind it."""
    before, _, after = _rendered(tokenizer, [_QUESTION, {"role": "assistant", "content": _ANSWER}]).rpartition(_ANSWER)
    before = before[len(opened) :] if before.startswith(opened) else ""
    for pair in pairs:
        before = before.partition(pair.open)[0]
    return before, after


def _visible(text: str, tokens: Sequence[str], kept: Sequence[str]) -> tuple[str, ...]:
    """Return the text as it is seen in a decoded answer, in a tuple; an empty tuple where nothing is seen."""
    for token in sorted(set(tokens) - set(kept), key=len, reverse=True):
        text = text.replace(token, "")
    return (text.strip(),) if text.strip() else ()


def _opening(tokenizer: Any, **options: Any) -> str:
    """Render a question with the opening of the answer to it."""
    return _rendered(tokenizer, [_QUESTION], add_generation_prompt=True, **options)


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Render messages; an empty text where the template refuses them."""
    if forms_of(tokenizer).parts:
        messages = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn["content"], str)
            else turn
            for turn in messages
        ]
    return rendered(tokenizer, messages, **options)


# -------------------------------------------------------------------------------------------------------------- prompts


def answer_prompt_ids(tokenizer: Any, messages: Sequence[Message], mode: ThinkingMode | None = None) -> list[int]:
    """Token ids of the turns before an answer, with the opening of the answer in the evaluation's mode.

    template: as the template opens it. empty: behind an empty thought. none: without anything of a thought.

    Args: `mode`: replaces `model.thinking.mode`. Raises: DataError where the template refuses the turns.
    """
    mode, ids = mode or thinking_of(tokenizer).mode, list(prompt_ids(tokenizer, messages))
    if mode == "empty":
        return with_empty_thought(tokenizer, ids)
    return _without_opening(tokenizer, ids) if mode == "none" else ids


def with_empty_thought(tokenizer: Any, prompt: Sequence[int]) -> list[int]:
    """Put an empty thought behind a prompt, or close the one that it opens; nothing where no markers are named."""
    markers = markers_of(tokenizer)
    if not markers.named:
        return list(prompt)
    tail = _tail(tokenizer, prompt)
    if tail.rstrip().endswith(markers.pairs[0].close):
        return list(prompt)
    there = _overlap(tail, markers.block)
    return [*prompt, *tokenizer(markers.block[there:], add_special_tokens=False)["input_ids"]]


def without_empty_thought(tokenizer: Any, answer: Sequence[int]) -> list[int]:
    """Drop the empty thought that a template writes before an answer."""
    markers = markers_of(tokenizer)
    block = tokenizer(markers.block, add_special_tokens=False)["input_ids"] if markers.named else []
    return list(answer[len(block) :] if list(answer[: len(block)]) == block else answer)


def _without_opening(tokenizer: Any, prompt: list[int]) -> list[int]:
    """Take away a thought that a prompt ends with, open or empty."""
    markers = markers_of(tokenizer)
    if not markers.named:
        return prompt
    tail = _tail(tokenizer, prompt)
    there = _overlap(tail, markers.block)
    if there < len(markers.pairs[0].open):
        return prompt
    kept = tail[: len(tail) - there]
    ends = range(len(prompt) - 1, len(prompt) - _TAIL - 1, -1)
    return next(prompt[:end] for end in ends if kept.startswith(_tail(tokenizer, prompt[:end], len(prompt) - _TAIL)))


def _tail(tokenizer: Any, prompt: Sequence[int], start: int | None = None) -> str:
    """Decode the last tokens of a prompt, or those from `start` on."""
    start = len(prompt) - _TAIL if start is None else start
    return str(tokenizer.decode(list(prompt[max(0, start) :]), skip_special_tokens=False))


def opens_thought(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside of a thought that its template has opened."""
    tail = _tail(tokenizer, prompt).rstrip()
    return any(tail.endswith(pair.open) for pair in markers_of(tokenizer).pairs)


def forbidden_ids(tokenizer: Any, mode: ThinkingMode | None = None) -> tuple[list[int], list[int]]:
    """Token ids that the mode `none` forbids: everywhere in an answer, and as its first token.

    A marker of one token, open or close, is forbidden everywhere; the first token of a longer one only at the start.
    Not forbidden are tokens that end an answer, and those with which answers without a thought begin.
    """
    markers = markers_of(tokenizer)
    everywhere: list[int] = []
    first: list[int] = []
    if (mode or thinking_of(tokenizer).mode) != "none" or not markers.named:
        return everywhere, first
    ends = stop_ids(tokenizer)
    for marker in (marker for pair in markers.pairs for marker in pair):
        ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if ids[0] in ends or any(header.startswith(tokenizer.decode(ids[:1])) for header in markers.headers):
            continue
        (everywhere if len(ids) == 1 else first).append(ids[0])
    return everywhere, first


def _overlap(text: str, block: str) -> int:
    """Return how many characters of the block, from its start, stand at the end of the text."""
    return next((num for num in range(len(block), 0, -1) if text.endswith(block[:num])), 0)
