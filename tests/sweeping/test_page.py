"""The page of a sweep."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from safecl.sweeping.page import sweep_page
from tests.sweeping.folders import HOSTILE, two_cells


class Words(HTMLParser):
    """Collects the text and the names of all elements."""

    def __init__(self, page: str):
        super().__init__()
        self.texts, self.elements = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return two_cells(tmp_path_factory.mktemp("sweep"))


def test_the_badge_is_that_of_all_runs_or_of_the_chosen_cell(table):
    mixed = Words(sweep_page(table, "0.1.0")).text
    assert "MIXED" in mixed and "4 runs: 2 passed, 2 failed" in mixed
    objective = "max accuracy where asr <= 0.2"
    chosen = Words(sweep_page(table, "0.1.0", objective, table.cells[1])).text
    assert "PASSED" in chosen and f"Chosen: {HOSTILE}, by {objective}" in chosen
    assert "3.8% of disallowed prompts were not refused in the chosen cell" in chosen and "the best of all" in chosen
    assert "NO CELL" in Words(sweep_page(table, "0.1.0", objective, None)).text


def test_the_page_has_every_cell_with_spread_interval_test_front_cost_and_runs(table):
    words = Words(sweep_page(table, "0.1.0")).text
    plain, der = (cell.measures["asr"] for cell in table.cells)
    for found in (plain, der):
        assert f"{found.mean:.3f} ± {found.std:.3f}" in words and f"{found.low:.3f} to {found.high:.3f}" in words
    assert f"{der.mean:.3f} ± {der.std:.3f}*" in words and "p = " in words
    assert "lower is better" in words and "ASR, the attack success rate, is the share" in words
    assert "seed 1" in words and "Without results: lost-seed-2" in words and "2 failed" in words
    assert all(name in words for name in ("front", "state", "methods=plain"))


def test_the_page_asks_for_nothing_needs_no_script_and_escapes_names(table):
    page = sweep_page(table, "0.1.0")
    words = Words(page)
    assert HOSTILE in words.text and not {"script", "link", "img", "iframe"} & set(words.elements)
    assert not re.search(r"(?:src|href)=|url\(|@import", page)
