"""`safecl gate A [B]`: judges what was measured already, without a model, as a step of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safecl.config import ConfigError
from safecl.evaluation.gates.folders import judge_folder
from safecl.evaluation.gates.junit import junit_xml
from safecl.exits import ExitCode
from safecl.storage.durable import replace_file
from safecl.terminal import Terminal


def gate_folders(arguments: Sequence[str], *, as_json: bool, json_file: Path | None, junit: Path | None) -> ExitCode:
    """Judge the first folder, against the second where there is one; print the verdict and write the files.

    arguments: one or two folders, and overrides of limits. Returns ExitCode.GATE unless the gate is passed.
    """
    folders = [argument for argument in arguments if "=" not in argument]
    if not 1 <= len(folders) <= 2:
        raise ConfigError(f"safecl gate takes one folder, or two to compare, not {len(folders)}")
    against = folders[1] if len(folders) == 2 else None
    found = judge_folder(folders[0], against, [argument for argument in arguments if "=" in argument])
    text = json.dumps(found.to_dict(), indent=2) + "\n"
    for path, content in ((json_file, text), (junit, junit_xml(found.gate, folders[0]))):
        if path is not None:
            _write(path, content)
    if as_json:
        print(text, end="", flush=True)
        return ExitCode(found.gate.exit_code)
    console = Terminal()
    console.print(f"{found.measured.folder}, {found.measured.when}", style="bold")
    console.print(found.gate.message)
    if found.against is not None:
        console.print(f"\nagainst {found.against.folder}, {found.against.when}", style="bold")
        for each in found.rates:
            console.print(f"  {each.message}")
    return ExitCode(found.gate.exit_code)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
