"""launch/recipes: `safecl check` passes with a folder of the model's shape, and the predictions are the code's."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.faults import nodes
from benchmarks.planning import scaling
from safecl import cli
from safecl.config import load_config
from safecl.planning import model_checks
from safecl.planning.costs import model_shape

RECIPES = scaling.recipes()
ROWS = {
    "gsm8k": lambda i: {"question": f"What is {i} plus {i + 1}?", "answer": f"It is {2 * i + 1}.\n#### {2 * i + 1}"},
    "sst2": lambda i: {"sentence": f"a film of {i} good minutes", "label": i % 2},
    "code": lambda i: {"instruction": f"Write {i} in Python.", "input": "", "output": f"print({i})"},
}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Toy rows in the forms of the real data sets."""
    folder = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        write(folder / f"{name}_train.jsonl", [row(i) for i in range(60)])
        write(folder / f"{name}_test.jsonl", [row(i) for i in range(100, 120)])
    write(folder / "refusals.jsonl", [{"prompt": f"Harm {i}", "completion": "I cannot help."} for i in range(60)])
    write(folder / "disallowed.jsonl", [{"prompt": f"Describe crime number {i}"} for i in range(200)])
    write(folder / "benign.jsonl", [{"prompt": f"Describe plant number {i}"} for i in range(200)])
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a model's config.json, a toy tokenizer, and a file of weights that is a hole."""
    from transformers import AutoConfig

    from safecl.demo.model import train_tokenizer

    tokenizer = train_tokenizer([json.dumps(row(i)) for row in ROWS.values() for i in range(60)], 200)
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            settings = dict(json.loads((scaling.RECIPES / "shapes.json").read_text())[name])
            made[name] = tmp_path_factory.mktemp("model") / name
            AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
            write_hole(made[name] / "model.safetensors", scaling.model_of(name))
        return made[name]

    return folder_of


def write_hole(path: Path, model) -> None:
    """Write a safetensors file with the names and the shapes of a model, whose values take no room on the disk."""
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def name_of(path: Path) -> str:
    return next(
        name for name in json.loads((scaling.RECIPES / "shapes.json").read_text()) if path.name.startswith(name)
    )


_TRACED: dict[tuple, int] = {}


def keep_it_short(config, monkeypatch) -> None:
    """Let `check` trace one micro-batch per model, a full one of the recipe, which the head of the recipe counts too;
    and read none of the weights, which are a hole of up to 140 GB. tests/planning compares traces with measurements."""
    trace, full = model_shape.activation_bytes, model_shape._micro_batch(config)

    def traced(settings, model, batch, masked=False):
        key = (settings.to_json_string(), model.model_dump_json(exclude={"path"}), full, masked)
        if key not in _TRACED:
            _TRACED[key] = trace(settings, model, full, masked=masked)
        return _TRACED[key]

    monkeypatch.setattr(model_shape, "activation_bytes", traced)
    monkeypatch.setattr(model_shape, "inference_bytes", lambda settings, model, batch: 0)
    monkeypatch.setattr(model_checks, "_check_weights_are_finite", lambda settings: None)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_passes_check_and_states_what_the_code_predicts(path, data, models, tmp_path, capsys, monkeypatch):
    config = load_config(path)
    keep_it_short(config, monkeypatch)
    task = config.tasks[0]
    overrides = [
        f"model.path={models(name_of(path))}",
        f"tasks.0.train={data / Path(task.train).name}",
        f"tasks.0.eval.path={data / Path(task.eval.path).name}",
        f"memory.source={data / 'refusals.jsonl'}",
        f"safety.prompts={data / 'disallowed.jsonl'}",
        f"safety.benign_prompts={data / 'benign.jsonl'}",
        f"output={tmp_path / 'run'}",
        "train.allow_few_steps=true",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", str(path), *overrides])
    out, err = capsys.readouterr()
    assert ended.value.code in (0, None), err
    launched, step = (stated_in(path, name) for name in ("launched", "step"))
    assert step in out, out
    (found,) = (line for line in out.splitlines() if line.strip().startswith("launched "))
    for mine, others in zip(gigabytes_of(found), gigabytes_of(launched), strict=True):
        assert 0.98 * others <= mine <= others, (found, launched)  # these few short rows need fewer buffers
    assert path.read_text() == scaling.with_head(path), "python -m benchmarks.planning.scaling renews the predictions"


def stated_in(path: Path, name: str) -> str:
    """What the head of a recipe states under a name."""
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(f"# {name}: "))
    return line.partition(": ")[2]


def gigabytes_of(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) GB", line)]


def test_there_is_a_recipe_for_every_family_on_every_machine():
    families = ("gemma-2b", "llama-2-7b", "llama-3-70b", "llama-3-8b", "mistral-7b", "qwen3-8b")
    for machine in ("1x80gb", "8x80gb", "4x8x80gb"):
        assert tuple(name_of(path) for path in RECIPES if path.parent.name == machine) == families
    assert {path.stem.rpartition("-")[2] for path in RECIPES} == set(ROWS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_fits_its_devices(path):
    assert gigabytes_of(stated_in(path, "launched"))[0] < 76  # of 80, with room for CUDA itself


def test_the_tables_of_docs_scaling_are_those_of_the_code():
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in (scaling.volume_table(), scaling.scaling_table(), scaling.methods_table(), scaling.checks_table()):
        assert table in page, "python -m benchmarks.planning.scaling renews the tables"


def test_the_model_is_within_a_tenth_of_every_point_that_was_measured_on_a_gpu():
    points = scaling.gpu_points()
    assert len(points) == 7
    for what, measured, model, _ in points:
        assert 0.9 < model / measured < 1.1, what


def test_state_and_weights_in_host_memory_take_the_time_of_the_link():
    device, shape = scaling.DEVICES["H100"], scaling.shape_of("llama-2-7b")
    one, methods = scaling.Cluster(device, 1, 1), {"ewc": {}, "ema": {}}
    away = scaling.config_of(3, methods, offload={"reference": "cpu", "fisher": "cpu", "ema": "cpu"})
    update = scaling.step_time(shape, away, one, 8192).update
    assert update == pytest.approx((2 + 2) * shape.trained / device.host)  # anchor and Fisher
    few = scaling.step_time(shape, away, one, 64)  # the average takes longer than the passes that it is taken beside
    assert few.update + few.passes == pytest.approx((2 + 2 + 4) * shape.trained / device.host)
    masked = scaling.config_of(3, {"ewc": {}, "psmt": {}}, offload={"reference": "cpu", "fisher": "cpu", "ema": "cpu"})
    inside = scaling.step_time(shape, masked, one, 8192).update
    assert inside == pytest.approx((2 + 2 + 4) * shape.trained / device.host)  # psmt's average reads the Fisher
    here = scaling.config_of(3, methods, offload={"reference": "none"})
    assert scaling.step_time(shape, here, one, 8192).update == pytest.approx(42 * shape.trained / device.memory)
    streamed = scaling.config_of(3, offload={"optimizer": "cpu", "parameters": "cpu"})
    kept = scaling.config_of(3, offload={"optimizer": "cpu"})
    times = [scaling.step_time(shape, config, one, 3 * 8192).exchange for config in (streamed, kept)]
    assert times[0] - times[1] == pytest.approx(3 * 2 * 2 * shape.weights / device.host)  # micro-batches, passes, bf16


def test_the_table_of_docs_launching_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text())
    page = (ROOT / "docs" / "launching.md").read_text()
    assert nodes.table(results) in page, "python -m benchmarks.faults.sections nodes renews the table"
    assert results["nodes"]["found"].keys() == nodes.SCENES.keys()
