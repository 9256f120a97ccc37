"""Merges that restore safety: against fp64 over whole state dicts, and on adapters of the aligned model."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safecl.config import ConfigError
from safecl.merging import merge
from tests.merging import models
from tests.merging.memory import merged
from tests.merging.test_adapters import make_adapter

State = dict[str, torch.Tensor]
THRESHOLD = 0.6


def block_of(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def is_matrix(name: str, value: torch.Tensor) -> bool:
    return block_of(name) is not None and value.dim() == 2


def alignment(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A change of rank 4; of vectors, noise."""
    if len(shape) < 2:
        return 0.02 * torch.randn(shape, generator=generator)
    left, right = torch.randn(shape[0], 4, generator=generator), torch.randn(4, shape[1], generator=generator)
    return 0.01 * left @ right


def tuning(name: str, aligned: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A change that lies in the alignment's in even blocks, and is noise in odd ones."""
    noise = 0.01 * torch.randn(aligned.shape, generator=generator)
    if aligned.dim() == 2 and (block_of(name) or 0) % 2 == 0:
        return 0.1 * aligned @ torch.randn(aligned.shape[1], aligned.shape[1], generator=generator) + 0.1 * noise
    return noise


@functools.cache
def made(family: str, folder: Path) -> dict[str, Path]:
    """Folders of a base, an aligned model, a tuned and a safe one."""
    model, generator = models.tiny(family), torch.Generator().manual_seed(11)
    base = models.moved(model, 0, 0.0)
    vectors = {name: alignment(value.shape, generator) for name, value in base.items()}
    aligned = {name: value + vectors[name] for name, value in base.items()}
    tuned = {name: value + tuning(name, vectors[name], generator) for name, value in aligned.items()}
    safe = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in aligned.items()}
    for role, state in {"base": base, "aligned": aligned, "tuned": tuned, "safe": safe}.items():
        models.save(model, state, folder / role, torch.bfloat16)
    return {role: folder / role for role in ("base", "aligned", "tuned", "safe")}


@pytest.fixture(scope="module")
def safety_parents(tmp_path_factory):
    root = tmp_path_factory.mktemp("safety")
    return lambda family="llama": made(family, root / family)


def read(folders: dict[str, Path]) -> dict[str, State]:
    return {role: models.exact(path) for role, path in folders.items()}


def cosine_and_projection(name: str, states: dict[str, State]) -> tuple[float, torch.Tensor]:
    """By the formula, with the whole matrix C."""
    direction = states["aligned"][name] - states["base"][name]
    change = states["tuned"][name] - states["aligned"][name]
    projected = (direction @ direction.T / direction.norm()) @ change
    return float((projected * change).sum() / (projected.norm() * change.norm())), projected


def safe_lora(states: dict[str, State], chosen) -> State:
    result = dict(states["tuned"])
    for name in chosen:
        result[name] = states["aligned"][name] + cosine_and_projection(name, states)[1]
    return result


def cosines_of(states: dict[str, State]) -> dict[str, float]:
    return {n: cosine_and_projection(n, states)[0] for n, value in states["tuned"].items() if is_matrix(n, value)}


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_safe_lora_projects_the_matrices_whose_change_leaves_the_direction_of_alignment(
    safety_parents, family, tmp_path
):
    folders = safety_parents(family)
    states = read(folders)
    cosines = cosines_of(states)
    chosen = [name for name, cosine in cosines.items() if cosine <= THRESHOLD]
    assert {block_of(name) for name in chosen} == {1}, "noise is in odd blocks alone"
    parents = {role: folders[role] for role in ("base", "aligned", "tuned")}
    report = merge("safe_lora", **parents, out=tmp_path / "out", threshold=THRESHOLD)
    models.assert_rounded(models.state(tmp_path / "out"), safe_lora(states, chosen))
    (note,) = report.notes
    assert note.startswith(f"{len(chosen)} of {len(cosines)} matrices were projected; cosines from ")
    assert f"{min(cosines.values()):.4f}" in note and f"{max(cosines.values()):.4f}" in note


def test_safe_lora_projects_as_many_matrices_as_it_is_told_to_and_those_that_a_pattern_names(safety_parents, tmp_path):
    folders = safety_parents()
    states = read(folders)
    cosines = cosines_of(states)
    parents = {role: folders[role] for role in ("base", "aligned", "tuned")}
    merge("safe_lora", **parents, out=tmp_path / "three", number=3, threshold=-1)
    models.assert_rounded(
        models.state(tmp_path / "three"), safe_lora(states, sorted(cosines, key=cosines.__getitem__)[:3])
    )
    merge("safe_lora", **parents, out=tmp_path / "mlp", threshold={"*.mlp.*": 1, "*": -1})
    models.assert_rounded(
        models.state(tmp_path / "mlp"), safe_lora(states, [name for name in cosines if ".mlp." in name])
    )


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("with_safe", [True, False])
def test_safe_merge_merges_only_the_matrices_that_deviate(safety_parents, family, with_safe, tmp_path):
    folders = safety_parents(family)
    states = read(folders)
    expected = dict(states["tuned"])
    for name, cosine in cosines_of(states).items():
        if cosine < THRESHOLD:
            aligned, tuned, safe = (states[role][name] for role in ("aligned", "tuned", "safe"))
            expected[name] = aligned + 0.7 * (tuned - aligned) + (0.4 * (safe - aligned) if with_safe else 0)
    tuned_models = [folders["tuned"], folders["safe"]] if with_safe else folders["tuned"]
    settings = {"threshold": THRESHOLD, "tuned_weight": 0.7, "safe_weight": 0.4}
    parents = {role: folders[role] for role in ("base", "aligned")}
    merge("safe_merge", **parents, tuned=tuned_models, out=tmp_path / "out", **settings)
    models.assert_rounded(models.state(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_the_safety_vector_is_added_to_all_weights(safety_parents, family, tmp_path):
    folders = safety_parents(family)
    states = read(folders)
    parents = {role: folders[role] for role in ("base", "aligned", "tuned")}
    merge("safety_vector", **parents, out=tmp_path / "out", scale=0.7)
    expected = {n: t + 0.7 * (states["aligned"][n] - states["base"][n]) for n, t in states["tuned"].items()}
    models.assert_rounded(models.state(tmp_path / "out"), expected)


# ------------------------------------------------------------------------------------------------------------ adapters


def test_an_adapter_of_the_aligned_model_is_projected_without_a_loss_of_rank(safety_parents, tmp_path):
    """C (B A) = (C B) A: as the method's own code has it, on the factor B of peft's file."""
    folders = safety_parents()
    states = read(folders)
    adapter = make_adapter(folders["aligned"], tmp_path / "adapter")
    parents = {"base": folders["base"], "tuned": adapter}
    report = merge("safe_lora", **parents, out=tmp_path / "out", threshold=1, adapter_rank=4, dtype="fp32")
    assert [parent.role for parent in report.parents] == ["base", "tuned", "aligned"]
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).resolve() == folders["aligned"].resolve()
    names = [name for name in factors if "lora_A" in name]
    assert len(names) == len([name for name in written if "lora_A" in name]) == 9
    for name in names:
        weight = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        direction = states["aligned"][weight] - states["base"][weight]
        b = direction @ direction.T / direction.norm() @ factors[name.replace("lora_A", "lora_B")].double()
        expected = 3 * b @ factors[name].double()  # alpha / r = 12 / 4
        found = written[name.replace("lora_A", "lora_B")].double() @ written[name].double()
        assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_an_adapter_that_was_trained_on_neither_model_is_refused(safety_parents, tmp_path):
    folders = safety_parents()
    adapter = make_adapter(folders["safe"], tmp_path / "adapter")
    parents = {"base": folders["base"], "aligned": folders["aligned"], "tuned": adapter}
    with pytest.raises(ConfigError, match=r"differ from those of aligned .* and base .*as --aligned or --base"):
        merge("safe_lora", **parents, out=tmp_path / "out")


# --------------------------------------------------------------------------------------------------- small and refused


def test_a_matrix_that_alignment_or_tuning_has_left_alone_stays_as_tuned():
    name = "model.layers.0.w"
    base, tuned = {name: [[1.0, 2.0]], "a": [0.0]}, {name: [[5.0, 7.0]], "a": [2.0]}
    same = {name: [[1.0, 2.0]], "a": [1.0]}
    assert merged("safe_lora", tuned, base=base, aligned=same, threshold=1) == {name: [5.0, 7.0], "a": [2.0]}
    assert merged("safe_merge", tuned, base=base, aligned=same, threshold=1) == {name: [5.0, 7.0], "a": [2.0]}
    assert merged("safe_lora", tuned, base=base, aligned=tuned, threshold=1) == {name: [5.0, 7.0], "a": [2.0]}


@pytest.mark.parametrize("kind", ["safe_lora", "safe_merge", "safety_vector"])
def test_models_that_a_safety_merge_needs_are_named(safety_parents, kind, tmp_path):
    folders, out = safety_parents(), tmp_path / "out"
    with pytest.raises(ConfigError, match=f"{kind} needs the aligned model: --aligned FOLDER"):
        merge(kind, base=folders["base"], tuned=folders["tuned"], out=out)
    with pytest.raises(ConfigError, match=f"{kind} needs the base model: --base FOLDER"):
        merge(kind, aligned=folders["aligned"], tuned=folders["tuned"], out=out)
    with pytest.raises(ConfigError, match=r"aligned .*: has the weights of base .*, so there is no direction"):
        merge(kind, base=folders["base"], aligned=folders["base"], tuned=folders["tuned"], out=out)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- dampening


def importance(state: State, seed: int, path: Path, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(v.shape, generator=generator).pow(4).to(dtype) for name, v in state.items()}
    save_file(values, path)
    return {name: value.double() for name, value in values.items()}


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_dampening_shrinks_the_weights_that_harmful_rows_need_more(parents, family, tmp_path):
    folder = parents(family)["tuned"]
    state = models.exact(folder)
    kept = importance(state, 1, tmp_path / "all.safetensors", torch.bfloat16)
    harmful = importance(state, 2, tmp_path / "harmful.safetensors")
    files = {"fisher": str(tmp_path / "all.safetensors"), "harmful_fisher": str(tmp_path / "harmful.safetensors")}
    report = merge("ssd", tuned=folder, out=tmp_path / "out", **files, alpha=3, strength=2.5)
    expected, shrunk = {}, 0
    for name, value in state.items():
        chosen = harmful[name] > 3 * kept[name]
        expected[name] = torch.where(chosen, (2.5 * kept[name] / harmful[name]).clamp(max=1) * value, value)
        shrunk += int(chosen.sum())
    models.assert_rounded(models.state(tmp_path / "out"), expected)
    assert report.notes[-1].startswith(f"{shrunk} of {sum(v.numel() for v in state.values())} weights were shrunk")


def test_dampening_never_lets_a_weight_grow_and_sets_it_to_zero_where_only_harmful_rows_need_it(tmp_path):
    files = {"fisher": str(tmp_path / "all.safetensors"), "harmful_fisher": str(tmp_path / "harmful.safetensors")}
    save_file({"x": torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])}, files["fisher"])
    save_file({"x": torch.tensor([2.0, 1.0, 3.0, 0.0, 8.0])}, files["harmful_fisher"])
    values = [8.0, 8.0, 8.0, 8.0, 8.0]
    assert merged("ssd", values, **files, alpha=1)["x"] == [4.0, 8.0, 0.0, 8.0, 1.0]
    assert merged("ssd", values, **files, alpha=1, strength=4)["x"] == [8.0, 8.0, 0.0, 8.0, 4.0]
    assert merged("ssd", values, **files)["x"] == [8.0, 8.0, 0.0, 8.0, 8.0]
    with pytest.raises(ConfigError, match=r"ssd.alpha: -1 for x; a ratio is at least 0"):
        merged("ssd", values, **files, alpha=-1)


def test_files_that_dampening_needs_are_named(parents, tmp_path):
    folder, path = parents()["tuned"], tmp_path / "fisher.safetensors"
    with pytest.raises(ConfigError, match=r"ssd.harmful_fisher"):
        merge("ssd", tuned=folder, out=tmp_path / "out", fisher=str(path))
    files = {"fisher": str(path), "harmful_fisher": str(path)}
    with pytest.raises(ConfigError, match=r"fisher.safetensors: no such file"):
        merge("ssd", tuned=folder, out=tmp_path / "out", **files)
    state = models.state(folder)
    save_file({name: value for name, value in state.items() if "norm" not in name}, path)
    with pytest.raises(ConfigError, match=r"no values for model.*norm.weight, which has shape \[32\]"):
        merge("ssd", tuned=folder, out=tmp_path / "out", **files)
    save_file({name: -value.abs() for name, value in state.items()}, path)
    with pytest.raises(ConfigError, match=r"negative values for .*, which is no Fisher information"):
        merge("ssd", tuned=folder, out=tmp_path / "out", **files)
    assert not (tmp_path / "out").exists()
