"""One set-up of a headless Chromium, for the tests that look at pages."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

REQUIRED = os.environ.get("SAFECL_BROWSER") == "required"
"""Set where the programs are installed (.github/workflows/ci.yml): there a missing one is a failure."""
PLAIN = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")


def program(names: tuple[str, ...], package: str) -> str:
    """Path of the first of these programs. Without any the test is skipped, or fails where they are required."""
    for path in map(shutil.which, names):
        if path is not None:
            return path
    said = f"no {names[0]} on this machine (Debian: apt-get install {package})"
    pytest.fail(said) if REQUIRED else pytest.skip(said)


def chromium(page: str, folder: Path, *options: str) -> str:
    """Open a page, and return what Chromium writes. Fails where a script of the page fails or writes anything."""
    (folder / "page.html").write_text(page)
    done = subprocess.run(
        [
            program(("chromium", "chromium-browser", "google-chrome"), "chromium"),
            *PLAIN,
            f"--user-data-dir={folder}/profile",
            *options,
            f"file://{folder}/page.html",
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


MEASURE = """
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
    found[frame.name] = {
      width: page.documentElement.scrollWidth,
      badge: all(".verdict .badge").map(part => part.innerText),
      said: all(".said p, p.said").map(part => part.innerText),
      bottom: Math.max(0, ...all(".said p, p.said").map(part => part.getBoundingClientRect().bottom)),
      scripts: page.scripts.length,
      handlers: all("*").filter(part => part.getAttributeNames().some(name => name.startsWith("on"))).length,
    };
  }
  document.body.textContent = JSON.stringify(found);
});
"""


def as_drawn(pages: Mapping[str, str], folder: Path, width: int, height: int) -> dict[str, dict[str, Any]]:
    """Lay out pages, each in a frame of this size, and measure them in the document that Chromium has made of each.

    Returns by page: its width in pixels, the texts of badge and sentences, the lowest edge of these, and the numbers of
    scripts and handlers.
    """
    size = f'width="{width}" height="{height}" style="border: 0"'
    frames = [f'<iframe name="{name}" {size} srcdoc="{html.escape(page)}"></iframe>' for name, page in pages.items()]
    around = f"<!doctype html><meta charset=utf-8><body>{''.join(frames)}<script>{MEASURE}</script>"
    written = chromium(around, folder, "--dump-dom")
    (text,) = re.findall(r"<body>(.*)</body>", written, re.DOTALL)
    return json.loads(html.unescape(text))
