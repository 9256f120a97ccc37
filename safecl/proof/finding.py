"""What one proof has measured: the right answer, what the usual way gave, and what safecl gave. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One silent failure, measured live beside safecl."""

    name: str
    """Short, as a file name."""
    failure: str
    """What goes wrong, in a few words."""
    quantity: str
    """What `right`, `usual` and `safecl` are numbers of."""
    right: str
    usual: str
    safecl: str
    seen: bool
    """True where the usual way was wrong here: the failure is not a rumour."""
    holds: bool
    """True where safecl's number is the right one."""
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Into `<name>.json`, whole or not at all."""
        path = folder / f"{self.name}.json"
        path.with_suffix(".new").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    @staticmethod
    def read(path: Path) -> Finding:
        return Finding(**json.loads(path.read_text(encoding="utf-8")))
