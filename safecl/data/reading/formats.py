"""Converts the columns of one row to messages. The format is detected from the columns, or named in the config.

messages           {"messages": [{"role": "user", "content": "..."}, ...]}
                   of OpenAI; `train` or `weight` per message
prompt_completion  {"prompt": "..." or [messages], "completion" | "answer" | "response": the same, "system", "history"}
                   of TRL and TRACE
alpaca             {"instruction", "input" | "context", "output" | "response", "system", "history"}
                   of Stanford Alpaca and Dolly
sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...]}
text               {"text": "..."}; every token is trained
fields             templates over the row's own columns, for anything else

A list of messages may stand in its cell as JSON text. What a turn may hold is in `turns.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from safecl.data.messages import Message, RowProblem, columns_of
from safecl.data.reading.cells import is_empty, parse_text, turns_in
from safecl.data.reading.turns import read_turns, text_in, thought_of, tools_of

ANSWERS = ("completion", "answer", "response")


def column_of(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise RowProblem(f"no `{name}`; the row has {columns_of(row)}")
    return row[name]


def _system(row: Mapping[str, Any]) -> list[Message]:
    system = row.get("system")
    return [] if system is None or system == "" else [Message("system", text_in(system, "`system`"))]


def _from_messages(row: Mapping[str, Any]) -> list[Message]:
    messages = with_system(row, read_turns(column_of(row, "messages"), "messages"))
    unmask = row.get("unmask")
    if unmask not in (None, False, True):
        raise RowProblem("`unmask` must be true or false")
    if unmask:  # the row asks for all of its turns to be trained, not only the assistant's
        messages = [m if m.role == "system" or m.train is not None else replace(m, train=True) for m in messages]
    return messages


def turns_of_cell(value: Any, name: str) -> list[Message] | None:
    """The turns that a cell holds, as a list or as text; None where it holds plain text."""
    try:
        turns = turns_in(value)
    except ValueError as error:
        raise RowProblem(f"`{name}` looks like a list of messages, but is {error}") from None
    return None if turns is None else read_turns(turns, name)


def _plain_text(value: Any, name: str) -> str:
    """Text of a cell that stands for one message. A list of messages as text is no such cell."""
    if isinstance(value, str) and turns_of_cell(value, name) is not None:
        raise RowProblem(f"`{name}` holds a list of messages; name the column `messages`, or write the text alone")
    return text_in(value, f"`{name}`")


def _from_prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    answer_name = next((name for name in ANSWERS if name in row), "completion")
    prompt, answer = column_of(row, "prompt"), column_of(row, answer_name)
    asked, answered = turns_of_cell(prompt, "prompt"), turns_of_cell(answer, answer_name)
    # Earlier answers are context: only the completion is trained.
    before = [replace(m, train=bool(m.train)) for m in _history(row.get("history"))]
    if asked is None:
        asked = [*_system(row), *before, Message("user", text_in(prompt, "`prompt`"))]
    else:
        system, *turns = with_system(row, [replace(m, train=bool(m.train)) for m in asked])
        asked = [system, *before, *turns] if system.role == "system" else [*before, system, *turns]
    return asked + (answered if answered is not None else [_answer(row, answer_name)])


def _answer(row: Mapping[str, Any], name: str) -> Message:
    text = _plain_text(column_of(row, name), name)
    return Message("assistant", text, thought=thought_of(row, "", text))


def _from_alpaca(row: Mapping[str, Any]) -> list[Message]:
    instruction = _plain_text(column_of(row, "instruction"), "instruction")
    context_name = "input" if "input" in row else "context"
    context = row.get(context_name)
    context = "" if context is None else _plain_text(context, context_name)
    asked = f"{instruction}\n\n{context}" if instruction.strip() and context.strip() else instruction or context
    answer = _answer(row, "output" if "output" in row else "response")
    return [*_system(row), *_history(row.get("history")), Message("user", asked), answer]


def _history(history: Any) -> list[Message]:
    if is_empty(history):
        return []
    if (turns := turns_of_cell(history, "history")) is not None:
        return turns
    if isinstance(history, str):
        try:
            history = parse_text(history)
        except ValueError:
            raise RowProblem("`history` must be a list of [user, assistant] pairs, not text") from None
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowProblem("`history` must be a list of [user, assistant] pairs")
    texts = [
        (text_in(asked, f"history[{i}][0]"), text_in(said, f"history[{i}][1]"))
        for i, (asked, said) in enumerate(history)
    ]
    return [message for asked, said in texts for message in (Message("user", asked), Message("assistant", said))]


def with_tools(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Add the row's `tools` to the first of its messages. Raises RowProblem."""
    tools = tools_of(row)
    return messages if tools is None else (replace(messages[0], tools=tools), *messages[1:])


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    return with_system(row, read_turns(column_of(row, "conversations"), "conversations"))


def with_system(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Put the row's `system` before turns that have no system message of their own."""
    return turns if turns and turns[0].role == "system" else _system(row) + turns


def _from_text(row: Mapping[str, Any]) -> list[Message]:
    return [Message("text", _plain_text(column_of(row, "text"), "text"))]


# ------------------------------------------------------------------------------------------------------------- choosing

READERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "text": _from_text,
}


def detect(columns: Iterable[str]) -> str | None:
    """Format of a row with these columns, or None."""
    columns = set(columns)
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if "instruction" in columns and columns & {"output", "response"}:
        return "alpaca"
    if "prompt" in columns and columns & set(ANSWERS):
        return "prompt_completion"
    return "text" if "text" in columns else None
