"""One rank of `safecl proof`: `python -m safecl.proof.worker FOLDER WORK`. Started by run.py, in sets of two.

WORK is `measure` (all that kills no rank), `save-usual` or `save-safecl` (which kill the rank), or `load` (which loads
what is left, on new ranks).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safecl.distributed import environment
from safecl.exits import errors_as_messages, tracebacks
from safecl.proof.finding import Finding

USUAL, SAFECL = "saved-in-place", "saved-by-safecl"


def work(folder: Path, what: str) -> None:
    """Do one kind of work. Every rank calls it; rank 0 writes the findings."""
    from safecl.distributed.collectives import init_distributed
    from safecl.proof import torn_save

    init_distributed()
    if what == "measure":
        _measure_all(folder)
    elif what == "save-usual":
        torn_save.save_usual(folder / USUAL)
    elif what == "save-safecl":
        torn_save.save_safecl(folder / SAFECL)
    else:
        logging.disable(logging.CRITICAL)  # DeepSpeed would also log the torn file
        _write(folder, lambda: _torn_save(folder))


def _torn_save(folder: Path) -> Finding:
    from safecl.proof import torn_save

    return torn_save.finding(torn_save.load_usual(folder / USUAL), torn_save.load_safecl(folder / SAFECL))


def _measure_all(folder: Path) -> None:
    from safecl.proof import gathered_ema, lost_tail, rounded_logits, two_backwards

    for proof in (gathered_ema, two_backwards, rounded_logits, lost_tail):
        _write(folder, proof.measure)


def _write(folder: Path, measure: Callable[[], Finding]) -> None:
    began = time.perf_counter()
    finding = measure()
    if environment.rank() == 0:
        replace(finding, seconds=round(time.perf_counter() - began, 2)).write(folder)


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    tracebacks.folder = folder
    with errors_as_messages("proof"):
        work(folder, what)
