"""The result of one proof: the right answer, that of the usual way, and that of safecl. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One silent failure, measured here, and safecl's result for the same task."""

    name: str
    """Short, as a file name."""
    failure: str
    """The failure in a few words."""
    quantity: str
    """The quantity that `right`, `usual` and `safecl` are values of."""
    right: str
    usual: str
    safecl: str
    seen: bool
    """True where the usual way was wrong in this measurement."""
    holds: bool
    """True where safecl's value is the right one."""
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Write `<name>.json`, whole or not at all."""
        path = folder / f"{self.name}.json"
        path.with_suffix(".new").write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        path.with_suffix(".new").replace(path)

    @staticmethod
    def read(path: Path) -> Finding:
        return Finding(**json.loads(path.read_text(encoding="utf-8")))
