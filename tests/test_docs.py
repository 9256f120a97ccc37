"""README and docs/: commands, configs, links and tables speak of what is there. What the commands do:
tests/commands/test_commands.py."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from benchmarks.kernels import flat_table
from safecl.cli import app
from safecl.config import load_config, parse_yaml
from safecl.config.docs import reference_page
from safecl.config.method_registry import builtin_methods, method_module
from safecl.merging import kinds

ROOT = Path(__file__).parent.parent
FAMILIES = sorted((ROOT / "docs" / "methods").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *FAMILIES,
]
BASE = {
    "model": {"path": "m"},
    "tasks": [{"name": "a", "train": "t.jsonl"}],
    "memory": {"source": "r.jsonl"},
    "output": "runs/a",
}


PROGRAMS = r"safecl|python3?|torchrun|deepspeed|make|bash|launch/\S+"
INLINE = r"(?<!`)`((?:safecl|python|make|launch/\S+\.sh) [^`<]*)`(?!`)"


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block of a language."""
    return [
        (page.name, text)
        for page in PAGES
        for text in re.findall(rf"^```(?:{language})\n(.*?)^```", page.read_text(), re.M | re.S)
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command line in a shell block, and of every inline one, such as `safecl
    check CFG` or `python -m benchmarks.kernels.flat`."""
    lines = [(page, line) for page, text in blocks("sh|bash") for line in text.replace("\\\n", " ").splitlines()]
    inline = [(page.name, found) for page in PAGES for found in re.findall(INLINE, page.read_text())]
    split = [(page, shlex.split(line, comments=True)) for page, line in lines + inline]
    return [(page, words) for page, words in split if words]


def arguments_of_safecl(words: list[str]) -> list[str] | None:
    """What `safecl` is given, however it is started; None for another program."""
    if words[0] == "safecl":
        return words[1:]
    if words[0] in ("torchrun", "deepspeed", "python", "python3") and "safecl" in words:
        return words[words.index("safecl") + 1 :]
    return None


def test_commands_stand_in_blocks_that_are_executed():
    """A block without its language would be passed over."""
    everything, shell = blocks(r"\w*"), blocks("sh|bash")
    lines = [(page, line) for page, text in everything if (page, text) not in shell for line in text.splitlines()]
    assert not [(page, line) for page, line in lines if re.match(rf"({PROGRAMS}) [\w./-]", line)]


@pytest.mark.parametrize(
    ("page", "words"), [c for c in commands() if arguments_of_safecl(c[1]) is not None], ids=lambda v: " ".join(v)[:60]
)
def test_every_safecl_command_parses(page, words):
    root = typer.main.get_command(app)
    verb, *rest = arguments_of_safecl(words) or ["--help"]
    if verb.startswith("-"):
        return
    assert verb in root.commands, f"{page}: there is no verb {verb}"
    if any(not argument.startswith("-") for argument in rest) or verb in ("init", "env", "demo", "proof"):
        root.commands[verb].make_context(verb, list(rest))  # raises for an option that does not exist


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {found for page in PAGES for found in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.M)}
    assert {"demo", "test", "lint"} <= named <= targets


def test_every_extra_exists():
    extras = set(
        re.findall(
            r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.M
        )
    )
    code = [path.read_text() for room in ("safecl", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    named = {
        extra
        for text in [*(page.read_text() for page in PAGES), *code]
        for found in re.findall(r"\.\[([\w,]+)\]\"|install_extra\('(\w+)'\)", text)
        for extra in "".join(found).split(",")
    }
    assert {"lora", "eval", "real", "track", "bench"} <= named <= extras


def test_no_page_and_no_message_installs_safecl_from_an_index_which_does_not_have_it():
    for path in [*PAGES, *(ROOT / "safecl").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert not re.search(r"pip install\s+['\"]?safecl", path.read_text()), path


@pytest.mark.parametrize(("page", "text"), blocks("yaml|yml"), ids=lambda v: v.splitlines()[0][:60])
def test_every_config_in_the_docs_loads(page, text, tmp_path):
    given = parse_yaml(text)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in BASE.items() if key not in given} | given))
    load_config(path)


def test_the_page_of_config_keys_is_current():
    assert (ROOT / "docs" / "config.md").read_text() == reference_page(), "run: make docs"


def test_the_readme_names_exactly_the_methods_there_are_by_family():
    table = (ROOT / "README.md").read_text().split("## Methods")[1].split("## ")[0]
    rows = re.findall(r"^\| \[(\w+)\]\(docs/methods/(\w+)\.md\) \|.*\| ([^|]+) \|$", table, re.M)
    named = {name: family for family, _, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert named == {name: method_module(name).__name__.split(".")[2] for name in builtin_methods()}
    assert sorted(f"{page}.md" for _, page, _ in rows) == [page.name for page in FAMILIES]


def test_the_page_of_merges_names_exactly_the_merges_there_are():
    table = (ROOT / "docs" / "merging.md").read_text().split("## Which one")[1].split("```")[0]
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("|")][2:]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(kinds())


def test_every_link_between_the_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tables_of_the_kernels_page_are_those_of_the_committed_measurements():
    page = flat_table.PAGE.read_text()
    assert flat_table.filled(page) == page, "python -m benchmarks.kernels.flat_table renews them"


def test_the_readmes_table_and_picture_are_those_of_the_committed_measurement():
    run = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["seeds"][0]
    readme = (ROOT / "README.md").read_text()
    for arm in run["arms"]:
        (row,) = re.findall(rf"^\| {re.escape(arm['title'])} \|.*$", readme, re.M)
        assert all(
            f"{rate['value']:.3f} ({rate['low']:.2f}-{rate['high']:.2f})" in row
            for rate in arm["rates"].values()
            if rate
        )
    assert (ROOT / "docs" / "demo.svg").read_text() == run["picture"] + "\n"


def test_the_first_picture_is_that_of_the_committed_measurement_of_a_pretrained_model():
    from benchmarks.real_model import table

    result = json.loads(table.RESULTS.read_text())
    assert table.PICTURE.read_text() == table.picture(result) + "\n"
    assert "](docs/real-model.svg)" in (ROOT / "README.md").read_text()


def test_the_committed_demonstration_holds_for_three_seeds():
    results = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert results["passed"] and [run["seed"] for run in results["seeds"]] == [0, 1, 2]
    for run in results["seeds"]:
        arms = {arm["title"]: arm["rates"] for arm in run["arms"]}
        asr, accuracy = "ASR, not refused", "task accuracy"
        assert arms["plain fine-tuning"][asr]["value"] >= 0.8 and arms["DER"][asr]["value"] <= 0.10
        assert arms["DER"][accuracy]["value"] >= arms["plain fine-tuning"][accuracy]["value"] - 0.03
