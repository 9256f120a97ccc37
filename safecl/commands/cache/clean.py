"""The bodies of `safecl cache ls` and `safecl cache clean`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from safecl.config import ConfigError, parse_yaml
from safecl.report.page import bytes_text
from safecl.storage.cache_entries import Entry, cache_entries, chosen
from safecl.storage.cache_folder import cache_folder
from safecl.terminal import Terminal, plain

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def list_cache(as_json: bool) -> None:
    """Print all entries."""
    entries = cache_entries()
    if as_json:
        print(json.dumps([_plain(entry) for entry in entries], indent=2))
        return
    console = Terminal()
    if entries:
        _print_table(console, entries)
    total = bytes_text(sum(entry.num_bytes for entry in entries))
    console.print(f"{len(entries)} entries, {total} in {cache_folder()}")


def clean_cache(run: Path | None, older_than: str | None, *, every: bool, dry_run: bool) -> None:
    """Remove the chosen entries, and print what was removed. Raises ConfigError where nothing is chosen to be removed,
    or the run has no config."""
    if run is None and older_than is None and not every:
        raise ConfigError("say what to remove: --run RUN, --older-than 30d, or --all")
    entries = cache_entries()
    if not every:
        sources = _files_of(run) if run is not None else None
        seconds = _seconds(older_than) if older_than is not None else None
        entries = chosen(entries, sources=sources, older_than=seconds)
    console = Terminal()
    if entries:
        _print_table(console, entries)
    for entry in entries if not dry_run else ():
        entry.remove()
    done = "would be removed" if dry_run else "removed"
    total = bytes_text(sum(entry.num_bytes for entry in entries))
    console.print(f"{len(entries)} entries {done}, {total}")


def _print_table(console: Terminal, entries: Sequence[Entry]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("kind", "of", "size", "unused", "text"):
        table.add_column(title, justify="right" if title in ("size", "unused") else "left", overflow="fold")
    for entry in entries:
        days = f"{entry.seconds / 86400:.1f} d"
        text = "users' text" if entry.holds_text else "no"
        table.add_row(entry.kind, plain(entry.source), bytes_text(entry.num_bytes), days, text)
    console.print(table, soft_wrap=False)


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        "path": str(entry.path),
        "kind": entry.kind,
        "of": entry.source,
        "bytes": entry.num_bytes,
        "unused_seconds": round(entry.seconds),
        "holds_text": entry.holds_text,
    }


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    if found is None:
        raise ConfigError(f"--older-than {text}: write a number and m, h, d or w, such as 30d")
    return float(found[1]) * _UNITS[found[2]]


def _files_of(run: Path) -> set[str]:
    """Return the files of rows that the run's config names."""
    path = run / "config.yaml" if run.is_dir() else run
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
        files = [task.get("train") for task in tree.get("tasks") or ()]
        files += [(tree.get(section) or {}).get("source") for section in ("memory", "poison")]
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (AttributeError, TypeError):
        raise ConfigError(f"{path}: is no run config") from None
    return {str(file) for file in files if file}
