"""`safecl train` and `safecl eval`: exit codes, stops, and two ranks under a launcher."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from safecl.config import load_config
from safecl.distributed import environment
from safecl.exits import ExitCode
from tests.commands.processes import ROOT, in_a_process


@pytest.mark.parametrize(
    ("verdict", "code"), [("passed", 0), ("failed", ExitCode.GATE), ("undecided", ExitCode.GATE), (None, 0)]
)
def test_training_ends_with_code_3_unless_the_gate_is_passed(run, monkeypatch, task_config, tmp_path, verdict, code):
    from safecl.evaluation import GateResult
    from safecl.training.trainer import RunResult, Trainer

    result = RunResult(tmp_path, {}, GateResult(verdict, []) if verdict else None)
    monkeypatch.setattr(Trainer, "fit", lambda self: result)
    assert run("train", task_config())[0] == code


def test_eval_measures_a_model_folder_and_obeys_the_gate(run, materials, tmp_path):
    prompts = f"safety.prompts={materials.folder / 'data' / 'safety-prompts.jsonl'}"
    few = ("safety.max_prompts=12", "safety.max_new_tokens=4")
    code, out, _ = run("eval", materials.random_model, prompts, *few, "-o", tmp_path / "e")
    assert code == ExitCode.DONE and "ASR" in out
    assert json.loads((tmp_path / "e" / "results.json").read_text())["evaluations"][0]["safety"]["asr"]["n"] == 12
    code, out, _ = run("eval", materials.random_model, prompts, *few, "safety.gate.max_asr=0.5", "-o", tmp_path / "e")
    assert code == ExitCode.GATE and "safety gate failed" in out


def test_ctrl_c_during_training_saves_the_run_and_says_how_it_goes_on(task_config, tmp_path):
    config = task_config(train={"max_steps": 5000}, safety={"every": "never"})
    command = [sys.executable, "-m", "safecl", "train", str(config), "log.every=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    metrics, deadline = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED
    assert (
        "Ctrl-C: finishing this step" in err and "Traceback" not in err and "the same command resumes from here" in out
    )
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert (tmp_path / "out" / "checkpoints" / "latest").read_text() == f"step-{len(steps):08d}\n"


def test_torchrun_starts_two_ranks_that_leave_one_run_folder_and_only_rank_0_speaks(task_config, tmp_path):
    arguments = [
        "--nproc-per-node",
        "2",
        "--master-port",
        str(environment.free_port()),
        "-m",
        "safecl",
        "train",
        task_config(),
        "log.every=1",
    ]
    done = in_a_process(*arguments, module="torch.distributed.run")
    assert done.returncode == ExitCode.DONE, done.stderr[-2000:]
    assert done.stdout.count("sentiment 3/3") == 1
    out = tmp_path / "out"
    for name in ("config.yaml", "deepspeed.json", "metrics.jsonl", "results.json", "report.html", "model/config.json"):
        assert (out / name).is_file(), name
    assert load_config(out / "config.yaml").train.max_steps == 3
    results = json.loads((out / "results.json").read_text())
    assert results["world_size"] == 2 and results["cost"]["seconds_per_step"] > 0
    num_weights = sum(tensor.numel() for tensor in load_file(out / "model" / "model.safetensors").values())
    assert (
        4 * num_weights <= results["cost"]["state_bytes"]["exp_avg"] <= 4 * num_weights + 64
    )  # padded to a multiple of the ranks
    assert "sentiment label_accuracy" in (out / "report.html").read_text()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
