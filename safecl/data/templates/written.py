"""Compares what a row says with what the chat template writes of it.

A row is bad where the template leaves a message out or changes it (other than in white space): something else than the
row would be trained. Thoughts and tools that the template does not write are remarks, since the turns are there.
Two things are looked for: the content itself, and a probe in its place, which cannot stand in the text by chance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from safecl.data.messages import Message, RowProblem, clip
from safecl.data.reading.files import where
from safecl.data.templates.chat import render, template_source, without_marks
from safecl.data.templates.turn_forms import said_in_calls

_THOUGHT = re.compile(r"\s*(?:<([\w|]+)>.*?</\1>|\[(\w+)\].*?\[/\2\]|◁(\w+)▷.*?◁/\3▷)", re.DOTALL)
_MIN_PART = 8  # a shorter part of a message may stand in the text by chance
_FIX = "write it in a copy of the template and name the copy in model.chat_template, or take it out of the rows"


@dataclass
class Written:
    """The rendering of one conversation: the problem of the row, if any, and notes."""

    problem: RowProblem | None = None
    notes: list[str] = field(default_factory=list)


def probes_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same turns with texts that stand for nothing else. They are short, since some templates cut long texts."""
    return tuple(_probe_of(message, f"{i}") for i, message in enumerate(messages))


def _probe_of(message: Message, number: str) -> Message:
    calls = json.loads(message.calls) if message.calls is not None else []
    named = [{**call, "function": {**call["function"], "name": f"qzf{number}fzq"}} for call in calls]
    return replace(
        message,
        content=f"qzx{number}xzq" if message.content.strip() or message.calls is None else "",
        thought=message.thought and f"qzt{number}tzq",
        calls=json.dumps(named) if named else None,
    )


def compare(tokenizer: Any, conversations: Sequence[Sequence[Message]], texts: Sequence[str]) -> list[Written]:
    """Compare conversations with their renderings."""
    source = clip(template_source(tokenizer), 80)
    missing: dict[Any, tuple[set[str], set[str]]] = {}
    out = []
    for messages, text in zip(conversations, texts, strict=True):
        shape = (tuple((m.role, m.thought is not None, m.calls, not m.content) for m in messages), messages[0].tools)
        if shape not in missing:
            missing[shape] = _odd_probes(tokenizer, messages)
        out.append(_compare_one(messages, _Text(text), *missing[shape], source))
    return out


def _odd_probes(tokenizer: Any, messages: Sequence[Message]) -> tuple[set[str], set[str]]:
    """The probes that the template leaves out, and those that it writes more than once."""
    probes = probes_of(messages)
    try:
        text = render(tokenizer, [probes])[0]
    except Exception:  # a template may refuse the probe for its text; the row itself has been rendered
        return set(), set()
    parts = [part for m in probes for part in (m.content, m.thought) if part]
    return {part for part in parts if part not in text}, {part for part in parts if text.count(part) > 1}


class _Text:
    """A rendered text, without the marks of control tokens, as it is and without its white space."""

    def __init__(self, text: str):
        self.plain = without_marks(text)
        self._dense: str | None = None

    def holds(self, part: str, in_json: bool = False) -> bool:
        """Whether the text holds a part. `in_json`: perhaps inside of a JSON string."""
        part = without_marks(part).strip()
        if part in self.plain:
            return True
        if in_json and any(self.holds(json.dumps(part, ensure_ascii=ascii)[1:-1]) for ascii in (False, True)):
            return True
        if self._dense is None:
            self._dense = "".join(self.plain.split())
        return "".join(part.split()) in self._dense


def _compare_one(
    messages: Sequence[Message], text: _Text, missing: set[str], repeated: set[str], source: str
) -> Written:
    written, probes, wrongs = Written(), probes_of(messages), []
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    for i, (message, probe) in enumerate(zip(messages, probes, strict=True)):
        name = f"message {i + 1} ({message.role})"
        earlier = " of an earlier answer" if i < last else ""
        lost = "" if text.holds(message.content, message.role == "tool") else _lost(message.content, text)
        if probe.content in missing and lost in ("", message.content):
            wrongs.append(f"leaves out {name}")
        elif probe.content in repeated and message.role == "assistant":
            wrongs.append(f"writes {name} more than once")
        elif lost:
            if message.role == "assistant" and i < last and _only_lacks_thought(message.content, text):
                written.notes.append(f"the chat template ({source}) leaves out the thought{earlier}")
            else:
                wrongs.append(f"changes {name}, {clip(' '.join(lost.split()))!r} is not in what it writes")
        if said := next((said for said in said_in_calls(message) if not text.holds(said, in_json=True)), None):
            wrongs.append(
                f"leaves out a call of message {i + 1} (assistant), {clip(said, 24)!r} is not in what it writes"
            )
        if message.thought is not None and (probe.thought in missing or not text.holds(message.thought)):
            written.notes.append(
                f"the thought{earlier} (`reasoning_content`, `thinking` or `reasoning`) is not used, since the chat "
                f"template ({source}) does not write it"
            )
    if messages[0].tools is not None and not all(name in text.plain for name in _tool_names(messages[0].tools)):
        written.notes.append(f"`tools` is not used, since the chat template ({source}) does not write it")
    if wrongs:
        written.problem = RowProblem(f"the chat template ({source}) {'; and '.join(wrongs)}; {_FIX}")
    return written


def _tool_names(tools: str) -> list[str]:
    names = [tool.get("name") or (tool.get("function") or {}).get("name") for tool in json.loads(tools)]
    return [str(name) for name in names if name]


def _only_lacks_thought(content: str, text: _Text) -> bool:
    answer = after_thought(content)
    return bool(answer and answer.strip()) and text.holds(str(answer))


def _lost(content: str, text: _Text) -> str:
    """The part of a message that does not stand in the text: all but its longest end and its longest beginning."""
    end = _longest(len(content), lambda n: text.holds(content[len(content) - n :]))
    start = _longest(len(content) - end, lambda n: text.holds(content[:n]))
    return content[start if start >= _MIN_PART else 0 : len(content) - (end if end >= _MIN_PART else 0)]


def _longest(most: int, holds: Any) -> int:
    """The largest n up to `most` for which `holds(n)` is true, where it is true for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def after_thought(content: str) -> str | None:
    """The answer behind a thought that it begins with, or None where there is no such thought."""
    opened = _THOUGHT.match(content)
    return content[opened.end() :] if opened else None


def remarks_on_prompts(tokenizer: Any, prompts: Sequence[Any]) -> list[str]:
    """Remarks on prompts that the template does not write as they are, with their number and the first of them.

    Args: `prompts`: anything with `messages`, `path` and `line`. Prompts that the template refuses are left to the one
    who renders them.
    """
    found: dict[str, tuple[int, str]] = {}
    for prompt in prompts:
        try:
            text = render(tokenizer, [prompt.messages], generation_prompt=True)[0]
        except Exception:  # as above
            continue
        written = compare(tokenizer, [prompt.messages], [text])[0]
        for remark in [*([str(written.problem)] if written.problem else []), *written.notes]:
            count, first = found.get(remark, (0, where(prompt.path, prompt.line)))
            found[remark] = (count + 1, first)
    lines = [f"{count:,} of {len(prompts):,} prompts: {text} (first: {at})" for text, (count, at) in found.items()]
    return [*lines[:5], *([f"and {len(lines) - 5} more remarks on prompts"] if len(lines) > 5 else [])]


def notes_on_prompts(
    tokenizer: Any, prompts: Sequence[Any], rows: Sequence[Any], privacy: Literal["full", "hashed", "none"]
) -> list[str]:
    """Remarks on evaluation prompts, and on held-out rows without their last answers.

    Args: `privacy`: `none` leaves out the reason, which may quote a few words.
    """
    asked = [replace(row, messages=row.messages[:-1]) for row in rows if row.messages[-1].role == "assistant"]
    remarks = [*remarks_on_prompts(tokenizer, prompts), *remarks_on_prompts(tokenizer, asked)]
    if privacy != "none":
        return remarks
    return [f"{remark.partition(':')[0]}: the chat template does not write them as they are" for remark in remarks]
