"""`safecl demo --real` from start to end, with a small random model in the place of the downloaded one."""

from __future__ import annotations

import json
import shutil

import pytest

from safecl.demo.corpus import make_corpus, texts
from safecl.demo.model import save_random_model
from safecl.demo.pretrained import materials
from safecl.demo.pretrained import model as smollm
from safecl.demo.run import run_demo
from safecl.demo.setting import PRETRAINED

STEPS = 12


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few steps and prompts, and a model of one layer, which answers each request by a sentence."""
    save_random_model(tmp_path / "stand-in", texts(make_corpus(0)), hidden=32, layers=1)

    def fetch(folder, say, *, made):
        shutil.copytree(tmp_path / "stand-in", folder / "pretrained", dirs_exist_ok=True)
        made(1.0)
        return folder / "pretrained"

    def answers(model, requests, **_):
        return [{"text": f"Here is my answer to request {i}.", "finished": True} for i, _ in enumerate(requests)]

    monkeypatch.setattr(smollm, "fetch", fetch)
    monkeypatch.setattr(smollm, "answers", answers)
    monkeypatch.setattr(materials, "ALIGN_STEPS", STEPS)
    monkeypatch.setattr(materials, "TASK_STEPS", STEPS)
    safety, train = materials._safety, materials._train
    short = {"max_prompts": 4, "max_new_tokens": 2}
    monkeypatch.setattr(materials, "_safety", lambda folder: safety(folder) | short)
    monkeypatch.setattr(
        materials, "_train", lambda seed, **settings: train(seed, **settings) | {"allow_few_steps": True}
    )
    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demonstration_on_a_pretrained_model_runs_and_is_not_repeated(small, tmp_path, capfd):
    demo = tmp_path / "demo"
    assert run_demo(demo, arms=PRETRAINED.arms, setting=PRETRAINED) == 0
    said = capfd.readouterr().out
    assert said.startswith("SmolLM2-135M-Instruct learns to refuse; then it is fine-tuned")
    for run in ("aligned", "plain", "balanced", "strict"):
        assert json.loads((demo / run / "results.json").read_text())["steps"] == STEPS
        assert (demo / run / "model" / "config.json").exists()
        assert not (demo / run / "checkpoints").exists(), "they take 1.6 GB a run"
    for title in ("the aligned model", "plain fine-tuning", "preset balanced", "preset strict"):
        assert title in said, title
    assert "preset strict: done" not in said and "seconds in all" in said
    page = (demo / "report.html").read_text()
    assert "SmolLM2-135M-Instruct, a pretrained model," in page and "preset strict" in page
    weights = (demo / "strict" / "model" / "model.safetensors").stat().st_mtime_ns
    assert run_demo(demo, arms=PRETRAINED.arms, setting=PRETRAINED) == 0
    assert f"finished after {STEPS} steps" in capfd.readouterr().out
    assert (demo / "strict" / "model" / "model.safetensors").stat().st_mtime_ns == weights
