"""docs/methods.md and the pages of the families speak of the methods that there are, and the example of a method of
one's own works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from safecl.config import ConfigError, RunConfig, validate_tree
from safecl.config.method_registry import builtin_methods, method_module

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "methods.md").read_text(encoding="utf-8")
ROWS = [
    (name, tuple(column.strip() for column in columns.split("|")))
    for name, columns in re.findall(r"^\| \[`(\w+)`\]\(\S+\) \|(.*)\|$", PAGE, re.M)
]
BASE = {
    "model": {"path": "m"},
    "tasks": [{"name": "a", "train": "t.jsonl"}],
    "memory": {"source": "r.jsonl"},
    "output": "runs/a",
}


def test_every_method_has_a_section_a_row_and_a_config():
    assert sorted(name for name, _ in ROWS) == builtin_methods()
    for name in builtin_methods():
        family = method_module(name).__name__.split(".")[2]
        page = (DOCS / "methods" / f"{family}.md").read_text(encoding="utf-8")
        sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
        assert re.search(rf"methods: {{{name}: {{", sections[name]), name
        assert f"[`{name}`](methods/{family}.md#{name})" in PAGE


@pytest.mark.parametrize(("name", "columns"), ROWS)
def test_the_table_of_methods_says_what_their_configs_declare(name, columns):
    settings = method_module(name).Config()
    _, needs, passes, _, lora, measured = columns
    assert ("memory" in needs) == settings.needs_memory
    assert ("pass" in passes) == (settings.gradient_passes + settings.task_gradient_passes > 0)
    assert ("forward" in passes) == (settings.forward_passes > 0) or "online" in passes
    assert lora == ("yes" if settings.refuses_lora is None else "no") or lora.startswith(("with ", "only with "))
    assert (lora == "only with LoRA") == (settings.needs_lora is not None)
    assert measured == "not measured yet" or re.match(r"[.\d]+ / [.\d]+", measured)


NAMED = {
    "Refresh Learning": "refresh",
    "Lisa": "lisa",
    "SafeInstr": "safe_instruct",
    "IM": "im",
    "IM, marginal part": "im: {reading: marginal}",
    "IM with DER": "im: {}, der: {}",
    "IM with DER++": "im: {}, derpp: {}",
    "LDIFS": "ldifs",
    "SMILE": "memory: {prefix_tokens: 12}",
    "EMA control": "ema_control",
    "SPAG, SPARD": "spag",
    "SBR": "sbr",
    "SafeGrad": "safe_grad",
    "constrained SFT": "constrained_sft",
    "Antibody": "antibody",
    "TOSS": "toss",
    "BDS": "bds",
    "AsFT": "asft",
    "GR-SAP": "safecl memory build",
    "SDFT": "sdft",
    "OGPSA": "ogpsa",
    "OSFT": "osft",
    "MUDMAN": "mudman",
    "SafeAnchor": "safe_anchor",
    "A-GEM": "agem",
    "A-GEM, the step": "agem: {project: step}",
    "HFT": "hft",
    "Safety Layers, SPPFT": "safety_layers",
    "SWAT": "swat",
    "attention-only L2": "l2_sp: {modules: attention}",
    "k-FPF": "k_fpf",
    "hierarchical regularisation": "hierarchical",
    "block expansion": "block_expansion",
    "I-LoRA": "i_lora",
    "gradient-norm selection": "gradient_norm",
    "mix-cd": "memory: {draw: mix_cd}",
    "adaptive EMA": "dema",
    "temporal ensemble": "temporal_ensemble",
    "re-warm, re-decay": "train: {schedule: cosine}",
    "infinite schedule": "train: {schedule: infinite}",
    "replay-share curriculum": "memory: {replay_ratio_end: 0.4}",
    "DMT": "tasks: [{mix: 0.0039}]",
    "recurring stream": "stream: {kind: recurring}",
    "power-law stream": "stream: {kind: power_law}",
    "Vaccine": "vaccine",
    "T-Vaccine": "t_vaccine",
    "Booster": "booster",
    "VAA": "vaa",
    "RepNoise": "rep_noise",
    "LookAhead": "lookahead",
    "PTST": "safety: {system: ...}",
    "SafeLoRA": "merge safe_lora",
    "MagMax": "merge magmax",
    "capped mean of the loss": "train: {loss_mean: capped}",
}
"""What the studies call a method, and the first cell of its row."""


def test_every_method_that_the_studies_name_has_a_row():
    cells = re.findall(r"^\| \[`(.+?)`\]\(\S+\) \|(.*)\|$", PAGE, re.M)
    assert {own: name for name, own in NAMED.items() if own not in dict(cells)} == {}
    settings = {cell: columns for cell, columns in cells if not re.fullmatch(r"\w+", cell)}
    assert settings.keys() <= set(NAMED.values()) | {"refresh: {}, derpp: {}"}
    for cell, columns in settings.items():
        measured = columns.split("|")[-1].strip()
        assert columns.count("|") == 5, cell
        assert measured in ("not measured", "in all arms") or re.match(r"[.\d]+ / [.\d]+|\[merging", measured), cell


@pytest.mark.parametrize("cell", [cell for cell in NAMED.values() if ": {" in cell and "..." not in cell])
def test_a_setting_that_is_a_method_is_a_config(cell):
    """Top-level sections are settings as they stand; others are methods."""
    tree = yaml.safe_load(f"{{{cell}}}")
    sections = {key: value for key, value in tree.items() if key in RunConfig.model_fields}
    methods = {key: value for key, value in tree.items() if key not in RunConfig.model_fields}
    merged = BASE | {
        key: BASE[key] | value if isinstance(BASE.get(key), dict) else value for key, value in sections.items()
    }
    if "tasks" in sections:
        merged["tasks"] = [*BASE["tasks"], BASE["tasks"][0] | sections["tasks"][0] | {"name": "b"}]
    if "stream" in sections:
        merged["stream"] = sections["stream"] | (
            {"rounds": 2} if sections["stream"]["kind"] == "recurring" else {"length": 4}
        )
    assert validate_tree(merged | {"methods": methods}, "run.yaml")


def test_every_key_of_a_method_has_docs():
    for name in builtin_methods():
        for key, field in method_module(name).Config.model_fields.items():
            assert field.description, f"{name}.{key}"


def test_the_example_of_a_method_of_ones_own_is_a_method(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "my_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    config: RunConfig = validate_tree(BASE | {"methods": {"my_package.my_method": {"alpha": 2.0}}}, "run.yaml")
    (settings,) = config.methods.values()
    method = method_module("my_package.my_method").Method("my_package.my_method", settings)
    assert method.replay_terms()[0].kd_weight == 2.0 and method.penalty().modules == ("*embed*",)


@pytest.mark.parametrize("name", ["agem", "der", "derpp", "er", "ewc", "online_ewc"])
def test_a_method_that_needs_a_memory_says_so(name):
    with pytest.raises(ConfigError, match=rf"{name} needs `memory: "):
        validate_tree(
            {key: value for key, value in BASE.items() if key != "memory"} | {"methods": {name: {}}}, "run.yaml"
        )


@pytest.mark.parametrize("name", ["ewc", "online_ewc"])
def test_fisher_of_fresh_adapters_is_refused_with_what_works(name):
    model = {"path": "m", "lora": {"r": 4}}
    with pytest.raises(ConfigError, match="l2_sp"):
        validate_tree(BASE | {"model": model, "methods": {name: {}}}, "run.yaml")
