"""What fuzzing has found stays repaired, the inputs that it has made are read by readers' own errors only, and the
fuzzer begins with sound inputs."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tests.hostile import readers

FOUND, KEPT = Path(__file__).parent / "found", Path(__file__).parent / "inputs"
INPUTS = sorted(path for path in FOUND.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", readers.READERS)
def test_a_reader_accepts_its_seeds(name):
    assert any(readers.read(name, seed) for seed in readers.seeds(name)), name


@pytest.mark.parametrize("name", readers.READERS)
def test_a_reader_refuses_flipped_and_cut_seeds_by_its_own_errors(name):
    for seed in readers.seeds(name):
        for place in range(0, min(len(seed), 600), 3):
            for value in (0, 0xFF, seed[place] ^ 1):
                readers.read(name, seed[:place] + bytes([value]) + seed[place + 1 :])
            readers.read(name, seed[:place])


@pytest.mark.parametrize("name", readers.READERS)
def test_a_reader_accepts_or_refuses_every_input_that_fuzzing_has_made(name):
    lines = (KEPT / f"{name}.txt").read_text().split()
    assert lines
    for line in lines:
        readers.read(name, base64.b64decode(line))


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name[:12]}")
def test_an_input_that_once_broke_a_reader_is_refused_now(path):
    readers.read(path.parent.name, path.read_bytes())
