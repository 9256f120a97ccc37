"""The documentation site: the API reference names what there is, and the pages about the code name files that exist.

That the site builds and that its links lead somewhere is checked by `mkdocs build --strict` (make lint).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.test_docs import ROOT

API = ROOT / "docs" / "api"
DIRECTIVE = re.compile(r"^::: (\S+)\n    options:\n      heading: (\S+)$", re.M)
PACKAGES = (
    "safecl",
    "safecl.kernels",
    "safecl.data",
    "safecl.replay",
    "safecl.evaluation",
    "safecl.scan",
    "safecl.merging",
)
OF_METHODS = ("Method", "Run", "ReplayTerm", "TaskTerm", "Penalty", "AverageMask")


def directives() -> list[tuple[str, str, str]]:
    """(page, the path that is documented, the public path in its heading) of every entry of the reference."""
    return [(page.name, *found) for page in sorted(API.glob("*.md")) for found in DIRECTIVE.findall(page.read_text())]


def value_at(path: str) -> Any:
    """The object at `package.module.Name`."""
    *module, name = path.split(".")
    return getattr(importlib.import_module(".".join(module)), name)


def public_names(package: str) -> dict[str, Any]:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    values = {name: getattr(module, name) for name in names if not name.startswith("__")}
    return {
        name: value for name, value in values.items() if not isinstance(value, ModuleType) and name != "annotations"
    }


def where_defined(value: Any) -> str:
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', '?')}"


def test_every_entry_of_the_reference_has_a_public_heading():
    for page in sorted(API.glob("*.md")):
        text = page.read_text()
        assert len(DIRECTIVE.findall(text)) == len(re.findall(r"^:::", text, re.M)), page.name


@pytest.mark.parametrize(("page", "path", "heading"), directives(), ids=lambda value: value)
def test_every_entry_of_the_reference_documents_what_its_heading_names(page, path, heading):
    public = value_at(heading)
    try:
        documented = value_at(path)
    except (ImportError, AttributeError):
        pytest.fail(f"docs/api/{page}: `::: {path}` does not import; {heading} is now {where_defined(public)}")
    assert documented is public, f"docs/api/{page}: `::: {path}` is not {heading}, which is {where_defined(public)}"


@pytest.mark.parametrize(("page", "path", "heading"), directives(), ids=lambda value: value)
def test_every_entry_of_the_reference_is_read_where_it_is_defined(page, path, heading):
    """The site is built from source text, where a name that is only imported has no docstring."""
    module, _, name = path.rpartition(".")
    source = Path(importlib.import_module(module).__file__).read_text()
    assert re.search(rf"^(class|def) {name}\b|^{name}\b.*=", source, re.M), (
        f"docs/api/{page}: {path} is not defined in {module}"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_documents_every_public_name(package):
    documented = [value_at(heading) for _, _, heading in directives()]
    missing = [name for name, value in public_names(package).items() if not any(value is other for other in documented)]
    assert not missing, f"docs/api has no entry for {package}.{missing[0]}"


def test_the_reference_documents_what_methods_are_made_of():
    headings = {heading for _, _, heading in directives()}
    assert {f"safecl.methods.base.{name}" for name in OF_METHODS} <= headings


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md"])
def test_every_file_that_a_page_about_the_code_names_exists(page):
    named = re.findall(r"(?:safecl|tests|csrc|benchmarks|launch)/[\w/.]*\w", (ROOT / page).read_text())
    assert named and not [path for path in dict.fromkeys(named) if not (ROOT / path).exists()]


def drawing() -> ModuleType:
    """docs/architecture.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_rooms_is_that_of_the_import_contracts():
    drawn = drawing()
    assert drawn.PICTURE.read_text() == drawn.picture(), "run: make docs"


@pytest.mark.parametrize(("folder", "contract"), [("safecl", "rooms"), ("safecl/engine", "engine")])
def test_the_picture_shows_every_room(folder, contract):
    rooms = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert rooms <= {room for layer in drawing().layers(contract) for room in layer}
