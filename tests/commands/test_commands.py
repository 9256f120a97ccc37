"""Every command of README and docs/ is executed, in a folder where the files that it names exist.

A page's shell lines and its inline `safecl ...` are run as they stand, by the same entry point, on a model of a few
thousand parameters for two steps. Files are provided by their endings: rows for .jsonl, a config for .yaml, a finished
run for runs/NAME, a model for path/to/model. The demonstration and the proof are run in full by tests of their own;
here it is seen that their commands start them.

Not executed are benchmarks and the GPU suite, which take minutes to hours (it is checked that they are there and know
the options that the page gives them), `make`, which installs (a dry run), and the shell's own words.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from safecl import cli
from safecl.distributed import environment
from safecl.exits import ExitCode
from tests.test_docs import ROOT, arguments_of_safecl, commands

IN_FULL_ELSEWHERE = {"demo": "tests/demo/test_demo_materials.py", "proof": "tests/proof/test_proof.py"}
OF_THE_SHELL = (
    ".",
    "cd",
    "pip",
    "sbatch",
    "kubectl",
)  # pip is what `make test` begins with; the last two need a cluster
UNALIGNED = {"scan": "it is not aligned", "build": "is this the aligned model?"}
"""What these say of a random model; tests/scan and tests/engine/artifacts/test_memory_rows.py have one that refuses."""
JUDGE = {"model": "model", "name": "tiny", "template": "{prompt} {answer}", "pattern": "x", "dtype": "fp32"}
DONE = (ExitCode.DONE, ExitCode.GATE)


def lines() -> list[tuple[str, ...]]:
    """Every command once; mentions without their arguments (`safecl check`, `safecl fisher CFG`) are no commands."""
    return list(dict.fromkeys(tuple(words) for _, words in commands() if not _is_mention(words)))


def _is_mention(words: list[str]) -> bool:
    given = arguments_of_safecl(words)
    if given is None:
        return False
    alone = not [word for word in given[1:] if not word.startswith("-")] and given[:1] not in (
        ["init"],
        ["env"],
        ["demo"],
        ["proof"],
    )
    return (
        not given
        or given[0].startswith("-")
        or (given[0] == "memory" and len(given) == 2)
        or alone
        or any(word.strip("[].").isupper() or "..." in word for word in given)
    )


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A folder with a model of few parameters, its data, a config of two steps, and a finished run of it."""
    folder = tmp_path_factory.mktemp("pages")
    _write_files(folder)
    variables = {name: value for name, value in os.environ.items() if name not in environment.VARIABLES} | {
        "PYTHONPATH": str(ROOT)
    }
    subprocess.run(
        [sys.executable, "-m", "safecl", "train", "run.yaml"], cwd=folder, env=variables, check=True, timeout=300
    )
    shutil.copytree(folder / "runs" / "support", folder / "finished")
    _save_adapter(folder / "model", folder / "adapter")
    return folder


def _save_adapter(model: Path, folder: Path) -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        folder
    )


def _write_files(folder: Path) -> None:
    from safecl.demo.corpus import make_corpus, texts
    from safecl.demo.model import save_random_model

    enough = 36  # a limit of 0.1 on the attack success rate needs 35 prompts
    corpus = make_corpus(0, num_align=200, num_memory=24, num_task=60, num_prompts=enough)
    save_random_model(folder / "model", texts(corpus), vocab_size=400, hidden=16, layers=1, heads=2)
    rows = {
        "upload": corpus.task,
        "heldout": corpus.task_test[:12],
        "test": corpus.task_test[:12],
        "refusals": corpus.memory,
    }
    rows |= {"disallowed": corpus.safety_prompts, "benign": corpus.benign_prompts}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "run.yaml").write_text(yaml.safe_dump(_config()))


def _config() -> dict:
    return {
        "model": {"path": "model", "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [
            {"name": "support", "train": "upload.jsonl", "eval": {"path": "heldout.jsonl", "metric": "label_accuracy"}}
        ],
        "memory": {"source": "refusals.jsonl", "replay_ratio": 0.5, "max_tokens": 64, "teacher": {"k": 8}},
        "methods": {"der": {}, "ewc": {"sign_batches": 2, "rows_per_batch": 4}, "ema": {"horizon": 0.3}},
        "train": {
            "max_steps": 2,
            "allow_few_steps": True,
            "tokens_per_batch": 128,
            "tokens_per_microbatch": 512,
            "max_length": 64,
        },
        "safety": {"prompts": "disallowed.jsonl", "benign_prompts": "benign.jsonl", "max_new_tokens": 2},
        "output": "runs/support",
    }


def _provide(words: tuple[str, ...]) -> None:
    """Makes what the command names and what is not there, in the current folder."""
    for word in words:
        path = Path(word.rpartition("=")[2])
        if path.exists() or path.is_absolute() or word.startswith("-"):
            continue
        if path.suffix == ".jsonl":
            kinds = {
                "eval.path": "test.jsonl",
                "scan.benign": "upload.jsonl",  # a rate of false alarms needs that many rows
                "benign": "benign.jsonl",
                "harmless": "benign.jsonl",
                "refusals": "refusals.jsonl",
            }
            shutil.copy(next((file for key, file in kinds.items() if key in word), "disallowed.jsonl"), path)
        elif path.name == "judge.yaml":
            path.write_text(yaml.safe_dump(JUDGE))
        elif path.suffix in (".yaml", ".yml"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(_config() | {"output": f"runs/{path.stem}"}))
        elif path.parts[:1] == ("runs",) and "output=" not in word:
            shutil.copytree("finished", Path(*path.parts[:2]), dirs_exist_ok=True)
        elif path.suffix == ".parquet" and "export" not in words:
            assert _in_process(["memory", "export", "finished", str(path)]) == ExitCode.DONE
        elif (path.parts[:2] == ("path", "to") and "import" not in words) or word == "merged":
            shutil.copytree("adapter" if path.name == "adapter" else "model", path)


def _in_process(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """No launcher is at work, and what a verb says of one goes away again."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in environment.VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards whatever a verb makes of it
        monkeypatch.delenv(name)


def safecl_commands() -> list[tuple[str, ...]]:
    """The pages' commands of safecl without what a script does when one fails, each once; eight processes become two,
    since eight would fit no laptop."""
    commands = {}
    for words in lines():
        if arguments_of_safecl(list(words)) is not None:
            words = words[: words.index("||")] if "||" in words else words
            before = ("", *words)
            commands[tuple("2" if b == "--nproc-per-node" else w for b, w in zip(before, words, strict=False))] = None
    return list(commands)


@pytest.mark.parametrize("words", safecl_commands(), ids=" ".join)
def test_every_safecl_command_of_the_pages_does_its_work(words, sandbox, tmp_path, monkeypatch, capfd):
    verb, *rest = given = arguments_of_safecl(list(words))
    if verb in IN_FULL_ELSEWHERE:
        assert (
            _started(verb, given, tmp_path, monkeypatch) and f'"{verb}"' in (ROOT / IN_FULL_ELSEWHERE[verb]).read_text()
        )
        return
    monkeypatch.chdir(tmp_path if verb == "init" else sandbox)
    if verb == "train":
        shutil.rmtree("runs/support", ignore_errors=True)
    if verb != "init":
        _provide(tuple(rest))
    if verb == "launch":
        given = _planned(given, monkeypatch)
    if verb == "merge":
        given = _merged(given, tmp_path)
    if verb == "sweep":
        monkeypatch.setattr("safecl.sweeping.running.start_process", _FinishedRun)
    if verb == "rebase":
        given = _rebased(given, tmp_path)
    if verb == "expand":
        given = ["expand", "model", "--blocks", "1", "-o", str(tmp_path / "new")]
    code = _in_process(given) if words[0] == "safecl" else _by_launcher(words)
    told = capfd.readouterr()
    if "--lm-eval" in given and find_spec("lm_eval") is None:
        assert code == ExitCode.USAGE and 'pip install -e ".[eval]"' in told.err
        return
    assert code in DONE or any(word in UNALIGNED and UNALIGNED[word] in told.err for word in given[:2]), told


class _FinishedRun:
    """Stands for a process of a sweep: its run is the finished one. tests/sweeping has real ones."""

    def __init__(self, command, variables, log):
        folder = Path(command[-1].removeprefix("output="))
        shutil.copytree("finished", folder, dirs_exist_ok=True)

    def poll(self) -> int:
        return ExitCode.DONE


def _planned(given: list[str], monkeypatch) -> list[str]:
    """A launch is planned; tests/launching has real ones. The first node is this machine."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return [*(word.replace("10.0.0.1", "127.0.0.1") for word in given), "--dry-run"]


def _merged(given: list[str], folder: Path) -> list[str]:
    """A merge of the checkpoint that there is, into a folder of its own."""
    checkpoint = next(Path("finished/checkpoints").glob("step-*"))
    given = [str(checkpoint) if "/checkpoints/" in word else word for word in given]
    if "-o" in given:
        given[given.index("-o") + 1] = str(folder / "new")
    if "--sweep" in given:  # no point of a random model passes a gate, and two points show the way as well
        given[given.index("--sweep") + 1] = "alpha=0,1"
        gated = _config()
        gated["safety"]["gate"] = {"max_asr": 0.9}
        given[given.index("--eval") + 1] = str(folder / "gated.yaml")
        (folder / "gated.yaml").write_text(yaml.safe_dump(gated))
    return given


def _rebased(given: list[str], folder: Path) -> list[str]:
    """A new base that differs from the old one, and a folder of its own."""
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree("model", folder / "new-base"))
    save_file({name: 1.1 * value for name, value in load_file(base / "model.safetensors").items()},
              base / "model.safetensors", {"format": "pt"})  # fmt: skip
    given[given.index("--new-base") + 1] = str(base)
    given[given.index("-o") + 1] = str(folder / "new")
    return given


def _started(verb: str, given: list[str], folder: Path, monkeypatch) -> bool:
    """True where the command line begins the verb's work."""
    begun = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(f"safecl.{verb}.run.run_{verb}", lambda *arguments, **options: begun.append(options) or 0)
    return _in_process(given) == ExitCode.DONE and len(begun) == 1


def _by_launcher(words: tuple[str, ...]) -> int:
    """torchrun and deepspeed by their modules, so that this Python is used."""
    port = str(environment.free_port())
    program = {
        "torchrun": ["-m", "torch.distributed.run", "--master-port", port],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--master_port", port],
    }
    command = [sys.executable, *program.get(words[0], []), *words[1:]]
    return subprocess.run(command, env=dict(os.environ), timeout=300).returncode


@pytest.mark.parametrize("words", [w for w in lines() if arguments_of_safecl(list(w)) is None], ids=" ".join)
def test_every_other_command_of_the_pages_is_known_and_there(words):
    program, *rest = words
    if program == "make":
        dry = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
    elif program in ("python", "python3") and rest[0] == "-m":
        found = importlib.util.find_spec(rest[1])
        assert found is not None, f"no module {rest[1]}"
        if rest[1].startswith("benchmarks."):
            is_room = found.submodule_search_locations is not None
            _check_script(f"{rest[1].replace('.', '/')}{'/__main__' if is_room else ''}.py", rest[1:])
    elif program in ("python", "python3", "torchrun"):
        script = next(word for word in rest if word.endswith((".py", ".sh")))
        _check_script(script, rest[rest.index(script) :])
    elif program in ("bash", "sh"):
        assert (ROOT / rest[0]).is_file()
    elif program == "launch/gpu_suite.sh":
        _check_suite(rest)
    else:
        assert program in OF_THE_SHELL, f"no one knows the command {program}"


def _check_suite(words: list[str]) -> None:
    """The suite has the options and the sections that the page names."""
    _check_script("launch/gpu_suite.py", words)
    source = (ROOT / "launch" / "gpu_suite.py").read_text()
    sections = [word for word in words if not word.startswith("--") and not word.replace(".", "").isdigit()]
    assert all(f'("{section}", ' in source for section in sections), f"the suite has no {sections}"


def _check_script(script: str, words: list[str]) -> None:
    """The script is there, compiles, and defines every option among the words, which follow its name."""
    source = (ROOT / script).read_text()
    ast.parse(source)
    for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert f'"{option}"' in source, f"{script} has no option {option}"
