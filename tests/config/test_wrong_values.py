"""Every key of the config, with values of wrong types and sizes: a ConfigError with one line per mistake, or a config
that can be written and read back. Nothing else, whatever stands in the file."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from safecl.config import ConfigError, RunConfig, load_config
from safecl.config.errors import _submodels
from safecl.config.load import validate_tree
from safecl.config.method_registry import builtin_methods, load_methods
from safecl.config.parsing import MOST_VALUES

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
BASE = {
    "model": {"path": "m"},
    "tasks": [{"name": "t", "train": "t.jsonl"}],
    "memory": {"source": "s.jsonl"},
    "safety": {"prompts": "p.jsonl"},
    "output": "out",
}
VALUES = [
    *(None, True, False, 0, 1, -1, 7, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e-30, 1e38, 1e39, 1e308),
    *(float("inf"), float("-inf"), float("nan"), "", " ", "x", "auto", "none", "never", "1", "1e39", "0x10"),
    *("2026-01-01", "~", "~nouser/x", "../x", "/", "a\0b", "\x1b[2J", "\u202e", "a" * 5000, "{a}", "{", "!!python"),
    *([], [None], [1, 2], ["x"], [[]], [[[[1]]]], {}, {"x": 1}, {1: 2}, {"path": "x"}, {"kind": "topk"}),
    *({"a": {"b": {"c": []}}}, [{"name": "t"}]),
]


def keys_of(model: type[BaseModel], path: tuple = ()) -> list[tuple]:
    """The paths of all keys, through lists (their first item) and unions."""
    found = []
    for name, field in model.model_fields.items():
        here = (*path, name)
        found.append(here)
        is_list = str(field.annotation).removeprefix("typing.").startswith(("list", "Annotated[list"))
        for inner in _submodels(field.annotation):
            if inner is not model and name != "methods":
                found += keys_of(inner, (*here, 0) if is_list or name == "tasks" else here)
    return list(dict.fromkeys(found))


def all_keys() -> list[tuple]:
    methods = load_methods({name: {} for name in builtin_methods()})
    inner = [key for name, settings in methods.items() for key in keys_of(type(settings), ("methods", name))]
    return [*keys_of(RunConfig), *inner, *(("methods", name) for name in methods)]


def put(tree, path: tuple, value) -> dict:
    node = tree
    for key, following in itertools.pairwise(path):
        if isinstance(key, int):
            node = node[key]
            continue
        if not isinstance(node.get(key), (dict, list)):
            node[key] = [{}] if isinstance(following, int) else {}
        node = node[key]
    node[path[-1]] = value
    return tree


def ends_well(read: Callable[[dict], RunConfig], tree: dict) -> bool:
    """True where the config is refused by a message, or is one that comes back from its own text."""
    try:
        config = read(tree)
    except ConfigError as error:
        lines = str(error).splitlines()
        return bool(lines) and all(line.isprintable() for line in lines) and len(str(error)) < 20_000
    return RunConfig.model_validate(config.model_dump(mode="json")) == config


def wrong_ends(section: str, read: Callable[[dict], RunConfig], every: int = 1) -> list[tuple]:
    """The keys and values of a section that end in anything else. every: only each so manieth of them."""
    pairs = [(path, value) for path in all_keys() if path[0] == section for value in VALUES]
    bad = []
    for path, value in pairs[::every]:
        try:
            if not ends_well(read, put(copy.deepcopy(BASE), path, value)):
                bad.append((path, value, "message"))
        except Exception as error:
            bad.append((path, value, repr(error)[:200]))
    return bad


@pytest.mark.parametrize("section", sorted({path[0] for path in all_keys()}))
def test_every_key_with_every_wrong_value_ends_in_a_message(section):
    bad = wrong_ends(section, lambda tree: validate_tree(tree, "run.yaml"))
    assert not bad, f"{len(bad)}: {bad[:10]}"


@pytest.mark.parametrize("every", [101, pytest.param(1, marks=pytest.mark.long)])
def test_so_does_the_same_config_as_a_file(tmp_path, every):
    file = tmp_path / "run.yaml"

    def read(tree: dict) -> RunConfig:
        file.write_text(yaml.safe_dump(tree, allow_unicode=False))
        return load_config(file)

    bad = [found for section in {path[0] for path in all_keys()} for found in wrong_ends(section, read, every)]
    assert not bad, f"{len(bad)}: {bad[:10]}"


def test_the_schema_is_walked_whole():
    keys = {".".join(map(str, path)) for path in all_keys()}
    claimed = re.search(r"than (\d+) config keys with each of (\d+) wrong values .*?more than ([\d,]+) messages", PAGE)
    assert claimed is not None
    num_keys, num_values, num_cases = (int(number.replace(",", "")) for number in claimed.groups())
    assert num_keys < len(keys) < 1.1 * num_keys, "docs/reliability.md has another number of keys"
    assert (num_values, num_cases) == (len(VALUES), num_keys * num_values), "docs/reliability.md has another number"
    assert {"train.betas", "tasks.0.eval.metric", "memory.teacher.k", "deepspeed.offload.ema", "safety.gate.max_asr",
            "methods.ewc.strength", "model.lora.r", "scan.refusals"} <= keys  # fmt: skip


def test_overrides_of_any_form_end_in_a_message(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(BASE))
    chance = random.Random(0)
    alphabet = [*"abz.=[]{}:,&*!|>'\"#%@`\\\n\t\0\x1b-+e1029 ", "train", "tasks", "0", "methods", "\u202e", "a" * 3000]
    for _ in range(300):
        text = "".join(chance.choice(alphabet) for _ in range(chance.randint(0, 14)))
        with pytest.raises(ConfigError):
            load_config(file, [text, "unknown.key=1"])


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "model: &m {path: *m}\n",
        "[" * 50_000,
        "- " * 50_000,
        "? " * 3000,
        "x: " + "9" * 100_000,
        "x: 1:" + ":".join(["59"] * 10_000),
        "x: " + "[" + "1, " * (MOST_VALUES + 5) + "1]",
        "x: 2026-99-99",
        "x: !!timestamp 'a'",
        "x: !!binary '*'",
        "x: !!set {a, b}",
        "x: !!float 'abc'",
        "x: !!int ''",
        "x: !!bool maybe",
        "<<: 1",
        "<<: [1]",
        "%YAML 9.9\n---\nx: 1",
        "--- 1\n--- 2",
        "x: &x",
        "\ufeff\ufeffx: 1",
    ],
)
def test_yaml_that_is_made_to_hurt_is_refused_at_once(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert str(refused.value).startswith(f"{file}")
