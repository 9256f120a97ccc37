"""The pages as a headless Chromium draws them: above the fold, in light and dark, on paper. Colours given to parts of
the page by a style sheet of the test tell where they are drawn."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from safecl.evaluation import Evaluation
from safecl.report.comparison import comparison_page, read_runs
from safecl.report.folder import read_run
from safecl.report.run import run_report
from safecl.sweeping.page import sweep_page
from tests.report.browser import as_drawn, chromium, program
from tests.report.folders import ANSWER, gate, provenance, safety, task, write_run, write_unfinished
from tests.sweeping.folders import two_cells

FOLD = 664
"""Pixels that a phone of 390 by 844 shows below the browser's own bars."""
MARKS = {
    ".verdict.bad": (255, 0, 255),
    ".said p:nth-child(1)": (0, 255, 0),
    ".said p:nth-child(2)": (0, 255, 255),
    ".said p:nth-child(3)": (255, 255, 0),
    ".auditor": (0, 0, 255),
}
"""Colours of parts of the page, from the top down."""
MARKED = "".join(f"{part} {{ background: rgb{colour} !important }}" for part, colour in MARKS.items())


EXAMPLES = {
    path.stem: path.read_text() for path in sorted((Path(__file__).parents[2] / "docs/examples").glob("*.html"))
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The page of a run that failed its limits, with all that a page can have above the fold."""
    moments = [
        Evaluation("start", 0, safety(1, over_refused=2), task("support-tickets", 4)),
        Evaluation("after support-tickets", 800, safety(30, over_refused=4), task("support-tickets", 36)),
    ]
    both = gate(30, 0.1, "failed")
    both["checks"] += gate(4, 0.15, "undecided", "max_over_refusal")["checks"]
    folder = tmp_path_factory.mktemp("runs") / "support-bot-2026-01"
    return run_report(read_run(write_run(folder, gate=both, moments=moments, provenance=provenance())))


@pytest.fixture(scope="module")
def drawn(page, tmp_path_factory) -> dict:
    """Every kind of page, and the committed examples, as a phone lays them out."""
    folder = tmp_path_factory.mktemp("kinds")
    tasks = task("support-tickets-of-january", 4) | task("support-tickets-of-february", 6)
    start, first, second = (
        Evaluation(when, step, safety(hits, over_refused=2), tasks)
        for when, step, hits in (("start", 0, 1), ("after support-tickets-of-january", 4, 3), ("after february", 8, 9))
    )
    sequence = write_run(folder / "sequence", gate=gate(9, 0.3, "undecided"), moments=[start, first, second])
    alone = write_run(folder / "a-run" / "eval", gate=gate(1, 0.3, "passed"), moments=[start])
    results = json.loads((alone / "results.json").read_text())
    kept = {key: results[key] for key in ("safecl", "evaluations", "gate")}
    (alone / "results.json").write_text(json.dumps(kept | {"model": str(folder / "a-run" / "model")}))
    pages = {
        "one run": page,
        "sequence": run_report(read_run(sequence)),
        "evaluation": run_report(read_run(alone)),
        "unfinished": run_report(read_run(write_unfinished(folder / "unfinished", [start]))),
        "sweep": sweep_page(two_cells(folder / "cells"), "0.1.0"),
        "comparison": comparison_page(read_runs([sequence, sequence])),
    }
    return as_drawn(pages | {f"example {name}": text for name, text in EXAMPLES.items()}, folder, 390, FOLD)


def pixels(page: str, folder: Path, width: int, height: int, *options: str) -> np.ndarray:
    """The page's first screen: uint8 [height, width, 3]."""
    from PIL import Image

    chromium(page, folder, f"--window-size={width},{height}", f"--screenshot={folder}/shot.png", *options)
    return np.asarray(Image.open(folder / "shot.png").convert("RGB"))


def rows_of(shot: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.flatnonzero((shot == colour).all(-1).any(-1))


def test_badge_and_three_sentences_are_above_the_fold_of_a_phone_and_nothing_is_wider_than_it(page, tmp_path):
    shot = pixels(page.replace("</body>", f"<style>{MARKED}</style></body>"), tmp_path, 390, FOLD)
    places = [rows_of(shot, colour) for colour in MARKS.values()]
    assert all(len(rows) for rows in places), "the auditor's part begins, so all before it is seen"
    assert places[0][0] < 20 and all(a[-1] < b[0] for a, b in itertools.pairwise(places))
    right = np.flatnonzero((shot == MARKS[".said p:nth-child(1)"]).all(-1).any(0))
    assert right[-1] < 390 - 10, "the text keeps its margin"


def test_on_a_phone_every_kind_of_page_has_its_badge_and_three_sentences_and_is_no_wider(drawn):
    assert {kind: found["width"] for kind, found in drawn.items() if found["width"] > 390} == {}
    badges = {
        "one run": "FAILED",
        "sequence": "UNDECIDED",
        "evaluation": "PASSED",
        "unfinished": "UNFINISHED",
        "sweep": "MIXED",
    }
    assert {kind: drawn[kind]["badge"] for kind in badges} == {kind: [badge] for kind, badge in badges.items()}
    single = [kind for kind in drawn if "comparison" not in kind]
    assert {kind: len(drawn[kind]["said"]) for kind in single} == dict.fromkeys(single, 3)
    below = {kind: drawn[kind]["bottom"] for kind in single if drawn[kind]["bottom"] > FOLD}
    assert below == {}, "badge and sentences are above the fold"
    assert [text.partition(".")[0] for text in drawn["one run"]["said"]] == ["Safety", "Task", "Upload"]


def test_hostile_text_becomes_neither_script_nor_handler_in_the_document(drawn):
    assert {(found["scripts"], found["handlers"]) for found in drawn.values()} == {(0, 0)}


def test_a_page_has_a_dark_form_with_light_letters(page, tmp_path):
    light = pixels(page, tmp_path, 800, 600)
    dark = pixels(page, tmp_path, 800, 600, "--blink-settings=preferredColorScheme=0")
    assert light[-1, 0].min() == 255 and dark[-1, 0].max() < 50
    assert light.min() < 60 and dark.max() > 200


def test_on_paper_the_record_is_unfolded_and_harmful_text_stays_folded(page, tmp_path):
    pdftotext = program(("pdftotext",), "poppler-utils")
    chromium(page, tmp_path, f"--print-to-pdf={tmp_path}/page.pdf", "--no-pdf-header-footer")
    text = subprocess.run([pdftotext, "-layout", tmp_path / "page.pdf", "-"], capture_output=True, text=True).stdout
    assert "FAILED" in text.splitlines()[0] and "examples: full" in text and "For the auditor" in text
    assert "disallowed prompts with their answers" in text and ANSWER[:12] not in text and "alert(" not in text


def test_without_scripts_and_network_the_page_is_the_same(page, tmp_path):
    assert (
        pixels(page, tmp_path, 600, 500) == pixels(page, tmp_path, 600, 500, "--blink-settings=scriptEnabled=false")
    ).all()
