"""The terminal prints text of others as text, and every module prints on it."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

import safecl
from safecl.terminal import Terminal, fact, plain

HOSTILE = "a [/INST] [bold]b[/bold] :smile: \x1b[31m\u202e\x9b1m"
AS_TEXT = r"a [/INST] [bold]b[/bold] :smile: \x1b[31m\u202e\x9b1m"


def table(cell: object) -> Table:
    made = Table("x", title=cell if isinstance(cell, str) else None)
    made.add_column(cell)
    made.add_row(cell, cell)
    return made


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("form", [str, Text, plain, lambda text: fact(text, text), table])
def test_text_is_printed_without_what_a_terminal_would_obey(form, is_terminal):
    out = io.StringIO()
    terminal = Terminal(file=out, width=400, force_terminal=is_terminal, color_system=None)
    terminal.print(form(HOSTILE), style="bold" if is_terminal else None)
    assert AS_TEXT in out.getvalue() and not {"\x1b", "\x9b", "\u202e"} & set(out.getvalue())
    terminal.print(table(Text(HOSTILE)))
    assert not {"\x1b", "\x9b", "\u202e"} & set(out.getvalue()), "also where a cell is too small for what it shows"


def test_plain_text_is_no_markup_on_any_console():
    out = io.StringIO()
    Console(file=out, width=400).print(table(plain(HOSTILE)))
    assert AS_TEXT in out.getvalue()


def test_bars_and_spinners_show_text_and_still_move_the_cursor():
    out = io.StringIO()
    terminal = Terminal(file=out, width=400, force_terminal=True, color_system=None)
    with terminal.status(HOSTILE):
        pass
    with Progress(TextColumn("{task.description}", markup=False), console=terminal) as bar:
        bar.add_task(HOSTILE)
    assert (
        AS_TEXT in out.getvalue()
        and out.getvalue().count("[/INST]") >= 2
        and "\x1b[31m" not in out.getvalue()
        and "\x1b[2K" in out.getvalue()
    )


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """Yield the syntax of every module that prints with rich."""
    root = Path(safecl.__file__).parent
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path != root / "terminal.py" and re.search(r"\brich\b|markup\b", text):
            yield from ((path.relative_to(root), node) for node in ast.walk(ast.parse(text)))


def reads_markup(call: ast.Call) -> bool:
    given = {key.arg: ast.unparse(key.value) for key in call.keywords}
    return given.get("markup", str(ast.unparse(call.func) == "TextColumn")) == "True"


def test_no_module_has_a_console_of_its_own_or_reads_markup():
    found = []
    for path, node in nodes():
        if isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.console", "rich.markup"):
            found += [(path, name.name) for name in node.names if name.name not in ("box", "Group")]
        if isinstance(node, ast.Attribute) and node.attr == "from_markup":
            found.append((path, node.attr))
        if isinstance(node, ast.Call) and reads_markup(node):
            found.append((path, ast.unparse(node)))
    assert found == []
