"""Merges that run rows through a model: against fp64 over whole state dicts and a model in fp64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from safecl.config import ConfigError
from safecl.merging import merge
from safecl.merging.rows import inputs
from safecl.merging.rows.affirmative import OPENING, affirmative_rows, own_requests
from safecl.merging.rows.loaded import load
from tests.evaluation.models import byte_tokenizer
from tests.merging import models
from tests.merging.test_safety import made

State = dict[str, torch.Tensor]
ROWS = [("How?", "No."), ("Tell me how to pick a lock", "I can not."), ("x", "Sorry, no")]
BUDGET = 50


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(family)` gives folders of a base, an aligned, a tuned and a safe model, and a file of rows."""
    root = tmp_path_factory.mktemp("rows")
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "response": a}) + "\n" for p, a in ROWS))
    return lambda family="llama": made(family, root / family) | {"rows": file}


def encoded(rows=ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and targets (-100 outside of the answer), by the template of the test's tokenizer."""
    found = []
    for prompt, answer in rows:
        before, after = f"<user>{prompt}<assistant>", f"{answer}<end>"
        tokenizer = byte_tokenizer()
        head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
        found.append((torch.tensor([head + tail]), torch.tensor([[-100] * len(head) + tail])))
    return found


def in_fp64(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def parameters(model: transformers.PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """By their names in the folder, which has NeoX's head under an older name."""
    older = {"lm_head.weight": "embed_out.weight"} if model.config.model_type == "gpt_neox" else {}
    return {older.get(name, name): p for name, p in model.named_parameters()}


def inputs_of(model: transformers.PreTrainedModel, rows=ROWS) -> State:
    """All inputs of each linear layer of the blocks, fp64 [tokens, inputs]."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_hook(lambda m, x, y, n=name: found.setdefault(n + ".weight", []).append(x[0][0]))
    with torch.no_grad():
        for ids, _ in encoded(rows):
            model(ids)
    return {name: torch.cat(parts) for name, parts in found.items()}


# ------------------------------------------------------------------------------------------------------------ antidote


def pruned(values: torch.Tensor, instead: torch.Tensor, x: torch.Tensor, ratio: float) -> torch.Tensor:
    """By loops over output rows."""
    result, scores = values.clone(), (values - instead).abs() * x.square().mean(0).sqrt()
    for row in range(len(values)):
        worst = scores[row].argsort(descending=True)[: max(1, int(ratio * values.shape[1]))]
        result[row, worst] = instead[row, worst]
    return result


@pytest.mark.parametrize("family", list(models.FAMILIES))
@pytest.mark.parametrize("with_aligned", [False, True])
def test_antidote_removes_the_weights_of_each_row_that_harmful_rows_rely_on(folders, family, with_aligned, tmp_path):
    given = folders(family)
    tuned, aligned = models.exact(given["tuned"]), models.exact(given["aligned"])
    expected = dict(tuned)
    for name, x in inputs_of(in_fp64(given["tuned"])).items():
        instead = aligned[name] if with_aligned else torch.zeros_like(tuned[name])
        expected[name] = pruned(tuned[name], instead, x, 0.2)
    more = {"aligned": given["aligned"]} if with_aligned else {}
    report = merge("antidote", tuned=given["tuned"], data=given["rows"], out=tmp_path / "out", ratio=0.2, **more)
    models.assert_rounded(models.state(tmp_path / "out"), expected)
    assert report.notes[-2].endswith("rows.jsonl: 3 rows, 62 tokens"), report.notes
    assert "of linear layers removed (1" in report.notes[-1]


def test_rows_without_answers_get_an_affirmative_opening_and_no_file_means_own_requests(folders, tmp_path):
    given = folders()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"goal": prompt}) + "\n" for prompt, _ in ROWS))
    asked = {"prompts": (prompts, [(prompt, OPENING) for prompt, _ in ROWS]), "own": (None, own_rows())}
    for name, (data, rows) in asked.items():
        expected = models.exact(given["tuned"])
        for weight, x in inputs_of(in_fp64(given["tuned"]), rows).items():
            expected[weight] = pruned(expected[weight], torch.zeros_like(expected[weight]), x, 0.1)
        report = merge("antidote", tuned=given["tuned"], data=data, out=tmp_path / name)
        models.assert_rounded(models.state(tmp_path / name), expected)
        assert ("so each got an affirmative opening" in str(report)) == (name == "prompts")
        assert ("safecl's own requests, 24 rows" in str(report)) == (name == "own")


def own_rows() -> list[tuple[str, str]]:
    return [(row.messages[0].content, row.messages[1].content) for row in affirmative_rows(own_requests())]


# ------------------------------------------------------------------------------------------------------------- panacea


def ascent(folder: Path, length: float) -> State:
    model = in_fp64(folder)
    for ids, labels in encoded():
        (model(ids, labels=labels).loss / len(ROWS)).backward()
    named = parameters(model)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in named.values()))
    return {name: p.detach() + length / norm * p.grad for name, p in named.items()}


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_panacea_adds_the_harmful_gradient_at_a_given_length(folders, family, tmp_path):
    given = folders(family)
    expected = ascent(given["tuned"], 1.5)
    merge("panacea", tuned=given["tuned"], data=given["rows"], out=tmp_path / "out", rho=1.5, dtype="fp32")
    found = models.state(tmp_path / "out")
    before = models.exact(given["tuned"])
    moved = math.sqrt(sum(float((found[name] - before[name]).square().sum()) for name in found))
    assert abs(moved - 1.5) < 1e-4
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert float((value - expected[name]).norm() / (expected[name] - before[name]).norm()) < 1e-4, name


def test_panacea_takes_the_gradient_anew_in_each_step(folders, tmp_path):
    given = folders()
    common = {"data": given["rows"], "dtype": "fp32"}
    report = merge("panacea", tuned=given["tuned"], out=tmp_path / "two", rho=1, steps=2, **common)
    merge("panacea", tuned=given["tuned"], out=tmp_path / "first", rho=0.5, **common)
    merge("panacea", tuned=tmp_path / "first", out=tmp_path / "second", rho=0.5, **common)
    two, one_by_one = models.state(tmp_path / "two"), models.state(tmp_path / "second")
    assert all(torch.allclose(two[name], one_by_one[name], atol=1e-6) for name in two)
    before, after = map(float, report.notes[-1].split(": ")[1].split(", "))
    assert after > before


# ---------------------------------------------------------------------------------------------------------- safe delta


def safe_delta(aligned: torch.Tensor, tuned: torch.Tensor, x: torch.Tensor, s: float) -> tuple[torch.Tensor, int]:
    """Element by element, in one block of columns."""
    h = 2 * x.T @ x / len(x)
    h.diagonal()[h.diagonal() == 0] = 1
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).T
    rows, columns = aligned.shape
    sensitivity = 1 / upper.diagonal() ** 2
    budget = s / 2 * float(sensitivity.mean()) * rows * columns / (4096 * 1024)
    order = sorted((float(sensitivity[c]), r * columns + c) for r in range(rows) for c in range(columns))
    keep, spent = torch.zeros(rows, columns, dtype=torch.bool), 0.0
    for cost, place in order[: len(order) - int(0.15 * len(order))]:
        r, c = divmod(place, columns)
        spent += float(tuned[r, c] - aligned[r, c]) ** 2 * cost
        if spent > budget:
            break
        keep[r, c] = True
    weights = aligned.clone()
    for left in range(0, columns, 4):
        right = min(left + 4, columns)
        errors = []
        for c in range(left, right):
            new = torch.where(keep[:, c], tuned[:, c], weights[:, c])
            errors.append((weights[:, c] - new) / upper[c, c])
            weights[:, c] = new
        for c, error in zip(range(left, right), errors, strict=True):
            weights[:, right:] -= error[:, None] * upper[c, right:]
    return weights, int(keep.sum())


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_safe_delta_keeps_cheap_changes_and_compensates_for_them(folders, family, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PRODUCT_BYTES", 3 * 4 * 32**2)  # several parts, so several passes
    given = folders(family)
    aligned, tuned = models.exact(given["aligned"]), models.exact(given["tuned"])
    expected, kept, count = dict(tuned), 0, 0
    for name, x in inputs_of(in_fp64(given["aligned"])).items():
        expected[name], own = safe_delta(aligned[name], tuned[name], x, BUDGET)
        kept, count = kept + own, count + tuned[name].numel()
    assert 0.1 < kept / count < 0.84, "the budget decides"
    parents = {"aligned": given["aligned"], "tuned": given["tuned"], "data": given["rows"]}
    report = merge("safe_delta", **parents, out=tmp_path / "out", s=BUDGET, dtype="fp32")
    found = models.state(tmp_path / "out")
    for name, value in found.items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-4, name
    assert abs(int(report.notes[-1].split()[0]) - kept) <= 3


def test_safe_delta_without_a_budget_keeps_the_aligned_matrices(folders, tmp_path):
    given = folders()
    parents = {"aligned": given["aligned"], "tuned": given["tuned"], "data": given["rows"]}
    merge("safe_delta", **parents, out=tmp_path / "out", s=0)
    found, aligned, tuned = (models.state(path) for path in (tmp_path / "out", given["aligned"], given["tuned"]))
    for name, value in found.items():
        is_linear = "_proj" in name and name.endswith("weight")
        assert torch.equal(value, aligned[name] if is_linear else tuned[name]), name


# ---------------------------------------------------------------------------------------------------------------- somf


def answer_nll(model: torch.nn.Module, state: State, rows=ROWS) -> list[torch.Tensor]:
    """Mean over the answer's tokens of each row."""
    return [
        torch.func.functional_call(model, state, (), {"input_ids": ids, "labels": labels}).loss
        for ids, labels in encoded(rows)
    ]


def num_targets(rows) -> list[int]:
    return [int((labels >= 0).sum()) for _, labels in encoded(rows)]


def margins(model: torch.nn.Module, state: State, rejected) -> list[torch.Tensor]:
    """log p(chosen) - log p(rejected) of each row."""
    chosen, others = (answer_nll(model, state, rows) for rows in (ROWS, rejected))
    sizes = zip(num_targets(ROWS), num_targets(rejected), strict=True)
    return [n * y - m * x for x, y, (m, n) in zip(chosen, others, sizes, strict=True)]


def learned(given: dict[str, Path], weights: list[float], steps: int, lr: float, rejected=None) -> tuple[State, State]:
    """The result and the logits, with the gradient of the whole expression by autograd in fp64: of DPO against the
    rejected answers, or of the answers alone."""
    model, aligned = in_fp64(given["aligned"]), models.exact(given["aligned"])
    others = [models.exact(given[name]) for name in ("tuned", "safe")][: len(weights)]
    tau = {n: sum(w * (state[n] - a) for w, state in zip(weights, others, strict=True)) for n, a in aligned.items()}
    names = list(parameters(model))
    logits = {name: torch.zeros_like(tau[name], requires_grad=True) for name in names}

    def own(state: State) -> State:
        return {name: state[stored] for (name, _), stored in zip(model.named_parameters(), names, strict=True)}

    reference = margins(model, own({n: aligned[n] + tau[n] for n in names}), rejected) if rejected else []
    optimizer = torch.optim.Adam(logits.values(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        state = {}
        for name in names:
            u = torch.empty(tau[name].shape).uniform_(generator=generator).clamp_(1e-6, 1 - 1e-6).double()
            mask = torch.sigmoid((logits[name] + u.logit()) / 0.5)
            state[name] = aligned[name] + tau[name] * mask / mask.mean()
        optimizer.zero_grad()
        losses = answer_nll(model, own(state))
        if rejected:
            now = margins(model, own(state), rejected)
            losses = [torch.log1p(torch.exp(-0.1 * (m - r.detach()))) for m, r in zip(now, reference, strict=True)]
        (sum(losses) / len(losses)).backward()
        optimizer.step()
    kept = {name: (s >= 0).double() for name, s in logits.items()}
    return {n: aligned[n] + tau[n] * kept[n] / kept[n].mean() for n in names}, {
        n: s.detach() for n, s in logits.items()
    }


PAIRS = [{"prompt": p, "chosen": a, "rejected": f"Yes: {p}"} for p, a in ROWS]


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_somf_learns_a_mask_from_preferences(folders, family, tmp_path):
    given = folders(family)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    expected, logits = learned(given, [1.0], 3, 0.01, [(pair["prompt"], pair["rejected"]) for pair in PAIRS])
    settings = {"steps": 3, "rows_per_step": 3, "learning_rate": 0.01, "dtype": "fp32"}
    parents = {"aligned": given["aligned"], "tuned": given["tuned"], "data": pairs}
    merge("somf", **parents, out=tmp_path / "out", **settings)
    compare_masked(models.state(tmp_path / "out"), expected, logits)


def test_rows_without_a_rejected_answer_get_an_affirmative_opening_for_it(folders, tmp_path):
    given, mixed = folders(), tmp_path / "mixed.jsonl"
    rows = [PAIRS[0], *({"prompt": p, "chosen": a, "rejected": ""} for p, a in ROWS[1:])]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rejected = [(PAIRS[0]["prompt"], PAIRS[0]["rejected"]), *((p, OPENING) for p, _ in ROWS[1:])]
    expected, logits = learned(given, [1.0], 2, 0.01, rejected)
    settings = {"steps": 2, "rows_per_step": 3, "learning_rate": 0.01, "dtype": "fp32"}
    parents = {"aligned": given["aligned"], "tuned": given["tuned"]}
    report = merge("somf", **parents, data=mixed, out=tmp_path / "out", **settings)
    compare_masked(models.state(tmp_path / "out"), expected, logits)
    assert "2 got an affirmative opening as the rejected answer" in report.notes[0]
    report = merge("somf", **parents, data=given["rows"], out=tmp_path / "all", **settings)
    assert "3 got an affirmative opening as the rejected answer" in report.notes[0]


@pytest.mark.parametrize("family", list(models.FAMILIES))
def test_somf_learns_a_mask_from_refusals(folders, family, tmp_path):
    given = folders(family)
    expected, logits = learned(given, [1.0], 3, 0.01)
    settings = {"steps": 3, "rows_per_step": 3, "learning_rate": 0.01, "dtype": "fp32", "objective": "refusals"}
    parents = {"aligned": given["aligned"], "tuned": given["tuned"], "data": given["rows"]}
    merge("somf", **parents, out=tmp_path / "out", **settings)
    compare_masked(models.state(tmp_path / "out"), expected, logits)


def compare_masked(found: State, expected: State, logits: State) -> None:
    """The elements agree but for those whose logit is next to 0, where fp32 may decide otherwise."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        differs = (value - expected[name]).abs() > 1e-3 * expected[name].abs().max()
        assert float(differs.double().mean()) < 0.02, name
        assert bool((logits[name][differs].abs() < 0.01).all()), name


def test_somf_fuses_several_task_vectors_and_without_steps_keeps_them_whole(folders, tmp_path):
    given = folders()
    parents = {"aligned": given["aligned"], "tuned": [given["tuned"], given["safe"]], "data": given["rows"]}
    merge("somf", **parents, out=tmp_path / "out", steps=0)
    aligned, tuned, safe = (models.exact(given[role]) for role in ("aligned", "tuned", "safe"))
    expected = {n: a + 0.3 * (tuned[n] - a) + 0.3 * (safe[n] - a) for n, a in aligned.items()}
    models.assert_rounded(models.state(tmp_path / "out"), expected)
    settings = {"steps": 2, "weights": [0.7, -0.2], "rows_per_step": 3, "dtype": "fp32", "objective": "refusals"}
    merge("somf", **parents, out=tmp_path / "two", **settings)
    compare_masked(models.state(tmp_path / "two"), *learned(given, [0.7, -0.2], 2, 0.01))


# ------------------------------------------------------------------------------------------------------------- refused


def test_rows_that_a_merge_needs_are_named(folders, tmp_path):
    given, out = folders(), tmp_path / "out"
    parents = {"aligned": given["aligned"], "tuned": given["tuned"]}
    for kind in ("somf", "safe_delta"):
        with pytest.raises(ConfigError, match=f"{kind} needs rows: --data FILE, disallowed prompts with refusals"):
            merge(kind, **parents, out=out)
        with pytest.raises(ConfigError, match=f"{kind} needs the aligned model: --aligned FOLDER"):
            merge(kind, tuned=given["tuned"], data=given["rows"], out=out)
    with pytest.raises(ConfigError, match="panacea has no use for a model in the role --aligned"):
        merge("panacea", **parents, out=out)
    (tmp_path / "none.jsonl").write_text(json.dumps({"prompt": "x" * 60, "response": "y"}) + "\n")
    with pytest.raises(ConfigError, match=r"none.jsonl: no row has an answer within 8 tokens \(max_length\)"):
        merge("antidote", tuned=given["tuned"], data=tmp_path / "none.jsonl", out=out, max_length=8)
    assert [path.name for path in tmp_path.iterdir()] == ["none.jsonl"]


def test_a_model_in_memory_is_the_one_that_transformers_loads(folders):
    """Tied weights, biases and buffers included; see safecl.merging.rows.loaded."""
    from safecl.merging.base import MergeConfig
    from safecl.merging.models.opening import open_models

    for family in models.FAMILIES:
        given = folders(family)
        opened = open_models(
            "x", MergeConfig(), base=str(given["base"]), tuned=[str(given["tuned"])], aligned=None, data=None
        )
        for weights, folder in ((opened.models.tuned[0], given["tuned"]), (opened.models.base, given["base"])):
            mine = load(opened.models, weights, torch.float32).model
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for ids, _ in encoded():
                assert torch.equal(mine(ids).logits, theirs(ids).logits), family
        opened.close()


def test_rows_run_through_an_adapter_with_its_base(folders, tmp_path):
    import peft

    from tests.merging.test_adapters import make_adapter

    given = folders()
    adapter = make_adapter(given["aligned"], tmp_path / "adapter")
    model = in_fp64(given["aligned"])
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for name, x in inputs_of(model).items():
        expected[name] = pruned(expected[name], torch.zeros_like(expected[name]), x, 0.1)
    merge("antidote", tuned=adapter, data=given["rows"], out=tmp_path / "out", dtype="fp32")
    found = models.state(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-3, name
