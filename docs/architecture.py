"""Draws docs/architecture.svg, the rooms of the package, from the import contracts in pyproject.toml (`make docs`)."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"

ROOMS = {
    "cli": "the verbs of the command line",
    "commands": "the bodies of the verbs, one file each",
    "proof": "five silent failures, each measured beside safecl",
    "demo": "the built-in demonstration: corpus, tiny model, runs",
    "sweeping": "grids of runs, their table and the winner",
    "training": "the loop: tasks, steps, measurements, resuming, the run folder",
    "planning": "what will run and what it takes, before a model is loaded",
    "merging": "arithmetic on checkpoints: one file per merge",
    "report": "pages and model cards of finished runs",
    "scan": "screening an upload before training",
    "engine": "the DeepSpeed side",
    "evaluation": "answers, scorers, statistics and gates",
    "replay": "the replay memory: what stays and what is drawn",
    "data": "rows, chat templates, masks, order and batches",
    "methods": "one file per continual-learning method",
    "launching": "torchrun, deepspeed, Slurm, Kubernetes",
    "exits": "exit codes and how a process ends",
    "distributed": "launchers, collectives, nodes and signals",
    "storage": "files that are whole or absent, locks, folders",
    "terminal": "prints text of others as text",
    "config": "one typed tree with strict keys, read without torch",
    "kernels": "Triton, C++ and torch code that knows tensors only",
}
ENGINE = {
    "artifacts": "what is computed once per base model and shared by runs",
    "teachers": "streamed, online and recorded teachers",
    "checkpoint": "saving, loading, model folders",
    "fisher": "estimate, file and penalty",
    "passes": "one forward and one backward pass, micro-batches and losses",
    "zero": "the flat shards, their state and the optimizer",
    "reference": "the aligned weights, once per node",
    "model": "trunk and fused head as one module, adapters, start-up checks",
}

WIDTH, MARGIN, GAP, ROW, INNER_ROW = 920, 20, 8, 44, 36
STYLE = """
  text { font-family: system-ui, sans-serif; fill: #1b2a2f }
  .room { font-weight: 600; font-size: 14px }
  .about { font-size: 12px; fill: #4a5b61 }
  rect { rx: 6; stroke-width: 1; stroke: #8aa5a8 }
"""


def layers(contract: str) -> list[list[str]]:
    """The rooms of a contract of pyproject.toml, the highest layer first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (found,) = [each["layers"] for each in settings["contracts"] if each["id"] == contract]
    return [[room.strip() for room in layer.split("|")] for layer in found if layer != "__main__"]


def picture() -> str:
    """The SVG as text."""
    body, y = [], MARGIN
    for rooms in layers("rooms"):
        if rooms == ["engine"]:
            drawn, height = _engine(y)
        else:
            drawn, height = _layer(rooms, ROOMS, MARGIN, y, WIDTH - 2 * MARGIN, ROW, "#e6f2f1"), ROW
        body += drawn
        y += height + GAP
    title = "The rooms of safecl. Each room imports only rooms that are drawn below it."
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + MARGIN}" role="img" aria-label="{title}">'
    )
    paper = f'<rect width="{WIDTH}" height="{y + MARGIN}" style="fill: #ffffff; stroke: none; rx: 0"/>'
    note = f'<text class="about" x="{MARGIN}" y="{y + 10}">{title}</text>'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", paper, *body, note, "</svg>"]) + "\n"


def _engine(y: int) -> tuple[list[str], int]:
    """The engine with its own layers inside, and its height."""
    inner = layers("engine")
    height = ROW + len(inner) * (INNER_ROW + GAP)
    drawn = [
        _box(MARGIN, y, WIDTH - 2 * MARGIN, height, "#d3e6ea"),
        *_words("engine", ROOMS["engine"], MARGIN + 12, y + 27),
    ]
    for number, rooms in enumerate(inner):
        top = y + ROW + number * (INNER_ROW + GAP)
        drawn += _layer(rooms, ENGINE, 2 * MARGIN, top, WIDTH - 4 * MARGIN, INNER_ROW, "#f4f9fa")
    return drawn, height


def _layer(rooms: list[str], about: dict[str, str], x: int, y: int, width: int, height: int, fill: str) -> list[str]:
    """Rooms of one layer side by side."""
    each = (width - GAP * (len(rooms) - 1)) // len(rooms)
    drawn = []
    for number, room in enumerate(rooms):
        left = x + number * (each + GAP)
        drawn += [_box(left, y, each, height, fill), *_words(room, about[room], left + 12, y + height // 2 + 5)]
    return drawn


def _box(x: int, y: int, width: int, height: int, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" style="fill: {fill}"/>'


def _words(room: str, about: str, x: int, y: int) -> list[str]:
    return [
        f'<text class="room" x="{x}" y="{y}">{escape(room)}</text>',
        f'<text class="about" x="{x + 102}" y="{y}">{escape(about)}</text>',
    ]


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
