"""Turns in the form that a chat template takes, which probes find out.

Templates take content as text or as a list of parts; a thought in a field of the turn or as a part of its content; the
arguments of a call as an object or as JSON text; and the content of a turn that only calls as empty text or as null.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safecl.data.messages import Message
from safecl.data.reading.turns import THOUGHTS

Turn = dict[str, Any]
Change = Callable[[Any], Any]

_ASKS: Turn = {"role": "user", "content": "qzu0uzq"}
_SAYS = "qza0azq"
_THINKS = "qzt0tzq"
_CALL = Message(
    "assistant",
    "",
    calls=json.dumps(
        [{"id": "qzcall012", "type": "function", "function": {"name": "qzf0fzq", "arguments": {"qzk": "qzv"}}}]
    ),
)
_RETURNS: Turn = {"role": "tool", "name": "qzf0fzq", "tool_call_id": "qzcall012", "content": "qzr0rzq"}


@dataclass(frozen=True)
class Forms:
    """parts: content is a list of parts. thought_parts: a thought is one of them. text_arguments: the arguments of a
    call are JSON text. null_content: a turn that only calls has no content."""

    parts: bool = False
    thought_parts: bool = False
    text_arguments: bool = False
    null_content: bool = False

    def turn(self, message: Message, change: Change = lambda value: value) -> Turn:
        """Convert a message. `change` is applied to all that the row says."""
        content = change(message.content)
        turn: Turn = {"role": message.role, "content": [_part("text", content)] if self.parts else content}
        if message.thought is not None:
            thought = change(message.thought)
            turn |= dict.fromkeys(THOUGHTS, thought)  # templates read it under one of these names
            if self.thought_parts:
                turn["content"] = [_part("thinking", thought), _part("text", content)]
        if message.calls is not None:
            turn["tool_calls"] = [self._call(call) for call in change(json.loads(message.calls))]
            if self.null_content and not content:
                turn["content"] = None
        return turn | (change(json.loads(message.tool)) if message.tool is not None else {})

    def _call(self, call: Mapping[str, Any]) -> Turn:
        function = call["function"]
        if not self.text_arguments:
            return dict(call)
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}


def _part(kind: str, text: str) -> Turn:
    return {"type": kind, kind: text}


def forms_of(tokenizer: Any) -> Forms:
    """The forms that the tokenizer's chat template takes; usual ones where it takes none of those known here."""
    known = getattr(tokenizer, "safecl_forms", None)
    if known is None or known[0] != tokenizer.chat_template:
        known = tokenizer.safecl_forms = (tokenizer.chat_template, _find(tokenizer))
    return known[1]


def _find(tokenizer: Any) -> Forms:
    parts = next((parts for parts in (False, True) if _writes_content(tokenizer, parts)), False)
    thought_parts = not _writes_thought(tokenizer, Forms(parts)) and _writes_thought(tokenizer, Forms(parts, True))
    choices = [
        Forms(parts, thought_parts, text_arguments, null_content)
        for null_content, text_arguments in itertools.product((False, True), repeat=2)
    ]
    if '"qzk":"qzv"' in (first := _call_in(tokenizer, choices[0])) or "tool_calls" not in str(tokenizer.chat_template):
        return choices[0]
    written = [first, *(_call_in(tokenizer, form) for form in choices[1:])]
    as_json = next((form for form, text in zip(choices, written, strict=True) if '"qzk":"qzv"' in text), None)
    otherwise = (form for form, text in zip(choices, written, strict=True) if "qzf0fzq" in text and "qzv" in text)
    return as_json or next(otherwise, choices[0])


def _writes_content(tokenizer: Any, parts: bool) -> bool:
    form = Forms(parts)
    text = rendered(tokenizer, [form.turn(Message("user", _ASKS["content"])), form.turn(Message("assistant", _SAYS))])
    return _ASKS["content"] in text and _SAYS in text and not _is_repr(text)


def _writes_thought(tokenizer: Any, form: Forms) -> bool:
    turn = form.turn(Message("assistant", _SAYS, thought=_THINKS))
    text = rendered(tokenizer, [form.turn(Message("user", _ASKS["content"])), turn])
    return _THINKS in text and _SAYS in text and not _is_repr(text)


def _is_repr(text: str) -> bool:
    """Whether a template has written a list of parts as Python shows it."""
    return "'type'" in text or '"type"' in text


def _call_in(tokenizer: Any, form: Forms) -> str:
    """Return the text that the template writes for a call, without white space."""
    asks = form.turn(Message("user", _ASKS["content"]))
    text = rendered(tokenizer, [asks, form.turn(_CALL), _RETURNS]) or rendered(tokenizer, [asks, form.turn(_CALL)])
    return "".join(text.split())


def rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Render turns; an empty text where the template refuses them."""
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, **options)
    except Exception:  # a template may raise anything, and these turns are only a probe
        return ""
    return text if isinstance(text, str) else ""


# -------------------------------------------------------------------------------------------------------- calls in text


def call_names(message: Message) -> list[str]:
    """Names of the functions that a message calls."""
    return [call["function"]["name"] for call in json.loads(message.calls)] if message.calls is not None else []


def said_in_calls(message: Message) -> list[str]:
    """The names, and all texts and numbers in the arguments, of the calls of a message."""
    calls = json.loads(message.calls) if message.calls is not None else []
    return [text for call in calls for text in (call["function"]["name"], *_leaves(call["function"]["arguments"]))]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, (dict, list)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _leaves(item)]
    return [str(value)]
