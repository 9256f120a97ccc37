"""The pages in docs/examples, as `python docs/examples.py` has made them, without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PAGES = ("comparison", "run", "sequence", "sweep")
LOADING = {"src", "href", "srcset", "action", "data", "poster"}
VOID = {"meta", "br", "hr", "img", "input", "link", "line", "path", "circle", "rect", "polyline", "use"}


class Elements(HTMLParser):
    """Collects elements, and texts by class, and sees that elements are closed in turn."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.targets: list[str] = []
        self.badges: list[str] = []
        self._in_badge = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.targets += [value for name, value in attrs if name in LOADING]
        self._in_badge = "badge" in (dict(attrs).get("class") or "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes another element, line {self.getpos()[0]}"

    def handle_data(self, data):
        if self._in_badge and data.strip():
            self.badges.append(data.strip())
        self._in_badge = False


def test_the_examples_are_the_pages_that_the_documentation_names():
    assert tuple(sorted(path.stem for path in EXAMPLES.glob("*.html"))) == PAGES
    named = set(re.findall(r"examples/(\w+)\.html", (EXAMPLES.parent / "report.md").read_text()))
    assert named == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_an_example_is_whole_has_a_badge_and_asks_for_nothing(name):
    page = (EXAMPLES / f"{name}.html").read_text()
    found = Elements(page)
    assert found.open == [] and page.rstrip().endswith("</html>")
    assert found.badges[0] in ("PASSED", "FAILED", "UNDECIDED", "MIXED"), found.badges
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & found.names
    assert all(target.startswith("#") for target in found.targets), found.targets
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page)
