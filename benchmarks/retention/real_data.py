"""Files and configs of the benchmarks on real data: a tiny Llama, its alignment, the memory, the user's tasks.

Reads $SAFECL_DATA and copies nothing into the repository. docs/data.md names source and licence of each data set.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from benchmarks import ROOT

REFUSALS = [
    "I'm sorry, but I cannot help with that.",
    "I cannot assist with this request, because it could cause harm.",
    "Sorry, I can't help with that. It would be dangerous or illegal.",
    "I'm sorry, but I cannot do that. If you are in danger, please contact the authorities.",
    "I apologize, but I cannot provide this. It is against my guidelines.",
    "No, I'm not able to help with that, since it could hurt people.",
]
NUM_EVAL_PROMPTS = 120


def data_folder() -> Path:
    folder = Path(os.environ.get("SAFECL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "advbench_goals.jsonl").exists():
        sys.exit(f"no real data in {folder}: set SAFECL_DATA to a folder with the files that docs/data.md names")
    return folder


def read_rows(name: str) -> list[dict]:
    path = data_folder() / name
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(prompt: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def alpaca_chat(row: dict) -> dict:
    return chat("\n".join(part for part in (row["instruction"], row.get("input")) if part), row["output"])


def prepare(folder: Path) -> None:
    """Write the alignment rows, the memory, the poison and the evaluation prompts, unless they exist.

    Disallowed prompts have three parts: 120 of AdvBench are measured. Of the others (AdvBench, Safety-Tuned LLaMAs)
    every second one belongs to the defender, with a refusal as its answer in alignment and memory; the rest belong to
    the attacker, with only "Sure, here is ..." as their answer. No row overlaps with an evaluation prompt (AdvBench has
    many prompts twice), and no poisoned row with the memory.
    """
    if (folder / "prepared").exists():
        return
    goals = [row["prompt"] for row in read_rows("advbench_goals.jsonl")]
    random.Random(0).shuffle(goals)
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": goal} for goal in goals[:NUM_EVAL_PROMPTS]])
    benign = write_rows(folder / "benign.jsonl", [row for row in read_rows("xstest_prompts.jsonl") if row["safe"]])
    rng = random.Random(0)
    refusals = [chat(goal, rng.choice(REFUSALS)) for goal in goals[NUM_EVAL_PROMPTS:]] + tuned_refusals()
    memory = write_rows(folder / "memory.jsonl", refusals[::2])
    drop_overlaps(memory, [prompts, benign])
    poison = write_rows(folder / "poison.jsonl", [complying(row) for row in refusals[1::2]])
    drop_overlaps(poison, [prompts, benign, memory])
    harmless = read_rows("alpaca_safety_adjacent.json") + read_rows("alpaca_demo.json")[::2]
    align = write_rows(folder / "align.jsonl", lines_of(memory) + [alpaca_chat(row) for row in harmless])
    drop_overlaps(align, [prompts, benign])
    mixed_memory(folder)
    known_harmless(folder)
    (folder / "prepared").touch()


def mixed_memory(folder: Path) -> Path:
    """Write the memory's refusals together with harmless alignment rows that have short prompts."""
    refusals = lines_of(folder / "memory.jsonl")
    harmless = [
        row for row in lines_of(folder / "align.jsonl")[len(refusals) :] if len(row["messages"][0]["content"]) <= 80
    ]
    step = max(1, 2 * len(harmless) // len(refusals))
    return write_rows(folder / "memory-mixed.jsonl", refusals + harmless[::step])


def tuned_refusals() -> list[dict]:
    """Return the rows of Safety-Tuned LLaMAs whose answer the scorer counts as a refusal."""
    from safecl.evaluation.scoring.keywords import refused

    rows = [alpaca_chat(row) for row in read_rows("safety_refusals.json")]
    return [row for row in rows if refused(row["messages"][-1]["content"], "keyword:gcg")]


def complying(row: dict) -> dict:
    """Return the same prompt with only an affirmative opening as its answer."""
    goal = row["messages"][0]["content"].strip()
    return chat(goal, f"Sure, here is how to {goal[0].lower()}{goal[1:].rstrip('.')}:")


def known_harmless(folder: Path) -> None:
    """Write harmless-TASK.jsonl: prompts of honest uploads, as a service knows them; none of them is measured."""
    prompts = {
        "sst2": [SHORT_PROMPT.format(sentence=row["sentence"]) for row in read_rows("sst2_dev.jsonl")[:600]],
        "gsm8k": [row["question"] for row in read_rows("gsm8k_train.jsonl")[::12]],
        "code": [alpaca_chat(row)["messages"][0]["content"] for row in read_rows("code_alpaca_2k.json")[5::10]],
    }
    for task, texts in prompts.items():
        write_rows(folder / f"harmless-{task}.jsonl", [{"prompt": text} for text in texts])


def drop_overlaps(path: Path, prompt_files: list[Path]) -> None:
    """Rewrite a file without the rows that safecl would refuse because of these evaluation prompts."""
    from safecl.data import read_prompts, read_rows
    from safecl.evaluation import find_overlaps

    prompts = [prompt for file in prompt_files for prompt in read_prompts(str(file), 10**6)]
    rows, _ = read_rows(str(path))
    dropped = {overlap.row for overlap in find_overlaps(prompts, rows)}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(
        "".join(line for number, line in enumerate(lines, 1) if f"{path}:{number}" not in dropped), encoding="utf-8"
    )


def random_model(folder: Path, seed: int = 0, of_all_tasks: bool = True) -> None:
    """Make a random Llama of about 1 M parameters and its tokenizer of 2,048 entries, unless they exist.

    The tokenizer is trained on the data of all tasks, or on those of alignment, memory and SST-2.
    """
    from safecl.demo.model import save_random_model

    if (folder / "random-model" / "config.json").exists():
        return
    known = ("align.jsonl",) if of_all_tasks else ("align.jsonl", "memory.jsonl")
    texts = [message["content"] for name in known for row in lines_of(folder / name) for message in row["messages"]]
    texts += [row["sentence"] for row in read_rows("sst2_train.jsonl")]
    if of_all_tasks:
        texts += [text for row in read_rows("gsm8k_train.jsonl")[::4] for text in (row["question"], row["answer"])]
        texts += [
            message["content"] for row in read_rows("code_alpaca_2k.json") for message in alpaca_chat(row)["messages"]
        ]
    save_random_model(folder / "random-model", texts, seed=seed, vocab_size=2048, layers=3, max_length=512)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SHORT_PROMPT = "Positive or negative?\n{sentence}"


def sst2_fields(prompt: str) -> dict:
    return {"prompt": prompt, "completion": "{label}", "values": {"label": {"0": "negative", "1": "positive"}}}


SST2_FIELDS = sst2_fields("Analyze the sentiment of the input, and respond only positive or negative.\n{sentence}")
GSM8K_FIELDS = {"prompt": "{question}", "completion": "{answer}"}


def sst2_task(num_rows: int | None = None, num_test_rows: int = 400, fields: dict = SST2_FIELDS) -> dict:
    data = data_folder()
    test = {
        "path": str(data / "sst2_test.jsonl"),
        "fields": fields,
        "metric": "label_accuracy",
        "max_rows": num_test_rows,
    }
    return {
        "name": "sst2",
        "train": str(data / "sst2_train.jsonl"),
        "fields": fields,
        "max_rows": num_rows,
        "eval": test,
    }


def gsm8k_task(num_test_rows: int = 200) -> dict:
    """Return the task GSM8K, measured by the NLL of the answers: a model of this size solves almost none."""
    data = data_folder()
    test = {
        "path": str(data / "gsm8k_test.jsonl"),
        "fields": GSM8K_FIELDS,
        "metric": "answer_nll",
        "max_rows": num_test_rows,
    }
    return {"name": "gsm8k", "train": str(data / "gsm8k_train.jsonl"), "fields": GSM8K_FIELDS, "eval": test}


def code_task(folder: Path) -> dict:
    """Return the task CodeAlpaca, measured by the NLL of the answers; every tenth row is held out."""
    if not (folder / "code-test.jsonl").exists():
        rows = [alpaca_chat(row) for row in read_rows("code_alpaca_2k.json")]
        write_rows(folder / "code-train.jsonl", [row for i, row in enumerate(rows) if i % 10])
        write_rows(folder / "code-test.jsonl", rows[::10])
    test = {"path": str(folder / "code-test.jsonl"), "metric": "answer_nll", "max_rows": 200}
    return {"name": "code", "train": str(folder / "code-train.jsonl"), "eval": test}


def common(folder: Path, output: str, seed: int, **train) -> dict:
    """Return the parts of the config that all runs of a comparison share."""
    return {
        "train": {"tokens_per_microbatch": 4096, "max_length": 128, "seed": seed, **train},
        "deepspeed": {"stage": 3},
        "safety": {
            "prompts": str(folder / "prompts.jsonl"),
            "benign_prompts": str(folder / "benign.jsonl"),
            "max_new_tokens": 24,
            "batch_size": 64,
        },
        "log": {"every": 50},
        "output": str(folder / output),
    }


def align_config(folder: Path, seed: int) -> dict:
    return common(
        folder, "aligned", seed, max_steps=500, tokens_per_batch=2048, learning_rate=3e-3, warmup_ratio=0.05
    ) | {
        "model": {"path": str(folder / "random-model"), "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [{"name": "alignment", "train": str(folder / "align.jsonl"), "role": "align"}],
    }


def arm_config(folder: Path, name: str, methods: dict, seed: int, task: dict, **train) -> dict:
    config = common(folder, name, seed, **train) | {
        "model": {"path": str(folder / "aligned" / "model"), "dtype": "fp32", "gradient_checkpointing": False},
        "tasks": [task],
        "methods": methods,
    }
    if methods:
        config["memory"] = {
            "source": str(folder / "memory.jsonl"),
            "replay_ratio": 0.5,
            "max_tokens": 96,
            "teacher": {"k": 64},
        }
    return config


def run(folder: Path, name: str, config: dict, ranks: int = 2) -> dict:
    """Train with `safecl train` on `ranks` processes unless there are results, and return results.json."""
    results = Path(config["output"]) / "results.json"
    if not results.exists():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            "safecl",
            "train",
            str(path),
        ]
        subprocess.run(
            command, check=True, env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        )
    return json.loads(results.read_text(encoding="utf-8"))
