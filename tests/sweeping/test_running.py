"""Running a sweep: several runs at a time, resumable, failures apart; its table and the winner's config."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from safecl.commands import spinner
from safecl.commands.judging.sweep import SweepOptions, sweep_runs
from safecl.config import ConfigError, dump_config, load_config
from safecl.exits import ExitCode
from safecl.sweeping import running
from safecl.sweeping.axes import plan_runs, read_axes
from safecl.sweeping.running import Sweep, devices_of
from tests.sweeping.folders import write_run

AXES = ["methods=plain,l2_sp", "train.seed=0,1"]


@pytest.fixture
def config(tmp_path) -> Path:
    tree = {
        "model": {"path": "m"},
        "tasks": [{"name": "t", "train": "rows.jsonl"}],
        "safety": {"prompts": "prompts.jsonl"},
        "output": str(tmp_path / "sweep"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


class FakeRuns:
    """Stands for `safecl train`: each process ends at its second look, with results or with a code."""

    def __init__(self, codes: dict[str, int] | None = None):
        self.codes, self.started, self.most, self.alive, self.ended = codes or {}, [], 0, 0, []

    def __call__(self, command, variables, log):
        arguments = command[command.index("train") + 1 :]
        folder = Path(arguments[-1].removeprefix("output="))
        self.started.append(folder.name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        return FakeProcess(self, folder, arguments, self.codes.get(folder.name, 0))


class FakeProcess:
    def __init__(self, runs, folder, arguments, code):
        self.runs, self.folder, self.arguments, self.code, self.looks = runs, folder, arguments, code, 0

    def poll(self):
        self.looks += 1
        if self.looks < 2:
            return None
        self.runs.alive -= 1
        if self.code in (0, 3):
            write_run(self.folder, 30 if "plain" in self.folder.name else 1, 30)
            (self.folder / "config.yaml").write_text(dump_config(load_config(self.arguments[0], self.arguments[1:])))
        return self.code

    def terminate(self):
        self.runs.ended.append(self.folder.name)

    def wait(self, timeout=None):
        return 75


@pytest.fixture
def fake(monkeypatch):
    def install(codes=None) -> FakeRuns:
        runs = FakeRuns(codes)
        monkeypatch.setattr(running, "SECONDS_BETWEEN_LOOKS", 0.0)
        monkeypatch.setattr(running, "start_process", runs)
        return runs

    return install


def test_all_runs_are_started_and_no_more_than_allowed_at_a_time(config, fake, capsys):
    runs = fake()
    assert sweep_runs(config, AXES, SweepOptions(parallel=2)) == ExitCode.DONE
    assert runs.started == ["plain-seed-0", "plain-seed-1", "l2_sp-seed-0", "l2_sp-seed-1"] and runs.most == 2
    told = capsys.readouterr().out
    assert "[4/4]" in told and "plain (baseline)" in told and "0.025 ± 0.000*" in told


def test_a_log_hears_which_runs_are_at_work_and_how_many_have_ended(config, fake, monkeypatch, capsys):
    monkeypatch.setattr(spinner, "SECONDS", 0.02)
    fake()
    monkeypatch.setattr(running, "SECONDS_BETWEEN_LOOKS", 0.2)
    sweep_runs(config, AXES, SweepOptions(parallel=2))
    lines = capsys.readouterr().err.splitlines()
    both = r"still running plain-seed-0 for \S+ s, plain-seed-1 for \S+ s; 0 of 4 runs have ended, for \S+ s now"
    assert any(re.fullmatch(rf"[\d:]+ {both}", line) for line in lines)
    assert any("l2_sp-seed-0" in line and re.search(r"of 4 runs have ended, about \S+ s left", line) for line in lines)


def test_the_same_command_runs_what_is_missing_and_changed_runs_again(config, fake):
    fake()
    sweep_runs(config, AXES, SweepOptions())
    shutil.rmtree(config.parent / "sweep" / "l2_sp-seed-1")
    runs = fake()
    sweep_runs(config, AXES, SweepOptions())
    assert runs.started == ["l2_sp-seed-1"]
    runs = fake()
    sweep_runs(config, [AXES[0], "train.seed=0,1,2"], SweepOptions())
    assert runs.started == ["plain-seed-2", "l2_sp-seed-2"]
    config.write_text(config.read_text() + "train: {epochs: 5}\n")
    runs = fake()
    sweep_runs(config, AXES, SweepOptions())
    assert len(runs.started) == 4, "`safecl train` says what has changed, and does not overwrite"


def test_a_failed_run_stops_no_other_and_the_code_of_a_failed_gate_is_a_result(config, fake, capsys):
    runs = fake({"plain-seed-1": 1, "l2_sp-seed-0": 3})
    assert sweep_runs(config, AXES, SweepOptions()) == ExitCode.FAILED
    assert len(runs.started) == 4
    told = capsys.readouterr().out
    assert "plain-seed-1: failed in" in told and "logs/plain-seed-1.log" in told and "its gate is not passed" in told
    table = json.loads((config.parent / "sweep" / "table.json").read_text())
    assert table["unfinished"] == ["plain-seed-1"] and len(table["cells"][0]["runs"]) == 1


def test_a_baseline_that_failed_loses_no_other_cell(config, fake, capsys):
    fake({"plain-seed-0": 1, "plain-seed-1": 2})
    assert sweep_runs(config, ["methods=plain,l2_sp,ema", *AXES[1:]], SweepOptions()) == ExitCode.FAILED
    folder = config.parent / "sweep"
    table = json.loads((folder / "table.json").read_text())
    assert [cell["cell"] for cell in table["cells"]] == ["l2_sp", "ema"]
    assert table["baseline"] == "l2_sp" and table["missing_baseline"] == "plain"
    said = "The baseline, plain, has none, and l2_sp takes its place."
    assert said in capsys.readouterr().out and said in (folder / "report.html").read_text()
    fake(dict.fromkeys(("plain-seed-0", "plain-seed-1"), 1))
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="no run of the sweep has finished"):
        sweep_runs(config, ["methods=plain", AXES[1]], SweepOptions())


def test_results_of_another_config_do_not_enter_the_table(config, fake):
    """`safecl train` refuses such a folder, and the results in it are of other settings."""
    fake()
    sweep_runs(config, AXES, SweepOptions())
    config.write_text(config.read_text() + "train: {epochs: 5}\n")
    fake({"l2_sp-seed-0": 2, "l2_sp-seed-1": 2})
    assert sweep_runs(config, AXES, SweepOptions()) == ExitCode.FAILED
    for options in (None, SweepOptions(table_only=True)):
        if options is not None:
            assert sweep_runs(config, AXES, options) == ExitCode.DONE
        table = json.loads((config.parent / "sweep" / "table.json").read_text())
        assert [cell["cell"] for cell in table["cells"]] == ["plain"]
        assert table["unfinished"] == ["l2_sp-seed-0", "l2_sp-seed-1"]


def test_results_of_an_earlier_safecl_whose_config_lacks_a_key_are_left_alone(config, fake):
    fake()
    sweep_runs(config, AXES, SweepOptions())
    path = config.parent / "sweep" / "l2_sp-seed-1" / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["safety"]["variants"], tree["privacy"]
    path.write_text(yaml.safe_dump(tree))
    runs = fake()
    sweep_runs(config, AXES, SweepOptions())
    assert runs.started == []


def test_an_objective_on_what_was_not_measured_loses_no_table(config, fake):
    fake()
    with pytest.raises(ConfigError, match="no cell has the measure 'acuracy'; did you mean `accuracy`"):
        sweep_runs(config, AXES, SweepOptions(pick="max acuracy"))
    assert (config.parent / "sweep" / "table.md").is_file()


def test_the_winner_gets_a_config(config, fake):
    fake()
    pick = SweepOptions(pick="max accuracy where asr.high <= 0.3")
    assert sweep_runs(config, AXES, pick) == ExitCode.DONE
    best = load_config(config.parent / "sweep" / "best.yaml")
    assert list(best.methods) == ["l2_sp"] and best.output.endswith("sweep/best") and best.train.seed == 0
    fake()
    assert sweep_runs(config, AXES, SweepOptions(pick="max accuracy where asr <= 0")) == ExitCode.GATE


def test_a_wrong_value_is_reported_before_anything_runs(config, fake):
    runs = fake()
    for axes, options, message in (
        (["train.epochs=1,-1"], SweepOptions(), "epochs"),
        (["methods=plain,nothing"], SweepOptions(), "nothing"),
        (AXES, SweepOptions(baseline="ewc"), "there are plain, l2_sp"),
        (AXES, SweepOptions(pick="most accuracy"), "write e.g."),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep_runs(config, axes, options)
    assert not runs.started


def test_a_signal_reaches_the_runs_that_are_at_work(config):
    runs = FakeRuns()

    def interrupted(*arguments):
        if len(runs.started) == 2:
            raise KeyboardInterrupt
        return runs(*arguments)

    sweep = Sweep(config, plan_runs(read_axes(AXES), config.parent), parallel=3, say=lambda _: None, start=interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    assert runs.ended == ["plain-seed-0", "plain-seed-1"]


def test_a_run_is_no_rank_of_the_process_that_started_the_sweep(tmp_path, monkeypatch):
    """A script that has trained before, in this process, has the variables of a single rank and an open port."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OTHER", "kept")
    code = "import os; print(sorted({'RANK', 'MASTER_PORT', 'TORCHELASTIC_RUN_ID', 'OTHER', 'NEW'} & {*os.environ}))"
    process = running.start_process([sys.executable, "-c", code], {"NEW": "1"}, tmp_path / "logs" / "run.log")
    assert process.wait(60) == 0 and (tmp_path / "logs" / "run.log").read_text() == "['NEW', 'OTHER']\n"


def test_each_slot_has_devices_of_its_own_and_ranks_have_a_launcher(config):
    assert devices_of(1, 2, {}, 8) == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert devices_of(1, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 8) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert devices_of(3, 1, {}, 0) == {} and devices_of(0, 1, {"CUDA_VISIBLE_DEVICES": ""}, 8) == {}
    (run,) = plan_runs(read_axes(["methods=plain"]), Path("out"))
    command = Sweep(config, [run], ranks=2).command(run)
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"] and "--nproc-per-node=2" in command
    assert command[-3:] == [str(config), "methods={}", "output=out/plain"]


@pytest.mark.long
def test_a_real_sweep_trains_side_by_side_and_builds_shared_artifacts_once(tmp_path, monkeypatch):
    from safecl.demo.materials import write_materials
    from tests.training.test_trainer import tree

    monkeypatch.setenv("SAFECL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    write_materials(tmp_path / "demo")
    given = tree(tmp_path / "demo", tmp_path / "sweep", train={"max_steps": 2}, methods={}, deepspeed={"stage": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    code = sweep_runs(tmp_path / "run.yaml", ["methods=der,derpp", "train.seed=0,1"], SweepOptions(parallel=2))
    assert code == ExitCode.DONE
    table = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert [len(cell["runs"]) for cell in table["cells"]] == [2, 2] and not table["unfinished"]
    built = [path for path in (tmp_path / "cache" / "artifacts" / "teacher-cache").iterdir() if path.is_dir()]
    assert len(built) == 1
