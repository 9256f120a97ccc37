"""The outcome of a merge, and the model card of its folder. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl import __version__
from safecl.report.card import file_name, licence_of
from safecl.storage.sizes import format_bytes

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ParentRecord:
    """A model that was merged: its role, its path as given, and XXH3-128 of its weights (of an adapter, its own)."""

    role: str
    path: str
    xxh3_128: str


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge.

    settings: all settings of the kind. num_bytes: of the weight files. seconds: of the whole merge. notes: what was
    aligned, left out or counted.
    """

    kind: str
    out: str
    settings: Mapping[str, Any]
    parents: Sequence[ParentRecord]
    num_tensors: int
    num_files: int
    num_bytes: int
    seconds: float
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the report as lines for people."""
        models = ", ".join(f"{parent.role} {parent.path}" for parent in self.parents)
        files = f"{self.num_files} file{'s' * (self.num_files != 1)}"
        written = f"{self.num_tensors} tensors in {files}, {format_bytes(self.num_bytes)}, {self.seconds:.1f} s"
        return "\n".join([f"{self.kind} of {models}", *self.notes, f"{written}: {self.out}"])


_NOTHING = "Nothing: a merge computes weights. `safecl eval` measures them."


def card_text(kind: str, title: str, name: str, report: MergeReport, measured: str | None = None) -> str:
    """Return the model card: front matter for the hub, the parents with their hashes, the settings, and what was
    measured."""
    from huggingface_hub import ModelCardData

    hub_ids = [each.path for each in report.parents if _HUB_ID.fullmatch(each.path) and not Path(each.path).exists()]
    licences = {each.role: licence_of(each.path) for each in report.parents}
    first = next((found for found in licences.values() if found), {})
    same = all(found == first for found in licences.values())
    licence: dict[str, Any] = {**first} if same else {}
    data = ModelCardData(
        base_model=hub_ids or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["safecl", "merge", kind],
        **licence,
    )
    rows = [
        f"| {each.role} | `{file_name(each.path)}` | `{each.xxh3_128}` | {licence.get('license', 'not known')} |"
        for each, licence in zip(report.parents, licences.values(), strict=True)
    ]
    settings = [f"| {key} | `{_plain(value)}` |" for key, value in report.settings.items() if value is not None]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {_plain(name)}\n",
            f"Merged with safecl {__version__}: `{kind}`. {title}\n",
            "## Parents\n",
            "| role | model | XXH3-128 of its weights | licence |\n|---|---|---|---|",
            *rows,
            "\n## Settings\n",
            "| setting | value |\n|---|---|",
            *settings,
            *(["\n## Notes\n", *(f"- {_plain(note)}" for note in report.notes)] if report.notes else []),
            f"\n## What was measured\n\n{measured or _NOTHING}\n",
        ]
    )


def _plain(value: Any) -> str:
    return " ".join(str(value).replace("`", "'").replace("|", "/").split())
