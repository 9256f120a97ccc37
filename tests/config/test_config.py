"""The run config: strict, explained, overridable, and read back as it was written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from safecl.config import ConfigError, RunConfig, dump_config, load_config, parse_yaml
from safecl.config.base import Change
from safecl.config.docs import section_of, sections
from safecl.config.method_registry import builtin_methods, method_module, methods_that
from safecl.config.presets import PRESETS

BASE = {"model": {"path": "m"}, "tasks": [{"name": "a", "train": "t.jsonl"}], "output": "runs/a"}
MEMORY = {"source": "r.jsonl"}


@pytest.fixture
def load(tmp_path):
    """`load(text_or_tree, *overrides)`: the config of BASE plus what is given."""

    def read(content: str | dict = "", *overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        text = yaml.safe_dump(BASE | content) if isinstance(content, dict) else yaml.safe_dump(BASE) + content
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return read


def message_of(load, content: str | dict = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(content, *overrides)
    return str(error.value)


# --------------------------------------------------------------------------------------------------------- unknown keys


def example_with(path: str, section: type[BaseModel], key: str, value: object) -> dict:
    """A config whose section at `path` holds what it must and `key: value`."""
    needed = {
        "memory": dict(MEMORY),
        "safety": {"prompts": "p"},
        "eval": {"path": "e"},
        "fields": {"prompt": "x", "completion": "y"},
        "tasks": {"name": "a", "train": "t.jsonl"},
        "model": {"path": "m"},
    }
    tree: dict = {}
    node = tree
    for part in path.split("."):
        name = part.removesuffix("[]")
        inner = dict(needed.get(name, {}))
        node[name] = [inner] if part.endswith("[]") else inner
        node = inner
    node[key] = value
    return tree


@pytest.mark.parametrize(
    ("path", "section"), list(sections()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_mistyped_key_of_every_section_names_the_section_and_the_nearest_key(load, path, section):
    name = max(section.model_fields, key=len)
    mistyped = name[:-1] + name[-1] * 2 + "x"
    message = message_of(load, example_with(path, section, mistyped, 1))
    place = path.replace("[]", ".0")
    assert f"{place}: unknown key `{mistyped}`; did you mean `{name}`?" in message


@pytest.mark.parametrize("name", builtin_methods())
def test_a_mistyped_key_of_every_method_names_the_method_and_the_nearest_key(load, name):
    fields = method_module(name).Config.model_fields
    known = max(fields, key=len)
    message = message_of(load, {"memory": MEMORY, "methods": {name: {known + "x": 1}}})
    assert f"methods.{name}: unknown key `{known}x`; did you mean `{known}`?" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"trian": {}}, "unknown key `trian`; did you mean `train`?"),
        ({"learning_rate": 1}, "unknown key `learning_rate`; `learning_rate` belongs in `train`"),
        ({"train": {"lr": 1}}, "train: unknown key `lr`; here it is `train.learning_rate`"),
        ({"methods": {"ewx": {}}}, "unknown method `ewx`; did you mean `ewc`?"),
        ({"methods": {"my_package.none": {}}}, "its module cannot be imported"),
    ],
)
def test_an_unknown_name_is_answered_with_where_it_lives(load, content, expected):
    assert expected in message_of(load, content)


def test_every_key_of_another_trainer_points_to_a_key_that_exists():
    from safecl.config.errors import ELSEWHERE

    for target in ELSEWHERE.values():
        model = RunConfig
        for part in target.replace("[]", "").split("."):
            assert part in model.model_fields, target
            model = section_of(model.model_fields[part].annotation) or model


# --------------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"train": {"learning_rate": "abc"}}, "train.learning_rate: must be a valid number"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: must be a finite number (got nan)"),
        ({"train": {"epochs": 0}}, "train.epochs: must be greater than 0 (got 0)"),
        ({"train": {"tokens_per_batch": 0}}, "greater than or equal to 1; or: must be 'auto' (got 0)"),
        ({"train": {"betas": [0.9]}}, "train.betas: too few entries"),
        ({"train": 3}, "train: must be a section of `key: value` lines (got 3)"),
        ({"train": {"seed": 1.5}}, "train.seed: must be a valid integer"),
        ({"memory": {}}, "memory: name `source`, the rows whose behaviour must be kept, or `prompts`"),
        ({"model": {"path": ""}}, "model.path: must have at least 1 character"),
        ({"tasks": []}, "tasks: must have at least 1 item"),
        ({"tasks": {"name": "a", "train": "t"}}, "tasks: must be a list, `[...]` or lines that begin with `- `"),
        ({"tasks": [{"name": "a", "train": "t", "format": "txt"}]}, "tasks.0.format: must be 'auto', 'messages'"),
        ({"methods": ["ewc"]}, "methods: must be a mapping from method names"),
        ({"methods": {"ema": {"horizon": -1}}}, "methods.ema.horizon: must be greater than 0"),
        (
            {"privacy": {"examples": "ful"}},
            "privacy.examples: must be 'full', 'hashed' or 'none'; did you mean 'full'? (got 'ful')",
        ),
        ({"deepspeed": {"stage": 4}}, "deepspeed.stage: must be 0, 1, 2 or 3 (got 4)"),
    ],
)
def test_a_wrong_value_is_told_with_its_place_what_is_allowed_and_what_was_given(load, content, expected):
    assert expected in message_of(load, content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"deepspeed": {"offload": {"parameters": "cpu"}}}, "offload.parameters: cpu needs stage 3, this is stage 2"),
        ({"deepspeed": {"stage": 0, "offload": {"optimizer": "cpu"}}}, "needs stage 1, 2 or 3"),
        ({"poison": {"ratio": 0.1}}, "poison: ratio > 0 needs `source`"),
        ({"methods": {"ewc": {}}}, "methods: ewc needs `memory: {source: ...}`"),
        ({"model": {"path": "m", "lora": {}}, "memory": MEMORY, "methods": {"ewc": {}}}, "ewc with model.lora"),
        ({"methods": {"ema": {"decay": 0.9, "horizon": 0.3}}}, "methods.ema: give decay or horizon, not both"),
        (
            {"train": {"max_length": 4096, "tokens_per_microbatch": 100}},
            "tokens_per_microbatch (100) is below max_length (4096)",
        ),
        ({"tasks": [BASE["tasks"][0], BASE["tasks"][0]]}, "the name 'a' is used twice"),
        (
            {"tasks": [BASE["tasks"][0], {"name": "b", "train": "t", "role": "align"}]},
            "only the first task can have role `align`",
        ),
        ({"tasks": [{"name": "a", "train": "t", "format": "fields"}]}, "tasks.0: format `fields` needs `fields:"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_with_what_would(load, content, expected):
    assert expected in message_of(load, content)


def test_every_mistake_is_told_at_once_each_on_a_line_that_names_the_file(load, tmp_path):
    lines = message_of(load, {"trian": {}, "train": {"lr": 1, "epochs": -1}}).splitlines()
    assert len(lines) == 3
    assert all(re.match(rf"{re.escape(str(tmp_path / 'run.yaml'))}:\d+: ", line) for line in lines)


def test_a_mistake_names_the_line_of_its_key_or_of_the_section_that_lacks_it(tmp_path):
    path = tmp_path / "run.yaml"
    head = "model: {path: m}\n\ntasks:\n- name: a\n  train: t\n  trian: t\n-\n  name: b\n"
    path.write_text(head + "scan:\n  acton: drop\n  false_alarm: much\nmethods:\n  er: {wieght: 1}\n")
    with pytest.raises(ConfigError) as told:
        load_config(path)
    for place in (
        ":6: tasks.0: unknown key `trian`",
        ":8: tasks.1.train: missing",
        ":10: scan: unknown key `acton`",
        ":11: scan.false_alarm: must",
        ":13: methods.er: unknown key `wieght`",
        ": output: missing",
    ):
        assert f"{path}{place}" in str(told.value), told.value


def test_what_the_command_line_has_set_is_not_blamed_on_a_line_of_the_file(load, tmp_path):
    message = message_of(load, {"train": {"epochs": 1}}, "train.epochs=-1")
    assert message.startswith(f"{tmp_path / 'run.yaml'}: train.epochs: must")


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.00002", "2.e-5"])
def test_a_number_in_any_notation_is_a_number(load, text):
    assert load(f"train: {{learning_rate: {text}}}").train.learning_rate == 2e-5
    assert load("", f"train.learning_rate={text}").train.learning_rate == 2e-5
    assert parse_yaml(text) == 2e-5  # not a text that pydantic would turn into a number where one is expected
    assert load("train: {tokens_per_batch: 1e3}").train.tokens_per_batch == 1000


def test_text_that_looks_a_little_like_a_number_stays_text(load):
    assert load("memory: {source: 2e-5x.jsonl}").memory.source == "2e-5x.jsonl"
    assert load('memory: {source: "2e5"}').memory.source == "2e5"


@pytest.mark.parametrize("text", ["train: {epochs: 1, epochs: 2}", "output: runs/b", "methods: {ema: {}, ema: {}}"])
def test_a_key_that_stands_twice_is_refused_with_its_line(load, text):
    assert "occurs twice in one section" in message_of(load, text) and "line " in message_of(load, text)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "holds no `key: value` lines"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"train: {epochs: 1", "line 1, column"),
        (b"? [a, b]\n: 1\n", "a key must be one word"),
        (b"a: *nowhere\n", "undefined alias"),
        (b"a: &a [*a]\n", "contains itself"),
        (b"a: !!python/object:os.system {}\n", "not valid YAML"),
        (b"model: {path: m}\x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_a_message(tmp_path, raw, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(BASE).encode())
    assert load_config(path).output == "runs/a"


def test_a_file_that_is_not_there_is_answered_with_the_nearest_name(tmp_path):
    (tmp_path / "run.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*run\.yaml"):
        load_config(tmp_path / "rnu.yaml")
    with pytest.raises(ConfigError, match=r"is a folder.*run\.yaml"):
        load_config(tmp_path)


def test_a_section_with_all_keys_behind_comment_signs_has_its_defaults(load):
    config = load("train:\n  # epochs: 2\ndeepspeed:\nmemory:\nsafety:\nmethods:\n  ema:\n")
    assert config.train.epochs == 3.0 and config.deepspeed.stage == 2
    assert config.memory is None and config.safety is None and list(config.methods) == ["ema"]


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_set_nested_keys_list_items_and_sections_that_the_file_lacks(load):
    config = load(
        "",
        "train.epochs=2",
        "tasks.0.max_rows=5",
        "memory.source=r.jsonl",
        "methods.er.weight=0.5",
        "model.lora={r: 4}",
        "output=runs/a=b",
    )
    assert (config.train.epochs, config.tasks[0].max_rows, config.memory.source) == (2.0, 5, "r.jsonl")
    assert (config.methods["er"].weight, config.model.lora.r, config.output) == (0.5, 4, "runs/a=b")


def test_the_last_override_of_a_key_counts_and_null_takes_a_section_away(load):
    assert load({"memory": MEMORY}, "train.seed=1", "train.seed=2", "memory=null").train.seed == 2
    assert load({"memory": MEMORY}, "memory=null").memory is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs", "is not an override; write key.path=value"),
        ("=3", "is not an override"),
        ("train..epochs=3", "is not an override"),
        ("tasks.1.max_rows=5", "tasks is a list of 1; an item is named by its index, tasks.0"),
        ("tasks.name=b", "tasks is a list of 1"),
        ("output.x=3", "output is a value, not a section"),
        ("train.epochs=[1", "the value is not valid YAML"),
        ("train.epocs=3", "did you mean `epochs`?"),
    ],
)
def test_a_wrong_override_is_a_message(load, override, expected):
    assert expected in message_of(load, "", override)


# ----------------------------------------------------------------------------------------------------------- round trip


def test_the_resolved_config_reads_back_to_the_same_tree(load, tmp_path):
    rich = {
        "memory": MEMORY | {"max_tokens": 64},
        "methods": {"ewc": {"strength": 2e-7}, "ema": {"horizon": 0.25}, "der": None},
        "safety": {"prompts": "p", "gate": {"max_asr": 0.1}},
        "tasks": [
            {
                "name": "a",
                "train": "t",
                "fields": {"prompt": "{x}\n", "completion": "{y}", "values": {"y": {"0": "no"}}},
            }
        ],
    }
    config = load(rich)
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dump_config(config)
    assert set(yaml.safe_load(dump_config(config))["train"]) == set(
        type(config.train).model_fields
    )  # defaults are written out


def test_every_field_of_every_section_and_method_is_documented():
    models = [
        RunConfig,
        *(section for _, section in sections()),
        *(method_module(name).Config for name in builtin_methods()),
    ]
    for model in models:
        assert model.__doc__, model
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_loading_a_config_with_every_method_imports_neither_torch_nor_transformers(tmp_path):
    path = tmp_path / "run.yaml"
    methods = {
        name: {"degraded": "d", "utility": "u"} if name == "toss" else {}
        for name in methods_that(lambda settings: settings.acts_on == "task" and settings.needs_lora is None)
        if not method_module(name).Config().keeps_average
        and method_module(name).Config().changes in (None, Change("step", "factors"))
        and name != "sdft"  # `lookahead` rewrites the rows already
    }
    path.write_text(yaml.safe_dump(BASE | {"memory": MEMORY, "methods": methods}))
    code = (
        "import sys, safecl; safecl.load_config(sys.argv[1]);"
        "from safecl.config.method_registry import builtin_methods, method_module;"
        "[method_module(name).Config for name in builtin_methods()];"
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'datasets', 'pandas', 'matplotlib'};"
        "heavy &= set(sys.modules);"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------------- presets


def _memory_of(preset) -> dict:
    return {"memory": MEMORY | preset.sections.get("memory", {})}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_methods_that_it_stands_for_and_is_written_out_as_these(load, tmp_path, name):
    config = load({"memory": MEMORY, "methods": name})
    assert config == load({"memory": MEMORY} | PRESETS[name].settings | _memory_of(PRESETS[name]))
    assert config.methods != {} or PRESETS[name].repairs
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert yaml.safe_load(dump_config(config))["methods"].keys() == PRESETS[name].methods.keys()
    assert load_config(tmp_path / "resolved.yaml") == config


def test_the_one_shot_patch_takes_a_few_plain_steps_and_a_config_may_set_them_itself(load):
    patch = load({"methods": "one-shot-patch"})
    assert (patch.train.max_steps, patch.train.allow_few_steps, patch.methods) == (10, True, {})
    assert load({"methods": "one-shot-patch", "train": {"max_steps": 3}}).train.max_steps == 3


def test_one_setting_of_a_preset_can_be_overridden_and_presets_do_not_change_by_it(load):
    first = load({"memory": MEMORY, "methods": "balanced"}, "methods.der.alpha=7")
    again = load({"memory": MEMORY}, "methods=balanced")
    assert first.methods["der"].alpha == 7 != again.methods["der"].alpha
    assert first.methods["der"].beta == again.methods["der"].beta == PRESETS["balanced"].methods["der"]["beta"]
    assert "der" not in load({"memory": MEMORY, "methods": "balanced"}, "methods=no-data").methods


def test_a_presets_settings_of_other_sections_give_way_to_the_configs_own(load):
    strict = load({"memory": MEMORY, "methods": "strict"})
    assert (strict.train.loss_mean, strict.memory.shares, strict.memory.drawn_by) == (
        "rows",
        {"refusal": 0.25},
        "balanced",
    )
    own = load({"memory": MEMORY | {"shares": {"refusal": 0.5}}, "train": {"loss_mean": "capped"}, "methods": "strict"})
    assert (own.train.loss_mean, own.memory.shares, own.memory.balance_by) == ("capped", {"refusal": 0.5}, "kind")
    for overrides in (["methods=strict", "train.loss_mean=tokens"], ["train.loss_mean=tokens", "methods=strict"]):
        assert load({"memory": MEMORY}, *overrides, "methods.der.alpha=4").train.loss_mean == "tokens", overrides
    other = load({"memory": MEMORY, "methods": "strict"}, "train.seed=1", "methods=balanced")
    assert (other.train.loss_mean, other.memory.shares, other.train.seed) == ("tokens", {}, 1)
    with pytest.raises(ConfigError, match="needs `memory"):
        load({"methods": "strict"})


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"shares": {"refusal": 0.7, "answer": 0.4}}, "shares: their sum is 1.1"),
        ({"shares": {"refusal": 0.0}}, "shares: their sum is 0"),
        ({"shares": {"refusal": 0.2}, "draw": "mix_cd"}, "a draw that is mix_cd has none"),
    ],
)
def test_shares_that_no_draw_can_have_are_refused(load, memory, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load({"memory": MEMORY | memory})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("balancd", "no preset is named 'balancd'; did you mean `balanced`?"),
        ("everything", "no preset is named 'everything'; known presets: balanced, strict, no-data"),
        ("ewc", "'ewc' is a method, not a preset; write `methods: {ewc: {}}`"),
    ],
)
def test_an_unknown_preset_is_told_with_what_works(load, given, message):
    for found in (
        message_of(load, {"memory": MEMORY, "methods": given}),
        message_of(load, {"memory": MEMORY}, f"methods={given}"),
    ):
        assert f"methods: {message}" in found and "run.yaml" in found


def test_the_preset_without_data_needs_no_memory_and_the_other_one_says_so(load):
    assert load({"methods": "no-data"}).memory is None
    assert "methods: der needs `memory: {source: ...}`" in message_of(load, {"methods": "balanced"})
