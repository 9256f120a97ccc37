"""Each merge of bf16 folders in three files, against fp64 over whole state dicts: within one unit in the last place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safecl.kernels import backends
from safecl.kernels.ties import torch_twin
from safecl.merging import arithmetic, merge, stream
from safecl.merging.arithmetic import drop_
from safecl.storage import durable
from tests.merging import models

State = dict[str, torch.Tensor]


def each(function: Callable[..., torch.Tensor]) -> Callable[..., State]:
    """An oracle that works tensor by tensor: function(name, base, *tuned)."""
    return lambda base, *tuned: {name: function(name, base[name], *(state[name] for state in tuned)) for name in base}


def trimmed(tau: torch.Tensor, density: float) -> torch.Tensor:
    """By sorting. The order is stable, so of equal magnitudes the first stay."""
    order = tau.flatten().abs().sort(descending=True, stable=True).indices
    kept = torch.zeros(tau.numel(), dtype=torch.float64)
    kept[order[: max(1, int(density * tau.numel()))]] = 1
    return tau * kept.view_as(tau)


def elected(taus: list[torch.Tensor], weights: list[float], normalize: bool) -> torch.Tensor:
    weighted = torch.stack([w * tau for w, tau in zip(weights, taus, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = (weighted.sign() == sign).double()
    shape = (-1, *[1] * taus[0].dim())
    divisor = (torch.tensor(weights, dtype=torch.float64).view(shape) * agrees).sum(0)
    divisor[divisor == 0] = 1
    return (weighted * agrees).sum(0) / (divisor if normalize else 1)


def ties(name: str, base: torch.Tensor, *tuned: torch.Tensor) -> torch.Tensor:
    return base + 0.7 * elected([trimmed(theta - base, 0.3) for theta in tuned], [1.0, 2.0], True)


def ties_over_the_model(base: State, *tuned: State) -> State:
    def flat(state: State) -> torch.Tensor:
        return torch.cat([(state[name] - base[name]).flatten() for name in base])

    whole = elected([trimmed(flat(state), 0.3) for state in tuned], [1.0, 1.0], True)
    parts = whole.split([value.numel() for value in base.values()])
    return {name: base[name] + part.view_as(base[name]) for name, part in zip(base, parts, strict=True)}


def drops(index: int, name: str, like: torch.Tensor) -> torch.Tensor:
    """The draws alone: they are part of the merge, and told to the oracle."""
    kept = torch.ones(like.shape)
    drop_(kept, 0.4, seed=5, model=index, name=name)
    return kept.double() / 0.4


def dare(name: str, base: torch.Tensor, *tuned: torch.Tensor) -> torch.Tensor:
    return base + 0.5 * sum(drops(i, name, base) * (theta - base) for i, theta in enumerate(tuned))


def dare_ties(name: str, base: torch.Tensor, *tuned: torch.Tensor) -> torch.Tensor:
    taus = [drops(i, name, base) * (theta - base) for i, theta in enumerate(tuned)]
    return base + elected(taus, [1.0, 1.0], False)


def slerp(name: str, base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    angle = math.acos(float((base * tuned).sum() / (base.norm() * tuned.norm())))
    if math.cos(angle) > 0.9995:
        return 0.7 * base + 0.3 * tuned
    return (math.sin(0.7 * angle) * base + math.sin(0.3 * angle) * tuned) / math.sin(angle)


def lines(name: str, base: torch.Tensor, *tuned: torch.Tensor) -> torch.Tensor:
    block = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return base + (0.1 if block is None else 0.1 + 0.9 * block / 2) * sum(theta - base for theta in tuned)


def bang(base: State, *tuned: State) -> State:
    lengths = [math.sqrt(sum(float((s[name] - base[name]).square().sum()) for name in base)) for s in tuned]
    mean = sum(lengths) / 2
    return {
        name: base[name]
        + sum(mean / length * (s[name] - base[name]) for s, length in zip(tuned, lengths, strict=True)) / 2
        for name in base
    }


@dataclass
class Case:
    """A merge, its models and settings, and its oracle, which gets the base (the first tuned model where there is none)
    and the tuned ones."""

    oracle: Callable[..., State]
    num_tuned: int = 2
    has_base: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "linear": Case(each(lambda n, b, *t: (b + 2 * t[0] + 3 * t[1]) / 6), settings={"weights": [1, 2, 3]}),
    "wise_ft": Case(each(lambda n, b, t: 0.8 * b + 0.2 * t), num_tuned=1, settings={"alpha": 0.2}),
    "soup": Case(each(lambda n, a, b: (a + b) / 2), has_base=False),
    "task_arithmetic": Case(
        each(lambda n, b, *t: b + 0.6 * (t[0] - b) - 0.3 * (t[1] - b)), settings={"scale": 0.6, "weights": [1, -0.5]}
    ),
    "slerp": Case(each(slerp), num_tuned=1, settings={"t": 0.3}),
    "ties": Case(each(ties), settings={"density": 0.3, "scale": 0.7, "weights": [1, 2]}),
    "ties scope=model": Case(ties_over_the_model, settings={"density": 0.3, "scope": "model"}),
    "dare": Case(each(dare), settings={"density": 0.4, "scale": 0.5, "seed": 5}),
    "dare_ties": Case(each(dare_ties), settings={"density": 0.4, "seed": 5}),
    "magmax": Case(
        each(lambda n, b, x, y: b + 0.5 * torch.where((y - b).abs() > (x - b).abs(), y - b, x - b)),
        settings={"scale": 0.5},
    ),
    "lines": Case(each(lines), settings={"alpha": 0.1}),
    "bang": Case(bang),
}


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("case", list(CASES))
def test_a_merge_is_its_formula_to_the_last_place(parents, family, case, tmp_path):
    folders, wanted = parents(family), CASES[case]
    tuned = [folders[name] for name in models.TUNED[: wanted.num_tuned]]
    base = folders["base"] if wanted.has_base else None
    merge(case.split()[0], base=base, tuned=tuned, out=tmp_path / "out", **wanted.settings)
    given = [*([base] if base else []), *tuned]
    models.assert_rounded(models.state(tmp_path / "out"), wanted.oracle(*map(models.exact, given)))


@pytest.mark.parametrize("case", ["linear", "slerp", "ties", "ties scope=model", "magmax", "bang"])
def test_work_in_many_pieces_is_work_on_the_whole(parents, case, tmp_path, monkeypatch):
    folders, wanted = parents("qwen"), CASES[case]
    monkeypatch.setattr(arithmetic, "PIECE", 100)
    monkeypatch.setattr(torch_twin, "CHUNK", 100)
    monkeypatch.setattr(stream, "PIECE_ELEMENTS", 70)
    tuned = [folders[name] for name in models.TUNED[: wanted.num_tuned]]
    with backends.using("torch"):
        merge(case.split()[0], base=folders["base"], tuned=tuned, out=tmp_path / "out", **wanted.settings)
    expected = wanted.oracle(*map(models.exact, [folders["base"], *tuned]))
    models.assert_rounded(models.state(tmp_path / "out"), expected)


@pytest.mark.parametrize("case", ["wise_ft", "ties", "dare"])
def test_a_slow_disk_gets_what_was_computed_though_the_memory_is_read_into_again(parents, case, tmp_path, monkeypatch):
    folders, wanted, write = parents("qwen"), CASES[case], durable._write_all

    def slowly(file, block) -> None:
        time.sleep(0.003)
        write(file, block)

    monkeypatch.setattr(durable, "_write_all", slowly)
    monkeypatch.setattr(stream, "PIECE_ELEMENTS", 700)
    tuned = [folders[name] for name in models.TUNED[: wanted.num_tuned]]
    merge(case, base=folders["base"], tuned=tuned, out=tmp_path / "out", dtype="fp32", **wanted.settings)
    expected = wanted.oracle(*map(models.exact, [folders["base"], *tuned]))
    models.assert_rounded(models.state(tmp_path / "out"), expected)


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_the_fisher_average_is_its_formula_to_the_last_place(parents, family, tmp_path):
    folders = parents(family)
    states = [models.exact(folders[name]) for name in models.TUNED]
    generator = torch.Generator().manual_seed(1)
    fishers = []
    for index, state in enumerate(states):
        fisher = {name: (torch.rand(v.shape, generator=generator) * 10**-index).square() for name, v in state.items()}
        save_file(fisher, tmp_path / f"{index}.safetensors")
        fishers.append({name: value.double() for name, value in fisher.items()})
    merge(
        "fisher_average",
        tuned=[folders[name] for name in models.TUNED],
        out=tmp_path / "out",
        fisher=[str(tmp_path / "0.safetensors"), str(tmp_path / "1.safetensors")],
        weights=[1, 2],
        floor=0.01,
    )
    means = [float(torch.cat([v.flatten() for v in fisher.values()]).mean()) for fisher in fishers]
    expected = {}
    for name in states[0]:
        x, y = ((fisher[name] / mean + 0.01) for fisher, mean in zip(fishers, means, strict=True))
        expected[name] = (x * states[0][name] + 2 * y * states[1][name]) / (x + 2 * y)
    models.assert_rounded(models.state(tmp_path / "out"), expected)


def test_snapshots_are_averaged_by_the_steps_in_their_folders_names(parents, tmp_path):
    folders = parents()
    early = models.copy(folders["tuned"], tmp_path / "checkpoint-100")
    late = models.copy(folders["tuned2"], tmp_path / "checkpoint-200")
    report = merge("post_hoc_ema", tuned=[late, early], out=tmp_path / "out", sigma_rel=0.2)
    (note,) = report.notes
    share = float(note.split("step 100: ")[1].split(",")[0])
    assert 0 < share < 0.5
    a, b = models.exact(early), models.exact(late)
    found = models.exact(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], share * a[name] + (1 - share) * b[name], rtol=1e-2, atol=1e-4)


def test_coefficients_by_pattern_reach_the_tensors_that_they_name(parents, tmp_path):
    folders = parents()
    alpha = {"*.mlp.*": 1.0, "0-1": 0.0, "*": 0.5}
    merge("wise_ft", base=folders["base"], tuned=folders["tuned"], out=tmp_path / "out", alpha=alpha)
    base, tuned, found = (models.state(path) for path in (folders["base"], folders["tuned"], tmp_path / "out"))
    for name, value in found.items():
        if ".mlp." in name:
            assert torch.equal(value, tuned[name])
        elif ".layers.0." in name or ".layers.1." in name:
            assert torch.equal(value, base[name])
        else:
            assert not torch.equal(value, tuned[name]) and not torch.equal(value, base[name]), name
