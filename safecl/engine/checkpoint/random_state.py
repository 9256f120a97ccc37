"""The state of this process's random number generators as text, so that dropout and stochastic rounding after a resume
are those of the uninterrupted run."""

from __future__ import annotations

import base64
import json
import random
from typing import cast

import numpy as np
import torch

from safecl.distributed import devices


def seed_generators(seed: int) -> None:
    """Seed torch (CPU and GPU), `random` and numpy's global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> str:
    """State of torch's CPU and current CUDA generator, of `random`, and of numpy's global generator."""
    name, keys, *rest = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state(legacy=True))
    states = {
        "torch": _encode(torch.get_rng_state().numpy()),
        "cuda": _encode(torch.cuda.get_rng_state().numpy()) if devices.on_gpu() else None,
        "python": random.getstate(),
        "numpy": [name, _encode(keys), *rest],
    }
    return json.dumps(states)


def set_random_state(text: str) -> None:
    """Restore the result of `random_state`. The CUDA generator keeps its state where either machine has no GPU."""
    states = json.loads(text)
    torch.set_rng_state(torch.from_numpy(_decode(states["torch"], np.uint8)))
    if states["cuda"] is not None and devices.on_gpu():
        torch.cuda.set_rng_state(torch.from_numpy(_decode(states["cuda"], np.uint8)))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, _decode(keys, np.uint32), *rest))


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
