"""The pages as a headless Chromium draws them: above the fold, in light and dark, on paper. Colours given to parts of
the page by a style sheet of the test tell where they are drawn."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from safecl.evaluation import Evaluation
from safecl.report.comparison import comparison_page, read_runs
from safecl.report.folder import read_run
from safecl.report.run import run_report
from tests.report.folders import ANSWER, gate, provenance, safety, task, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
PLAIN = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")

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


def chromium(page: str, folder: Path, *options: str) -> None:
    (folder / "page.html").write_text(page)
    subprocess.run(
        [CHROMIUM, *PLAIN, f"--user-data-dir={folder}/profile", *options, f"file://{folder}/page.html"],
        check=True,
        capture_output=True,
        timeout=120,
    )


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


def test_a_page_has_a_dark_form_with_light_letters(page, tmp_path):
    light = pixels(page, tmp_path, 800, 600)
    dark = pixels(page, tmp_path, 800, 600, "--blink-settings=preferredColorScheme=0")
    assert light[-1, 0].min() == 255 and dark[-1, 0].max() < 50
    assert light.min() < 60 and dark.max() > 200


def test_the_wide_tables_of_a_comparison_do_not_widen_the_page(page, tmp_path):
    runs = [write_run(tmp_path / f"run-{i}", hits=i, provenance=provenance()) for i in range(4)]
    shot = pixels(comparison_page(read_runs(runs)), tmp_path, 390, 3000)
    assert (shot[:, -8:] == 255).all(), "the right margin stays empty: tables scroll inside of it"


def test_on_paper_the_record_is_unfolded_and_harmful_text_stays_folded(page, tmp_path):
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine (Debian: apt-get install poppler-utils)")
    chromium(page, tmp_path, f"--print-to-pdf={tmp_path}/page.pdf", "--no-pdf-header-footer")
    text = subprocess.run(["pdftotext", "-layout", tmp_path / "page.pdf", "-"], capture_output=True, text=True).stdout
    assert "FAILED" in text.splitlines()[0] and "examples: full" in text and "For the auditor" in text
    assert "disallowed prompts with their answers" in text and ANSWER[:12] not in text and "alert(" not in text


def test_without_scripts_and_network_the_page_is_the_same(page, tmp_path):
    assert (
        pixels(page, tmp_path, 600, 500) == pixels(page, tmp_path, 600, 500, "--blink-settings=scriptEnabled=false")
    ).all()
