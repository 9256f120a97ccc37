"""The one door for code, and what never leaves the environment."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml

from tests.commands.conftest import materials, own_environment, run  # noqa: F401
from tests.commands.processes import in_a_process

SECRETS = {
    "HF_TOKEN": "hf_canary1XXXXXXXXXXXXXXXX",
    "WANDB_API_KEY": "canary2XXXXXXXXXXXXXXXX",
    "AWS_SECRET_ACCESS_KEY": "canary3XXXXXXXXXXXXXXXX",
    "SOME_PASSWORD": "canary4XXXXXXXXXXXXXXXX",
}


def config_of(materials, folder, **model) -> str:  # noqa: F811
    tree = yaml.safe_load(materials.arm_configs["plain"].read_text())
    shutil.copytree(materials.random_model, folder / "model")
    tree["model"] = tree["model"] | {"path": str(folder / "model")} | model
    tree["train"] |= {"max_steps": 2, "allow_few_steps": True}
    tree["safety"] |= {"max_prompts": 3, "max_new_tokens": 2}
    tree["tasks"][0].pop("eval", None)
    tree["output"] = str(folder / "out")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "run.yaml")


def test_code_of_a_model_runs_only_through_its_door_and_is_named(run, materials, tmp_path, caplog):  # noqa: F811
    config = config_of(materials, tmp_path)
    (tmp_path / "model" / "modeling_x.py").write_text("")
    assert run("check", config)[0] == 0 and "runs" not in caplog.text
    assert run("check", config, "model.trust_remote_code=true")[0] == 0
    assert "model.trust_remote_code is set, so code of" in caplog.text and "modeling_x.py" in caplog.text


@pytest.mark.parametrize("name", ["~nouser/x", "a" * 5000, "b" * 300, "\x1b[2Jx"])
@pytest.mark.parametrize(
    "words",
    [["eval"], ["check"], ["train"], ["report"], ["memory", "show"], ["memory", "verify"], ["init", "-o"]],
    ids=" ".join,
)
def test_a_name_that_no_file_can_have_is_refused_by_every_verb(run, words, name):  # noqa: F811
    code, out, err = run(*words, name)
    assert code == 2 and "Traceback" not in err and "\x1b" not in out + err, err


@pytest.mark.long
def test_no_secret_of_the_environment_reaches_a_file_of_the_run(materials, tmp_path):  # noqa: F811
    config = config_of(materials, tmp_path)
    done = in_a_process("train", config, env=os.environ | SECRETS)
    assert done.returncode in (0, 3), done.stderr[-2000:]
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "checkpoints").rename(tmp_path / "out" / "elsewhere")
    failed = in_a_process("train", config, "tasks.0.train=/dev/null", env=os.environ | SECRETS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and failed.returncode != 0
    texts = [path.read_bytes() for path in files] + [(done.stdout + done.stderr + failed.stderr).encode()]
    assert not [secret for secret in SECRETS.values() if any(secret.encode() in text for text in texts)]
