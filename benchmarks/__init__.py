"""Benchmarks, each a module that starts from the root of the repository: `python -m benchmarks.kernels.flat`.

docs/architecture.md lists the rooms. `results/` holds what was measured.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The root of the repository."""
