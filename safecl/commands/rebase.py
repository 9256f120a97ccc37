"""`safecl rebase`: moves a tuned model onto a re-aligned base, without the data of its tuning."""

from __future__ import annotations

from pathlib import Path

from safecl.commands.merge import Parents, merge_models


def rebase_model(overrides: list[str], *, old: str, new: str, tuned: str, out: Path, as_json: bool) -> None:
    """Merge by the kind `rebase`, and print its report. Raises ConfigError for models that do not fit."""
    merge_models("rebase", overrides, out=out, parents=Parents(old, [tuned], new, None), as_json=as_json)
