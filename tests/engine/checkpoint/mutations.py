"""Random damage to a checkpoint folder: flipped, cut, grown, deleted, renamed, swapped, replaced."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

MUTATIONS = ("flip", "truncate", "grow", "delete", "rename", "swap", "zero", "folder renamed")


def mutate(folder: Path, kind: str, seed: int) -> str:
    """Damages a checkpoint and says how."""
    rng = np.random.default_rng([seed, MUTATIONS.index(kind)])
    paths = sorted(folder.iterdir())
    path, other = (paths[i] for i in rng.choice(len(paths), 2, replace=False))
    data = bytearray(path.read_bytes())
    place = int(rng.integers(len(data)))
    if kind == "flip":
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    elif kind == "truncate":
        os.truncate(path, place)
    elif kind == "grow":
        path.write_bytes(data + rng.bytes(int(rng.integers(1, 100))))
    elif kind == "delete":
        path.unlink()
    elif kind == "rename":
        path.rename(folder / f"x{path.name}")
    elif kind == "swap":
        path.rename(folder / "between")
        other.rename(path)
        (folder / "between").rename(other)
    elif kind == "zero":
        # a stretch that a lost write left empty; at least one byte in it was not zero
        end = next(i for i in range(place, place + len(data)) if data[i % len(data)]) % len(data)
        low, high = sorted((place, end))
        data[low : high + 1] = bytes(high + 1 - low)
        path.write_bytes(data)
    elif kind == "folder renamed":
        shutil.move(folder, folder.with_name(f"step-{int(rng.integers(21, 10**7)):08d}"))
    return f"{kind} of {path.name} at byte {place} of {len(data)}"
