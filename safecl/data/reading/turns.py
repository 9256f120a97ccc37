"""Reads one turn of a conversation: `role` and `content`, or `from` and `value` as in ShareGPT.

Content may be a list of parts, of which text and thoughts are read. An assistant's turn may call tools, in `tool_calls`
(or `function_call`, or a ShareGPT turn from `function_call`), and a turn of the role `tool` holds what a tool returned.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from safecl.data.messages import Message, RowProblem, check_text, clip, columns_of, kind_of
from safecl.data.reading.cells import is_empty, parse_text

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
KEYS = (("role", "content"), ("from", "value"))
"""The keys of a turn's speaker and text, by the custom that it follows."""

_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
_SPEAKERS = {
    **_ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function_response": "tool",
    "tool_response": "tool",
}
_SHOWN = ("system", "user", "assistant", "tool")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_THOUGHT_PARTS = ("thinking", *THOUGHTS, "thought")
_TOOL_PARTS = {"tool_use": "`tool_calls` of the turn", "tool_result": "a message of role `tool`"}


def read_turns(value: Any, name: str) -> list[Message]:
    """Convert a list of turns to messages. Only their shape is checked. Raises RowProblem."""
    if isinstance(value, str):  # CSV and Parquet often hold the list as text
        try:
            value = parse_text(value)
        except ValueError:
            raise RowProblem(f"`{name}` must be a list of messages, not text") from None
    if not isinstance(value, list):
        raise RowProblem(f"`{name}` must be a list of messages, not {kind_of(value)}")
    if not value:
        raise RowProblem(f"`{name}` is empty")
    return [_turn(turn, f"{name}[{i}]", "from" if name == "conversations" else "role") for i, turn in enumerate(value)]


def _turn(turn: Any, name: str, usual: str) -> Message:
    """Convert one turn. `usual`: the speaker's key, which an error names where the turn has neither of the two."""
    keys = dict(KEYS)
    speaker = next((key for key in (usual, *keys) if isinstance(turn, dict) and key in turn), usual)
    said = keys[speaker]
    if not isinstance(turn, dict):
        raise RowProblem(f"{name} must be an object with `{speaker}` and `{said}`, not {kind_of(turn)}")
    if speaker not in turn:
        raise RowProblem(f"{name} has no `{speaker}`; it has {columns_of(turn)}")
    role, calls = _role(turn[speaker], name, speaker), _calls(turn, name)
    if said not in turn and calls is None:
        raise RowProblem(f"{name} has no `{said}`; it has {columns_of(turn)}")
    content, thought = _content(turn.get(said), f"{name}.{said}", may_be_null=calls is not None)
    if turn[speaker] in ("function_call", "tool_call"):
        content, calls = "", _json_calls(_parsed(content, f"{name}.{said}"), f"{name}.{said}")
    if calls is not None and role != "assistant":
        raise RowProblem(f"{name} calls a tool and is the {role}'s; only the assistant calls tools")
    return Message(
        role,
        content,
        _train_flag(turn, name),
        thought if thought is not None else thought_of(turn, name, content),
        calls=calls,
        tool=_tool(turn, name) if role == "tool" else None,
    )


def _role(role: Any, name: str, key: str) -> str:
    if not isinstance(role, str):
        raise RowProblem(f"{name}: `{key}` must be text, not {kind_of(role)}")
    known = _SPEAKERS if key == "from" else _ROLES
    if role not in known:
        near = difflib.get_close_matches(role.lower(), known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(_SHOWN)}"
        raise RowProblem(f"{name}: unknown {key} {clip(role, 24)!r}; {hint}")
    return known[role]


def _train_flag(turn: Mapping[str, Any], name: str) -> bool | None:
    for key in ("train", "weight", "unmask"):
        value = turn.get(key)
        if value is None or (key == "unmask" and value is False):
            continue
        if isinstance(value, bool) or (key == "weight" and value in (0, 1)):
            return bool(value)
        raise RowProblem(f"{name}: `{key}` must be {'0 or 1' if key == 'weight' else 'true or false'}")
    return None


# -------------------------------------------------------------------------------------------------------------- content


def text_in(value: Any, name: str) -> str:
    """Return the text of a value: text, or a list of parts that are text. Raises RowProblem."""
    text, thought = _content(value, name)
    if thought is not None:
        raise RowProblem(f"{name} has a part that is a thought; only the assistant's turns have thoughts")
    return text


def _content(value: Any, name: str, may_be_null: bool = False) -> tuple[str, str | None]:
    """Return the text and the thought of a content."""
    if value in (None, []) and may_be_null:
        return "", None
    if value is None:
        raise RowProblem(f"{name} is null")
    if isinstance(value, list):
        return _of_parts(value, name)
    if not isinstance(value, str):
        raise RowProblem(f"{name} must be text, not {kind_of(value)}")
    return value, None


def _of_parts(parts: list[Any], name: str) -> tuple[str, str | None]:
    if not parts:
        raise RowProblem(f"{name} is an empty list")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        if kind in _THOUGHT_PARTS:
            if texts:
                raise RowProblem(f"{name} has a thought behind its text; the thought must come first")
            thoughts.append(_of_thought(part, kind, name))
        else:
            texts.append(_of_text(part, kind, name))
    return "".join(texts), "\n\n".join(thoughts) or None


def _of_text(part: Any, kind: Any, name: str) -> str:
    text = part.get(_TEXT_PARTS.get(str(kind), "")) if isinstance(part, dict) else None
    if kind in _TOOL_PARTS:
        raise RowProblem(f"{name} has a part of type `{kind}`; write it as {_TOOL_PARTS[kind]}")
    if not isinstance(text, str):
        what = "that is not text" if kind == "text" else f"of type `{clip(kind, 24)}`, which is not text"
        raise RowProblem(f"{name} has a part {what}; images and audio are not supported, leave the row out")
    return text


def _of_thought(part: Mapping[str, Any], kind: str, name: str) -> str:
    """The text of a thought, which some write as a list of text parts."""
    value = next((part[key] for key in (kind, *_THOUGHT_PARTS, "text") if not is_empty(part.get(key))), None)
    text = text_in(value, f"{name}.{kind}")
    check_text(text, f"{name}.{kind}")
    return text


def thought_of(holder: Mapping[str, Any], name: str, answer: str) -> str | None:
    """The thought in a field of a turn, or in a column beside an answer; None where the answer holds it."""
    for key in THOUGHTS:
        if not is_empty(holder.get(key)):
            thought = text_in(holder[key], f"{name}.{key}" if name else f"`{key}`")
            check_text(thought, f"`{key}`")
            begins_with_it = answer.lstrip()[:1] in ("<", "[", "◁") and thought.strip() in answer
            return None if begins_with_it else thought
    return None


# ---------------------------------------------------------------------------------------------------------------- tools


def _calls(turn: Mapping[str, Any], name: str) -> str | None:
    """The turn's calls of tools as JSON, or None. Raises RowProblem."""
    for key in ("tool_calls", "function_call"):
        if not is_empty(turn.get(key)):
            return _json_calls(_parsed(turn[key], f"{name}.{key}"), f"{name}.{key}")
    return None


def _parsed(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_text(value)
    except ValueError:
        raise RowProblem(f"{name} must be JSON with the `name` and the `arguments` of a call") from None


def _json_calls(value: Any, name: str) -> str:
    calls = [_call(call, name) for call in (value if isinstance(value, list) else [value])]
    text = json.dumps(calls, ensure_ascii=False)
    check_text(text, name)
    return text


def _call(call: Any, name: str) -> dict[str, Any]:
    """Convert one call to OpenAI's form. Its arguments become an object where they are JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowProblem(f"{name}: a call needs the `name` of a function")
    arguments = function.get("arguments", function.get("parameters"))
    arguments = {} if is_empty(arguments) else _parsed(arguments, f"{name}: `arguments`")
    if not isinstance(arguments, dict):
        raise RowProblem(f"{name}: `arguments` must be an object, not {kind_of(arguments)}")
    own_id = {"id": str(call["id"])} if not is_empty(call.get("id")) else {}
    return {**own_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool(turn: Mapping[str, Any], name: str) -> str | None:
    told = {key: turn[key] for key in ("name", "tool_call_id") if not is_empty(turn.get(key))}
    for key, value in told.items():
        check_text(text_in(value, f"{name}.{key}"), f"{name}.{key}")
    return json.dumps(told, ensure_ascii=False) if told else None


def tools_of(row: Mapping[str, Any]) -> str | None:
    """The row's `tools` as JSON, or None. Raises RowProblem."""
    tools = row.get("tools")
    if is_empty(tools):
        return None
    if isinstance(tools, str):
        try:
            tools = parse_text(tools)
        except ValueError:
            raise RowProblem("`tools` must be a list of objects, not text") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem("`tools` must be a list of objects")
    return json.dumps(tools, ensure_ascii=False) if tools else None


def as_turn(message: Message) -> dict[str, Any]:
    """Return the turn of a data file that is read as this message, but for what it says of training."""
    thought = {} if message.thought is None else {"reasoning_content": message.thought}
    calls = {} if message.calls is None else {"tool_calls": json.loads(message.calls)}
    tool = {} if message.tool is None else json.loads(message.tool)
    return {"role": message.role, "content": message.content, **thought, **calls, **tool}
