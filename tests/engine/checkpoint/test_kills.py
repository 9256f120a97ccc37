"""kill -9 of real ranks in the middle of a save: the old or the new checkpoint comes back, bitwise, and the run goes
on."""

from __future__ import annotations

import pytest

from tests.engine.checkpoint import kill_scenes

RUN = dict(methods={"er": {}, "ema": {"decay": 0.9}}, deepspeed={"stage": 2})

# Some of the labelled points, on both ranks; benchmarks/faults/sections.py goes through all of them.
POINTS = [
    ("memory.index: written", 0),
    ("renamed", 0),
    ("rank-00001.safetensors: partly written", 1),
    ("manifest.json: partly written", 0),
    ("marked for deletion", 0),
    ("copied", 1),
]


@pytest.mark.long
def test_a_run_whose_ranks_are_killed_in_every_save_goes_on_from_the_old_or_the_new_checkpoint(rank_pool, tmp_path):
    expected = rank_pool(2).run(kill_scenes.reference, folder=str(tmp_path / "whole"), steps=len(POINTS), **RUN)[0]
    (tmp_path / "killed").mkdir()
    assert not kill_scenes.kill_at_every(POINTS, tmp_path / "killed", expected, **RUN)
