"""The rows of a run's memory, as `safecl memory export` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from tests.equality.ranks import ROOT, run_safecl


def exported_rows(folder: Path, run: str, root: Path = ROOT) -> list[dict[str, Any]]:
    """All columns of the rows that the memory of the run folder `run` holds, in its order."""
    output = folder / "rows.parquet"
    ended = run_safecl(["memory", "export", run, output.name, "--no-text"], folder, root=root)
    assert ended.codes == [0], ended.said
    rows = parquet.read_table(output).to_pylist()
    output.unlink()
    return rows
