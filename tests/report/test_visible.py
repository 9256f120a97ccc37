"""Text of a run is shown as text: no markup, no links, nothing that acts on a terminal or turns the direction."""

from __future__ import annotations

import dataclasses

from safecl.config.texts import visible
from safecl.report.card import TrainedOn
from safecl.report.page import render
from safecl.report.visible import markdown, one_line
from tests.report.test_card import card

HOSTILE = "x<img src=x onerror=alert(1)>`|\x1b[31m\u202e[a](http://b)\n# head"


def test_control_characters_and_marks_of_direction_are_shown():
    assert visible("a\x1b[31mb\u202ec\td\ne\x00\u2066") == "a\\x1b[31mb\\u202ec\td\ne\\x00\\u2066"
    assert visible("é ü 中文 שלום 👩\u200d🚀") == "é ü 中文 שלום 👩\u200d🚀"


def test_markdown_has_no_markup():
    assert markdown("<b>&*[x](y)`") == r"&lt;b&gt;&amp;\*\[x\](y)\`"
    assert "\n" not in markdown(HOSTILE) and "\n" not in one_line(HOSTILE) and "`" not in one_line(HOSTILE)


def test_a_card_shows_hostile_names_as_text(tmp_path):
    own = card(tmp_path)
    evaluations = [dataclasses.replace(each, when=f"after {HOSTILE}") for each in own.evaluations]
    data = [TrainedOn(f"task `{one_line(HOSTILE)}`", HOSTILE, 1, "f" * 32)]
    text = dataclasses.replace(own, name=HOSTILE, evaluations=evaluations, data=data).text()
    outside = "".join(text.replace("\\`", "").split("`")[::2])  # what is in no code span
    assert "<img" not in outside and "[a](" not in outside.replace("\\[a\\](", "")
    assert "\n# head" not in text and "\x1b" not in text and "\u202e" not in text


def test_a_page_shows_control_characters_and_escapes_markup():
    nothing = dict.fromkeys(("runs", "rows", "columns", "prompts", "course", "withheld"), ())
    page = render("comparison.html", **nothing, warnings=[HOSTILE], version="1")
    assert "<img" not in page and "\x1b" not in page and "\u202e" not in page and "\\x1b" in page
