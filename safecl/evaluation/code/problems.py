"""HumanEval-style problems (Chen et al. 2021, arXiv 2107.03374), and the program that an answer to one makes.

A row has `prompt` (imports, signature and docstring), `entry_point`, `test` (a function `check(candidate)`), and
usually `task_id` and `canonical_solution`, as in HumanEval.jsonl.gz.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from safecl.config import EvalConfig
from safecl.data.messages import ChatRow, DataError, Message
from safecl.data.reading.files import open_source, where
from safecl.data.reading.rows import spread

INSTRUCTION = "Complete this Python function. Answer with the whole code.\n\n```python\n{}\n```"
COLUMNS = ("prompt", "entry_point", "test")
_BLOCK = re.compile(r"```[\w+-]*[ \t]*\n(.*?)(?:\n```|$)", re.DOTALL)


def read_problems(settings: EvalConfig) -> list[ChatRow]:
    """Read the problems of `settings.path`, at most `max_rows`, taken evenly. Raises DataError for a row that is
    none."""
    source = open_source(settings.path)
    rows = [_row(row.columns or {}, source.path, row.line) for row in source.rows()]
    return [rows[i] for i in spread(len(rows), settings.max_rows)]


def _row(columns: Mapping[str, Any], path: str, line: int) -> ChatRow:
    missing = [name for name in COLUMNS if not isinstance(columns.get(name), str) or not columns[name].strip()]
    if missing:
        raise DataError(
            f"{where(path, line)}: a problem for pass@1 has {', '.join(COLUMNS)}, as in HumanEval; this row lacks "
            f"{', '.join(missing)}"
        )
    solution = str(columns.get("canonical_solution") or "")
    turns = (Message("user", INSTRUCTION.format(columns["prompt"].rstrip())), Message("assistant", solution))
    tags = {name: str(columns[name]) for name in ("task_id", *COLUMNS) if columns.get(name)}
    return ChatRow(turns, path, line, tags)


def without_tests(row: ChatRow) -> ChatRow:
    """Return a problem with its id as the only tag, as records have it."""
    return replace(row, tags={tag: value for tag, value in row.tags.items() if tag not in COLUMNS})


def program_of(answer: str, problem: Mapping[str, str]) -> str:
    """Return the program that runs the tests of a problem on an answer.

    The code is the answer's first block of code, else all of it. Where it defines the function it stands behind what
    the prompt has before that function; else it goes on from the prompt, up to the first line that is not indented.
    """
    block = _BLOCK.search(answer)
    code, prompt, name = block[1] if block else answer, problem["prompt"], problem["entry_point"]
    definition = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    if definition.search(code):
        begins = definition.search(prompt)
        solved = f"{prompt[: begins.start()] if begins else ''}\n{code}"
    else:
        solved = prompt.rstrip("\n") + "\n" + _body(code)
    return f"{solved}\n\n{problem['test']}\n\ncheck({name})\n"


def _body(code: str) -> str:
    """Return a continuation of the prompt's function, indented."""
    lines = code.strip("\n").split("\n")
    if lines and lines[0].strip() and not lines[0][:1].isspace():
        lines[0] = "    " + lines[0]
    inside = [lines[0]] if lines else []
    for line in lines[1:]:
        if line.strip() and not line[:1].isspace():
            break
        inside.append(line)
    return "\n".join(inside)
