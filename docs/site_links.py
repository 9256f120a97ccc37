"""A hook of mkdocs.yml: links that lead out of docs/.

CONTRIBUTING.md and CHANGELOG.md become pages of the site, links to the README lead to the site's first page, and a link
to any other file of the repository keeps its text alone. In the repository all of them are ordinary links.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ON_THE_SITE = PAGES | {"README.md": "index.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!\w+:)[^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that stand at the top of the repository."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=moved(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Follows the links of a page of docs/."""
    if page.file.src_uri in PAGES.values():
        return markdown
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    return relinked(markdown, folder, posixpath.dirname(page.file.src_uri))


def moved(path: Path) -> str:
    """The text of a page at the top of the repository with its links as seen from docs/."""
    return relinked(path.read_text(encoding="utf-8"), "", "")


def relinked(markdown: str, folder: str, site_folder: str) -> str:
    """The text with links to files of the repository replaced by links inside the site, or by their text.

    folder: where the text stands in the repository. site_folder: where it stands on the site.
    """

    def replace(found: re.Match[str]) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        target = posixpath.normpath(posixpath.join(folder, link))
        page = target.removeprefix("docs/") if target.startswith("docs/") else ON_THE_SITE.get(target)
        if page is None:
            return text
        return f"[{text}]({posixpath.relpath(page, site_folder or '.')}{anchor})"

    return _LINK.sub(replace, markdown)
