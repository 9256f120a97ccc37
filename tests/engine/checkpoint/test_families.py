"""Exports of many families hold the names that `save_pretrained` writes and are the same models in transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.checkpoint import families

OLDER = ["transformers==4.57.*", "huggingface_hub<1", "tokenizers<0.23"]


def test_exports_of_all_families_are_transformers_own_models(rank_pool, tmp_path):
    assert len(families.FAMILIES) >= 17
    found = rank_pool(1).run(families.exported_families, root=str(tmp_path), families=list(families.FAMILIES))[0]
    assert found == {}


@pytest.fixture(scope="module")
def older_transformers(tmp_path_factory) -> Path:
    """A folder of packages with transformers 4.57, which come before those that are installed."""
    folder = tmp_path_factory.mktemp("transformers-4")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLDER]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install transformers 4.57: {done.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.mark.long
def test_exports_of_all_families_are_the_same_models_in_transformers_4(rank_pool, tmp_path, older_transformers):
    chosen = [family for family in families.FAMILIES if family not in families.NOT_IN_TRANSFORMERS_4]
    rank_pool(1).run(families.exported_families, root=str(tmp_path), families=chosen)
    file, root = tmp_path / "older.pt", Path(__file__).parents[3]
    code = f"from tests.engine.checkpoint.families import save_outputs; save_outputs({str(tmp_path)!r}, {str(file)!r})"
    environment = os.environ | {"PYTHONPATH": f"{older_transformers}{os.pathsep}{root}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    older = torch.load(file)
    assert older.pop("version").startswith("4.57")
    assert set(older) == set(chosen)
    wrong = {}
    for family, logits in older.items():
        expected = families.outputs(tmp_path / family / "model")[0]
        error = float((logits - expected).norm() / expected.norm())
        if error > 1e-5:
            wrong[family] = error
    assert wrong == {}
