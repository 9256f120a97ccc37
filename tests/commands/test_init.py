"""`safecl init` asks, and writes a config that works."""

from __future__ import annotations

from safecl.config import RunConfig, load_config
from safecl.config.docs import EXAMPLES, USUAL, section_of
from safecl.exits import ExitCode


def test_init_writes_a_config_that_loads_and_holds_the_answers(run, tmp_path):
    path = tmp_path / "new" / "run.yaml"
    code, out, _ = run(
        "init", "-o", path, "--model", "models/m: 7b", "--train", "up/my rows.jsonl", "--safety", "p.jsonl"
    )
    assert code == ExitCode.DONE and str(path) in out
    config = load_config(path)
    assert (config.model.path, config.tasks[0].train, config.safety.prompts) == (
        "models/m: 7b",
        "up/my rows.jsonl",
        "p.jsonl",
    )
    assert (config.tasks[0].name, config.output) == ("my-rows", "runs/my-rows")
    assert config.methods == RunConfig.model_validate(config.model_dump() | {"methods": "no-data"}).methods


def test_init_with_refusals_to_keep_takes_the_preset_for_them_and_screens_the_upload(run, tmp_path):
    assert run("init", "-o", tmp_path / "run.yaml", "--memory", "refusals.jsonl")[0] == ExitCode.DONE
    config = load_config(tmp_path / "run.yaml")
    assert config.memory.source == "refusals.jsonl" and config.scan.action == "report"
    assert config.methods == RunConfig.model_validate(config.model_dump() | {"methods": "balanced"}).methods


def test_init_with_disallowed_prompts_alone_lets_the_model_write_its_refusals(run, tmp_path):
    path = tmp_path / "run.yaml"
    assert run("init", "-o", path, "--memory-prompts", "disallowed.jsonl")[0] == ExitCode.DONE
    config = load_config(path)
    assert (config.memory.prompts, config.memory.source) == ("disallowed.jsonl", None) and config.scan is not None
    assert config.methods == RunConfig.model_validate(config.model_dump() | {"methods": "balanced"}).methods
    code, _, err = run("init", "-o", tmp_path / "b.yaml", "--memory", "a.jsonl", "--memory-prompts", "b.jsonl")
    assert code == ExitCode.USAGE and "leave one out" in err


def test_init_takes_the_strict_preset_where_rows_may_be_poisoned(run, tmp_path):
    path = tmp_path / "run.yaml"
    assert run("init", "-o", path, "--memory", "refusals.jsonl", "--untrusted")[0] == ExitCode.DONE
    config = load_config(path)
    assert (config.train.loss_mean, config.memory.shares, set(config.methods)) == ("rows", {"refusal": 0.25}, {"der"})
    assert "methods: strict" in path.read_text() and "loss_mean: rows" in path.read_text()  # what it stands for
    run("init", "-o", tmp_path / "other.yaml", "--untrusted")
    assert set(load_config(tmp_path / "other.yaml").methods) == {"ema"}


def test_init_never_overwrites(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    code, _, err = run("init", "-o", path)
    assert code == ExitCode.USAGE and "not overwritten" in err
    assert path.read_text() == "mine"


def on_a_terminal(monkeypatch, *answers: str) -> list[str]:
    """Answer the questions of a terminal with these texts, and return the questions once they are asked."""
    left, asked = iter(answers), []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda question, default: asked.append(question) or next(left))
    return asked


def test_init_asks_for_prompts_where_there_are_no_refusals_to_keep(run, tmp_path, monkeypatch):
    asked = on_a_terminal(monkeypatch, "models/m", "rows.jsonl", "none", "disallowed.jsonl", "none", "no")
    assert run("init", "-o", tmp_path / "run.yaml")[0] == ExitCode.DONE
    assert len(asked) == 6 and load_config(tmp_path / "run.yaml").memory.prompts == "disallowed.jsonl"


def test_init_asks_five_questions_on_a_terminal(run, tmp_path, monkeypatch):
    asked = on_a_terminal(monkeypatch, "models/m", "rows.jsonl", "kept.jsonl", "none", "yes")
    assert run("init", "-o", tmp_path / "run.yaml")[0] == ExitCode.DONE
    config = load_config(tmp_path / "run.yaml")
    assert len(asked) == 5 and (config.model.path, config.tasks[0].train, config.safety) == (
        "models/m",
        "rows.jsonl",
        None,
    )
    assert config.memory.source == "kept.jsonl" and config.train.loss_mean == "rows"


def test_a_section_of_the_starter_works_when_its_comment_signs_are_taken_away(run, tmp_path):
    path = tmp_path / "run.yaml"
    run("init", "-o", path)
    lines = path.read_text().splitlines()
    for section in ("memory", "safety"):
        start = lines.index(f"# {section}:")
        while start < len(lines) and lines[start]:
            lines[start] = lines[start].removeprefix("# ")
            start += 1
    path.write_text("\n".join(lines))
    config = load_config(path)
    assert config.memory.source == EXAMPLES["memory.source"] and config.safety.prompts == EXAMPLES["safety.prompts"]


def test_init_all_names_every_key_there_is(run, tmp_path):
    from safecl.config.docs import sections

    run("init", "-o", tmp_path / "run.yaml", "--all")
    text = (tmp_path / "run.yaml").read_text()
    for model in (RunConfig, *(section for _, section in sections())):
        assert all(f"{name}:" in text for name in model.model_fields), model
    load_config(tmp_path / "run.yaml")


def test_the_starters_keys_exist():
    for path, names in USUAL.items():
        model = RunConfig
        for part in filter(None, path.split(".")):
            model = section_of(model.model_fields[part].annotation)
        assert set(names) <= set(model.model_fields), path
