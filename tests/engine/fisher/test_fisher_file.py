"""The Fisher as a file: near the exact one, the same on any number of ranks, and of no use to another model."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safecl.config import ConfigError, RunConfig
from safecl.engine.fisher.file import open_fisher
from tests.engine.fisher import fisher_scenes
from tests.engine.passes import oracle
from tests.engine.scenes import random_dataset, tiny_model
from tests.methods import scenes
from tests.training.test_trainer import tree

STEPS = 4


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    from safecl.demo.materials import write_materials

    folder = tmp_path_factory.mktemp("demo")
    write_materials(folder)
    return folder


def exact_fisher() -> dict[str, torch.Tensor]:
    """Mean over the rows, of unequal length, of the squared gradient of each row's own mean-token NLL."""
    model, data = tiny_model(), random_dataset(20, seed=2)
    assert len(set(data.lengths.tolist())) > 5
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in data.rows(range(len(data))):
        for name, grad in oracle.gradients(model, oracle.row_nll(model, row).mean()).items():
            total[name] += grad**2 / len(data)
    return total


def relative_l1(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    error = sum((found[name].float() - expected[name]).abs().sum() for name in expected)
    return float(error / sum(value.abs().sum() for value in expected.values()))


@pytest.fixture(scope="module")
def estimated(rank_pool, tmp_path_factory) -> dict[str, Path]:
    """Files of several topologies."""
    folder = tmp_path_factory.mktemp("fisher")
    asked = {
        "one rank": (1, dict(deepspeed={"stage": 2})),
        "two ranks": (2, dict(deepspeed={"stage": 3})),
        "exact": (2, dict(deepspeed={"stage": 1}, exact=True)),
    }
    for name, (world_size, arguments) in asked.items():
        rank_pool(world_size).run(fisher_scenes.estimate, path=str(folder / f"{name}.safetensors"), **arguments)
    return {name: folder / f"{name}.safetensors" for name in asked}


def test_64_sign_batches_are_near_the_exact_fisher_and_fewer_are_not(rank_pool, estimated, tmp_path):
    exact = exact_fisher()
    assert relative_l1(load_file(estimated["two ranks"]), exact) <= 0.15
    rank_pool(2).run(fisher_scenes.estimate, path=str(tmp_path / "few"), sign_batches=4)
    assert relative_l1(load_file(tmp_path / "few"), exact) > 0.25


def test_the_exact_mode_is_the_exact_fisher(estimated):
    assert relative_l1(load_file(estimated["exact"]), exact_fisher()) <= 4e-3  # bf16


def test_the_estimate_does_not_depend_on_ranks_and_stage(estimated):
    one, two = load_file(estimated["one rank"]), load_file(estimated["two ranks"])
    assert relative_l1(one, {name: value.float() for name, value in two.items()}) <= 1e-3
    means = [open_fisher(estimated[name]).header.mean for name in ("one rank", "two ranks")]
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    total = sum(value.double().sum() for value in two.values()) / sum(value.numel() for value in two.values())
    assert float(total) == pytest.approx(means[1], rel=1e-3)


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "none"), (1, "none"), (2, "cpu"), (3, "none")])
def test_ewc_with_a_file_equals_plain_pytorch_in_every_stage(rank_pool, tmp_path, stage, optimizer):
    path = str(tmp_path / "fisher.safetensors")
    weights = fisher_scenes.write_random_fisher(path)
    deepspeed = {"stage": stage, "offload": {"optimizer": optimizer, "fisher": "cpu" if stage == 3 else "none"}}
    methods = {"ewc": {"strength": 1.0, "fisher": path}}
    found = rank_pool(2).run(scenes.train, steps=STEPS, memory=None, methods=methods, deepspeed=deepspeed)[0]
    start, end = expected(weights)
    assert oracle.relative_distance(found["weights"], end, start) <= 1e-3
    assert oracle.relative_distance(found["weights"], expected(None)[1], start) > 1e-2
    assert found["losses"][0]["penalty"] == 0.0 < found["losses"][1]["penalty"]


def expected(weights: dict[str, torch.Tensor] | None):
    from tests.methods import reference
    from tests.methods.test_replay_methods import task_rows

    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [
        lambda rows=rows: reference.mean_nll(model, rows) for rows in task_rows(random_dataset(60, seed=1), STEPS)
    ]
    pull = (
        (lambda params: {})
        if weights is None
        else lambda params: {n: weights[n] * (p - start[n]) for n, p in params.items()}
    )
    return start, reference.train(model, losses, pull=pull)


# ------------------------------------------------------------------------------------------------------------- refusals


def change(path: str, how: str) -> None:
    if how == "truncated":
        Path(path).write_bytes(Path(path).read_bytes()[:-5])
        return
    if how == "no fisher":
        save_file({"a": torch.zeros(2)}, path)
        return
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del values[name]
    elif how == "shape":
        values[name] = values[name].T.contiguous()
    elif how == "dtype":
        values[name] = values[name].float()
    elif how == "version":
        metadata["safecl-fisher"] = json.dumps(json.loads(metadata["safecl-fisher"]) | {"format_version": 9})
    save_file(values, path, metadata=metadata)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no Fisher of model.layers.1.mlp.up_proj.weight"),
        ("shape", "model.layers.1.mlp.up_proj.weight has shape [32, 45] there and [45, 32] in this model"),
        ("truncated", "estimate it anew"),
        ("no fisher", "not a Fisher file"),
        ("dtype", "up_proj.weight is F32"),
        ("version", "format version 9"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(rank_pool, tmp_path, how, message):
    path = str(tmp_path / "fisher.safetensors")
    fisher_scenes.write_random_fisher(path)
    change(path, how)
    said = rank_pool(2).run(fisher_scenes.refused, path=path)
    assert said[0] == said[1] and message in said[0] and path in said[0], said


def test_the_verb_writes_a_file_that_a_run_takes_and_another_model_refuses(rank_pool, materials, tmp_path, monkeypatch):
    from safecl.planning.run_plan import plan_run

    monkeypatch.setenv("SAFECL_CACHE", str(materials / "cache"))
    path, output = tmp_path / "fisher.safetensors", tmp_path / "run"
    run = tree(materials, output, methods={"ewc": {"sign_batches": 4, "rows_per_batch": 8}}) | {"safety": None}
    arguments = dict(tree=run, path=str(path), exact=False, cache=str(materials / "cache"))
    rank_pool(2).run(fisher_scenes.fisher_of, **arguments)
    header = open_fisher(path).header
    assert (header.estimator, header.sign_batches, header.num_rows) == ("random signs", 4, 24) and header.mean > 0
    assert header.versions["torch"] == torch.__version__
    written = path.stat().st_mtime_ns
    rank_pool(2).run(fisher_scenes.fisher_of, **arguments)
    assert path.stat().st_mtime_ns == written  # it was there already

    using = run | {"methods": {"ewc": {"fisher": str(path)}}, "memory": None}
    plan_run(RunConfig.model_validate(using))
    other = other_model(materials / "random-model", tmp_path / "other-model")
    with pytest.raises(ConfigError, match=r"made for .*random-model.* and model.path is .*other-model"):
        plan_run(RunConfig.model_validate(using | {"model": run["model"] | {"path": str(other)}}))


def other_model(folder: Path, copy: Path) -> Path:
    """The model with one bit of one weight changed."""
    import shutil

    shutil.copytree(folder, copy)
    file = next(copy.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return copy


def test_a_header_of_absurd_length_is_a_message(tmp_path):
    path = tmp_path / "fisher.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        open_fisher(path)


def notes_of_runs(tree: dict, cache: str) -> list[list[str]]:
    """The messages of two runs of one config, in two folders."""
    import os

    from safecl.training.trainer import Trainer

    os.environ["SAFECL_CACHE"] = cache
    said = []
    for number in range(2):
        trainer = Trainer(RunConfig.model_validate(tree | {"output": f"{tree['output']}-{number}"}))
        lines: list[str] = []
        trainer.console.note = lines.append
        trainer.fit()
        said.append(lines)
    return said


def test_a_second_run_loads_the_fisher_that_the_first_has_kept(rank_pool, materials, tmp_path):
    methods = {"ewc": {"strength": 1.0, "sign_batches": 4, "rows_per_batch": 4}}
    run = tree(materials, tmp_path / "run", methods=methods, train={"max_steps": 2}) | {"safety": None}
    first, second = rank_pool(2).run(notes_of_runs, tree=run, cache=str(tmp_path / "cache"))[0]
    assert any(line.startswith("fisher: built in") for line in first)
    assert any(line.startswith("fisher: reused from") for line in second)
    lines = [(tmp_path / f"run-{number}" / "metrics.jsonl").read_text().splitlines() for number in range(2)]
    penalties = [[json.loads(line)["loss/penalty"] for line in each] for each in lines]
    assert penalties[0] == penalties[1] and penalties[0][0] == 0.0 < penalties[0][1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_file_with_a_value_that_no_fisher_has_is_refused_by_name(tmp_path, value):
    values = torch.ones(2, 3, dtype=torch.bfloat16)
    open_fisher(_file_of(tmp_path / "good.safetensors", values, 1.0)).check_values()
    values[1, 2] = value
    fisher = open_fisher(_file_of(tmp_path / "bad.safetensors", values, 1.0))
    told = r"bad\.safetensors: layer\.weight holds NaN, infinite or negative values \(1 of the"
    with pytest.raises(ConfigError, match=told):
        fisher.check_values()
    with pytest.raises(ConfigError, match=told):
        fisher.read("layer.weight", 3, 6)
    assert fisher.read("layer.weight", 0, 5).tolist() == [1.0] * 5
    with pytest.raises(ConfigError, match="its mean is"):
        open_fisher(_file_of(tmp_path / "mean.safetensors", torch.ones(2, 3, dtype=torch.bfloat16), value))


def _file_of(path: Path, values: torch.Tensor, mean: float) -> Path:
    """A Fisher file of one weight."""
    import dataclasses

    from safecl.engine.fisher.file import FisherHeader

    header = FisherHeader(mean, 6, "exact", 0, 1, 0, 1, "rows", "model", "hash", "fp32")
    save_file({"layer.weight": values}, path, {"safecl-fisher": json.dumps(dataclasses.asdict(header))})
    return path
