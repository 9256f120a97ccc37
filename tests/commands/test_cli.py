"""The command line: exit codes, messages instead of tracebacks, launchers, and what each verb prints and writes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import safecl
from safecl import cli, exits
from safecl.config import ConfigError, RunConfig, load_config
from safecl.config.docs import EXAMPLES, USUAL, section_of
from safecl.demo.materials import write_materials
from safecl.distributed import environment
from safecl.exits import ExitCode

ROOT = Path(__file__).parents[2]
VERBS_WITH_A_CONFIG = ("check", "train", "eval")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What a verb sets in os.environ goes away again; the tests run as one process without a launcher."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in environment.VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture
def run(capsys):
    """`run("check", path)`: (exit code, standard output, standard error) of the verb in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return call


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return write_materials(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture
def task_config(materials, tmp_path):
    """A config of three steps on the demonstration's data and its random model, measured on few prompts."""

    def write(**sections: dict) -> Path:
        tree = yaml.safe_load(materials.arm_configs["plain"].read_text())
        tree["model"]["path"] = str(materials.random_model)
        tree["train"] |= {"max_steps": 3, "allow_few_steps": True}
        tree["safety"] |= {"max_prompts": 12, "max_new_tokens": 4}
        tree["tasks"][0]["eval"]["max_rows"] = 12
        tree["output"] = str(tmp_path / "out")
        for name, section in sections.items():
            tree[name] = (tree.get(name) or {}) | section if isinstance(section, dict) else section
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def in_a_process(*arguments: object, module: str = "safecl", **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        **options,
    )


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


@pytest.fixture
def failing_verb(monkeypatch, tmp_path):
    """`failing_verb(error)`: makes `safecl train` raise `error` after its run folder is known."""

    def install(error: BaseException) -> Path:
        def train_run(config, fresh=False):
            exits.Ending.run_folder = Path(config.output)
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


def test_running_out_of_memory_says_what_helps(run, failing_verb):
    import torch

    _, _, err = run("train", failing_verb(torch.OutOfMemoryError("CUDA out of memory")))
    assert "train.tokens_per_microbatch" in err


def test_a_full_disk_is_a_message_with_the_files_name(run, failing_verb, tmp_path):
    code, _, err = run("train", failing_verb(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")))
    assert (
        code == ExitCode.FAILED
        and "runs/a/metrics.jsonl: No space left on device; where that is mended, the same command goes on" in err
    )
    assert not (tmp_path / "out").exists()


def test_a_model_that_could_not_be_saved_is_its_own_message(run, failing_verb, tmp_path):
    from safecl.engine.checkpoint.model_export import ExportFailed

    code, _, err = run(
        "train", failing_verb(ExportFailed("the model could not be saved: full; the same command goes on"))
    )
    assert (code, err) == (
        ExitCode.FAILED,
        "safecl: failed: the model could not be saved: full; the same command goes on\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_config_error_found_late_still_ends_with_code_2_without_a_traceback(run, failing_verb, tmp_path):
    code, _, err = run("train", failing_verb(ConfigError("model.path: x: holds no weights")))
    assert (code, err) == (ExitCode.USAGE, "safecl: error: model.path: x: holds no weights\n")
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


# ----------------------------------------------------------------------------------------------------------------- init


def test_init_writes_a_config_that_loads_and_holds_the_answers(run, tmp_path):
    path = tmp_path / "new" / "run.yaml"
    code, out, _ = run(
        "init", "-o", path, "--model", "models/m: 7b", "--train", "up/my rows.jsonl", "--safety", "p.jsonl"
    )
    assert code == ExitCode.DONE and str(path) in out
    config = load_config(path)
    assert (config.model.path, config.tasks[0].train, config.safety.prompts) == (
        "models/m: 7b",
        "up/my rows.jsonl",
        "p.jsonl",
    )
    assert (config.tasks[0].name, config.output) == ("my-rows", "runs/my-rows")
    assert config.methods == RunConfig.model_validate(config.model_dump() | {"methods": "no-data"}).methods


def test_init_with_refusals_to_keep_takes_the_preset_for_them_and_screens_the_upload(run, tmp_path):
    assert run("init", "-o", tmp_path / "run.yaml", "--memory", "refusals.jsonl")[0] == ExitCode.DONE
    config = load_config(tmp_path / "run.yaml")
    assert config.memory.source == "refusals.jsonl" and config.scan.action == "report"
    assert config.methods == RunConfig.model_validate(config.model_dump() | {"methods": "balanced"}).methods


def test_init_never_overwrites(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    code, _, err = run("init", "-o", path)
    assert code == ExitCode.USAGE and "not overwritten" in err
    assert path.read_text() == "mine"


def test_init_asks_four_questions_on_a_terminal(run, tmp_path, monkeypatch):
    answers = iter(["models/m", "rows.jsonl", "kept.jsonl", "none"])
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda question, default: asked.append(question) or next(answers))
    assert run("init", "-o", tmp_path / "run.yaml")[0] == ExitCode.DONE
    config = load_config(tmp_path / "run.yaml")
    assert len(asked) == 4 and (config.model.path, config.tasks[0].train, config.safety) == (
        "models/m",
        "rows.jsonl",
        None,
    )
    assert config.memory.source == "kept.jsonl"


def test_a_section_of_the_starter_works_when_its_comment_signs_are_taken_away(run, tmp_path):
    path = tmp_path / "run.yaml"
    run("init", "-o", path)
    lines = path.read_text().splitlines()
    for section in ("memory", "safety"):
        start = lines.index(f"# {section}:")
        while start < len(lines) and lines[start]:
            lines[start] = lines[start].removeprefix("# ")
            start += 1
    path.write_text("\n".join(lines))
    config = load_config(path)
    assert config.memory.source == EXAMPLES["memory.source"] and config.safety.prompts == EXAMPLES["safety.prompts"]


def test_init_all_names_every_key_there_is(run, tmp_path):
    from safecl.config.docs import sections

    run("init", "-o", tmp_path / "run.yaml", "--all")
    text = (tmp_path / "run.yaml").read_text()
    for model in (RunConfig, *(section for _, section in sections())):
        assert all(f"{name}:" in text for name in model.model_fields), model
    load_config(tmp_path / "run.yaml")


def test_the_starters_keys_exist():
    for path, names in USUAL.items():
        model = RunConfig
        for part in filter(None, path.split(".")):
            model = section_of(model.model_fields[part].annotation)
        assert set(names) <= set(model.model_fields), path


# ---------------------------------------------------------------------------------------------------------------- check


def test_check_tells_rows_steps_supervision_methods_stage_and_one_example(run, task_config, tmp_path):
    ema = {"ema": {"horizon": 0.3}}
    code, out, _ = run(
        "check", task_config(methods=ema, train={"max_steps": 80, "allow_few_steps": False}, deepspeed={"stage": 3})
    )
    assert code == ExitCode.DONE
    for expected in (
        "1,049,728 (llama)",
        "1,200 rows",
        "11% supervised",
        "80 of about 320 tokens",
        "epochs",
        "stage 3",
        "leaves",
        "{+",
    ):
        assert expected in out, expected
    assert not (tmp_path / "out").exists()


def test_check_names_file_and_line_of_a_bad_row(run, task_config, tmp_path):
    bad = tmp_path / "bad.jsonl"
    rows = [json.dumps({"prompt": f"a{i}", "completion": "b"}) for i in range(4)]
    bad.write_text("\n".join([*rows[:2], '{"prompt": "half', *rows[2:]]))
    code, _, err = run("check", task_config(tasks=[{"name": "t", "train": str(bad)}]))
    assert code == ExitCode.USAGE
    assert f"{bad}" in err and "3" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([{"name": "t", "train": "none.jsonl"}], "none.jsonl"),
        ([{"name": "t", "train": "empty.jsonl"}], "empty.jsonl"),
        ([{"name": "t", "train": "."}], "."),
    ],
)
def test_check_refuses_missing_and_empty_files(run, task_config, tmp_path, monkeypatch, tasks, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = run("check", task_config(tasks=tasks))
    assert code == ExitCode.USAGE
    assert expected in err and "Traceback" not in err


def test_check_refuses_few_steps_unless_they_are_allowed(run, task_config):
    code, _, err = run("check", task_config(train={"allow_few_steps": False}))
    assert code == ExitCode.USAGE and "only 3 optimizer steps" in err
    code, out, _ = run("check", task_config())
    assert code == ExitCode.DONE and "only 3 optimizer steps" in out


def test_check_refuses_evaluation_prompts_that_stand_in_the_training_data(run, task_config, materials):
    data = materials.folder / "data"
    code, _, err = run(
        "check",
        task_config(
            tasks=[{"name": "t", "train": str(data / "align.jsonl")}], safety={"prompts": str(data / "align.jsonl")}
        ),
    )
    assert code == ExitCode.USAGE and "align.jsonl" in err


def test_check_refuses_a_model_that_is_none_and_a_tokenizer_that_is_too_large(run, task_config, materials, tmp_path):
    from safecl.demo.model import train_tokenizer

    empty = tmp_path / "nothing"
    empty.mkdir()
    code, _, err = run("check", task_config(model={"path": str(empty)}))
    assert code == ExitCode.USAGE and str(empty) in err
    train_tokenizer([f"word{i} other{i}" for i in range(3000)], 2000).save_pretrained(tmp_path / "large")
    code, _, err = run("check", task_config(model={"tokenizer": str(tmp_path / "large")}))
    assert code == ExitCode.USAGE and "the model knows only 1,024" in err


def test_every_missing_file_is_told_at_once_before_torch_is_imported(task_config):
    missing = {
        "tasks": [{"name": "t", "train": "no/rows.jsonl"}],
        "model": {"path": "./none"},
        "memory": {"source": "gone.csv"},
    }
    for verb in ("check", "train"):
        code = f"import sys; sys.argv[1:] = ['{verb}', '{task_config(**missing)}']; import atexit, safecl.cli\n"
        code += "atexit.register(lambda: print('torch' in sys.modules)); safecl.cli.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (ExitCode.USAGE, "False\n")
        for expected in (
            "model.path: there is no folder ./none",
            "tasks.0.train: no/rows.jsonl: no such file",
            "memory.source: gone.csv: no such",
        ):
            assert expected in done.stderr


def test_an_output_that_cannot_be_a_folder_is_refused_before_anything_is_read(run, task_config, tmp_path):
    (tmp_path / "file").write_text("")
    for verb in ("check", "train"):
        code, _, err = run(verb, task_config(output=str(tmp_path / "file" / "run"), model={"path": "none"}))
        assert code == ExitCode.USAGE and "is a file" in err


# ------------------------------------------------------------------------------------------------------------------ env


def test_env_prints_the_same_sections_as_text_and_as_json(run):
    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == ExitCode.DONE and set(found) == {"versions", "device", "kernels", "launcher"}
    assert found["versions"]["safecl"].startswith(safecl.__version__) and found["versions"]["torch"] != "not installed"
    assert found["kernels"]["adamw_step_"].startswith(("triton", "cpp (", "torch (")) and found["device"]["cpu"]
    text = run("env")[1]
    assert all(name in text for section in found.values() for name in section)


def test_env_names_what_it_cannot_find_out(monkeypatch):
    from safecl.commands import env

    def broken():
        raise RuntimeError("driver mismatch\nmore")

    monkeypatch.setattr(env, "_device", broken)
    assert env.collect_environment()["device"] == {"not available": "RuntimeError: driver mismatch"}


# ------------------------------------------------------------------------------------------------------- train and eval


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
        "Ctrl-C: finishing this step" in err and "Traceback" not in err and "the same command goes on from here" in out
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


def test_without_a_network_a_hub_id_is_told_at_once(run, tmp_path, monkeypatch):
    from safecl.commands.preflight import settle_hub

    def no_network(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    settle_hub([str(tmp_path)])
    assert "HF_HUB_OFFLINE" not in os.environ
    settle_hub([str(tmp_path), "owner/model"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("verb", ["demo", "proof"])
def test_a_folder_that_cannot_be_made_is_told_before_any_work(run, verb):
    code, _, err = run(verb, "/proc/nothing")
    assert code == ExitCode.USAGE and "/proc/nothing cannot be made" in err


def test_a_folder_that_is_no_model_is_told_by_its_key(run, tmp_path, task_config):
    (tmp_path / "elsewhere").mkdir()
    code, _, err = run("check", task_config(), f"model.path={tmp_path / 'elsewhere'}")
    assert code == ExitCode.USAGE and "is not a model folder" in err and "model.path" in err
