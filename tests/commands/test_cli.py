"""The command line: usage, exit codes, messages instead of tracebacks, and launchers."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import safecl
from safecl import exits
from safecl.config import ConfigError
from safecl.distributed import environment
from safecl.exits import ExitCode
from tests.commands.processes import ROOT, in_a_process

VERBS_WITH_A_CONFIG = ("check", "train", "eval")


# ---------------------------------------------------------------------------------------------------------------- usage


def test_a_wrong_config_ends_with_code_2_before_torch_is_imported(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: {path: m}\ntasks: [{name: a, train: t}]\noutput: o\ntrain: {lerning_rate: 1}\n"
    )
    code = """if True:
        import sys
        from safecl.cli import main
        try:
            main(sys.argv[1:])
        finally:
            heavy = {"torch", "transformers", "deepspeed", "numpy", "datasets"} & set(sys.modules)
            assert not heavy, heavy
    """
    for verb in VERBS_WITH_A_CONFIG:
        command = [sys.executable, "-c", code, verb, str(tmp_path / "run.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == ExitCode.USAGE, done.stderr
        assert "train: unknown key `lerning_rate`; did you mean `learning_rate`?" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "run.yaml"], "Did you mean 'train'?"),
        (["train"], "Missing argument"),
        (["train", "run.yaml", "--lr"], "No such option"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["check", "none.yaml", "--outptu", "x"], "No such option"),
        (["init", "--modle", "x"], "No such option"),
        (["demo", "--poison", "2"], "--poison"),
    ],
)
def test_a_mistyped_verb_option_or_file_ends_with_code_2_and_a_hint(run, arguments, expected):
    code, _, err = run(*arguments)
    assert code == ExitCode.USAGE
    assert expected in err


def test_help_lists_every_verb_and_the_exit_codes(run):
    code, out, _ = run("--help")
    assert code == ExitCode.DONE
    for verb in ("demo", "proof", "init", "check", "train", "eval", "report", "env"):
        assert verb in out
    assert all(f"{int(code)} " in out for code in ExitCode)


def test_the_version_is_told_by_command_and_module(run):
    assert run("--version") == (0, f"safecl {safecl.__version__}\n", "")
    assert in_a_process("--version").stdout == f"safecl {safecl.__version__}\n"


# -------------------------------------------------------------------------------------------------------------- endings


def _after_the_first_line(said: str) -> str:
    """What stands behind the line that comes before torch is loaded."""
    return said.partition("loading torch\n")[2]


@pytest.fixture
def failing_verb(monkeypatch, tmp_path):
    """`failing_verb(error)`: makes `safecl train` raise `error` after its run folder is known."""

    def install(error: BaseException) -> Path:
        def train_run(config, fresh=False):
            exits.tracebacks.folder = Path(config.output)
            raise error

        monkeypatch.setattr("safecl.commands.train.train_run", train_run)
        path = tmp_path / "run.yaml"
        path.write_text(
            yaml.safe_dump(
                {"model": {"path": "m"}, "tasks": [{"name": "a", "train": "t"}], "output": str(tmp_path / "out")}
            )
        )
        return path

    return install


def test_an_unexpected_error_is_one_message_and_its_traceback_is_in_the_run_folder(run, failing_verb, tmp_path):
    code, _, err = run("train", failing_verb(RuntimeError("the sky fell\nand more")))
    assert code == ExitCode.FAILED
    assert "`safecl train` ended with RuntimeError: the sky fell" in err
    assert "Traceback" not in err and "and more" not in err
    written = tmp_path / "out" / "error-rank0.txt"
    assert str(written) in err
    assert "Traceback (most recent call last)" in written.read_text() and "and more" in written.read_text()


@pytest.mark.parametrize("behind", [False, True])
def test_the_traceback_option_prints_it_instead(run, failing_verb, tmp_path, behind):
    config = failing_verb(RuntimeError("the sky fell"))
    code, _, err = run("train", config, "--traceback") if behind else run("--traceback", "train", config)
    assert code == ExitCode.FAILED
    assert "Traceback (most recent call last)" in err and "train_run" in err
    assert not (tmp_path / "out").exists()


def test_running_out_of_device_memory_says_what_is_free_what_was_predicted_and_what_helps(
    run, failing_verb, monkeypatch
):
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 10**9, 80 * 10**9))
    monkeypatch.setattr(exits.tracebacks, "needs", lambda: "the run takes 91 GB on each device")
    _, _, err = run("train", failing_verb(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")))
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB" in err
    assert "3.0 GB of the device's 80.0 GB are free" in err and "Predicted: the run takes 91 GB" in err
    assert "train.tokens_per_microbatch" in err


def test_a_full_disk_is_a_message_with_the_files_name(run, failing_verb, tmp_path):
    code, _, err = run("train", failing_verb(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")))
    assert (
        code == ExitCode.FAILED
        and "runs/a/metrics.jsonl: No space left on device; once that is fixed, the same command resumes" in err
    )
    assert not (tmp_path / "out").exists()


def test_a_model_that_could_not_be_saved_is_its_own_message(run, failing_verb, tmp_path):
    from safecl.engine.checkpoint.model_export import ExportFailed

    code, _, err = run(
        "train", failing_verb(ExportFailed("the model could not be saved: full; the same command goes on"))
    )
    said = "safecl: failed: the model could not be saved: full; the same command goes on\n"
    assert (code, _after_the_first_line(err)) == (ExitCode.FAILED, said)
    assert not (tmp_path / "out").exists()


def test_a_config_error_found_late_still_ends_with_code_2_without_a_traceback(run, failing_verb, tmp_path):
    code, _, err = run("train", failing_verb(ConfigError("model.path: x: holds no weights")))
    assert (code, _after_the_first_line(err)) == (ExitCode.USAGE, "safecl: error: model.path: x: holds no weights\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_a_message_and_code_75(run, failing_verb):
    code, _, err = run("train", failing_verb(KeyboardInterrupt()))
    assert code == ExitCode.STOPPED
    assert "Ctrl-C ended `safecl train`" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_that_a_library_turned_into_an_error_is_still_a_stop(run, monkeypatch, failing_verb, name):
    path = failing_verb(RuntimeError())

    def swallows(config, fresh=False):
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("could not import it") from None

    monkeypatch.setattr("safecl.commands.train.train_run", swallows)
    monkeypatch.setattr(exits, "SECONDS_TO_END", 3600)
    code, _, err = run("train", path)
    assert code == ExitCode.STOPPED
    assert f"{name} ended `safecl train`" in err and "import" not in err


def test_a_rank_that_a_launcher_ends_while_rank_0_speaks_says_nothing(tmp_path):
    program = """if True:
        import sys, time
        from safecl import exits
        def wait(seconds, sleep=time.sleep):
            print("waits", flush=True)
            sleep(600)
        time.sleep = wait
        from safecl.cli import main
        main(["train", sys.argv[1]])
    """
    others = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "none.yaml")]
    rank_1 = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | others
    )
    assert rank_1.stdout.readline() == "waits\n"  # rank 0 has spoken meanwhile, and the launcher ends the others
    rank_1.terminate()
    assert rank_1.communicate(timeout=60) == ("", "")
    assert rank_1.returncode == -signal.SIGTERM


def test_a_rank_whose_error_rank_0_does_not_have_is_heard_and_named(run, monkeypatch, failing_verb):
    monkeypatch.setattr(exits, "SECONDS_FOR_RANK_0", 0.0)
    os.environ["RANK"] = "1"
    code, _, err = run("train", failing_verb(ConfigError("this node lacks the file")))
    assert (code, err) == (ExitCode.USAGE, "safecl: error on rank 1: this node lacks the file\n")
    code, _, err = run("train", failing_verb(KeyboardInterrupt()))
    assert (code, err) == (ExitCode.STOPPED, "")


# ------------------------------------------------------------------------------------------------------------- launcher


def test_without_a_launcher_the_variables_of_one_process_are_set():
    environ: dict[str, str] = {}
    environment.join_launcher(environ)
    assert {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    assert 1024 <= int(environ["MASTER_PORT"]) < 65536


def test_a_launchers_variables_are_kept():
    environ = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "7"}
    before = dict(environ)
    environment.join_launcher(environ)
    assert environ == before


@pytest.mark.parametrize(
    "environ", [{"WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}]
)
def test_half_a_launchers_variables_are_refused_with_a_command_that_works(environ):
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        environment.join_launcher(dict(environ))


def test_the_deepspeed_launchers_argument_is_ignored(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a YAML file where the tests run would be suggested
    assert run("--local_rank=1", "--version")[0] == ExitCode.DONE
    assert run("train", "none.yaml", "--local-rank=0")[2] == "safecl: error: none.yaml: no such file\n"
