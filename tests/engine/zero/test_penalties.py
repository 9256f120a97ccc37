"""Where penalties join an update: one in the fused pass, the others before it."""

from __future__ import annotations

import pytest

from safecl.engine.zero.penalties import place_penalties
from safecl.methods.terms import AverageMask, Penalty

L2, EWC, ONLINE = Penalty(1.0), Penalty(2.0, fisher="fisher"), Penalty(3.0, "online_anchor", "online_fisher")
MASK = AverageMask("online_fisher", threshold=0.5, decay=1.0)


@pytest.mark.parametrize(
    ("penalties", "mask", "in_pass", "before"),
    [
        ([], None, None, []),
        ([L2], None, L2, []),
        ([L2, EWC, ONLINE], None, L2, [EWC, ONLINE]),
        ([L2, EWC], MASK, None, [L2, EWC]),
        ([L2, ONLINE, EWC], MASK, ONLINE, [L2, EWC]),
        ([], MASK, None, []),
    ],
)
def test_the_first_penalty_that_fits_is_in_the_pass_and_the_others_before_it(penalties, mask, in_pass, before):
    """A masked average reads a Fisher in the pass, so a penalty with another one does not fit."""
    places = place_penalties(penalties, mask)
    assert (places.in_pass, list(places.before_pass)) == (in_pass, before)
