"""Speed of safecl on a pretrained model beside the plain Hugging Face way: training, generation, start-up.

    python -m benchmarks.real_model.run align     # the model
    python -m benchmarks.real_model.speed         # on a quiet machine, about ten minutes
    python -m benchmarks.real_model.speed --no-json

One CPU thread, bf16, SST-2 rows of 600 tokens a step. The rival of training is a loop over the same rows: a padded
batch, `model(**batch).loss`, `backward`, clipping, torch's fused AdamW on the bf16 weights (safecl keeps fp32 master
weights). The rival of generation is `model.generate` on the same prompts in the same batches, and that of the start a
program that imports torch and transformers, loads the model and tokenizer, and takes one step. Contenders alternate;
each training and each start has a process of its own, since safecl sets what the C library does with freed memory.
Speeds are medians of the rounds. There is no error to state: training is compared with fp64 in the tests, and the
answers are compared here. Writes benchmarks/results/real_model_speed.json and the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import yaml

from benchmarks import ROOT, harness
from benchmarks.real_model.arms import PLAIN, REPORTED, Run
from safecl.distributed.host_memory import LARGE_BYTES

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "real_model_speed.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- real-speed -->\n", "<!-- end -->"
STEPS, WARM_UP, ROUNDS = 10, 2, 3
CONTENDERS = ("safecl", "safecl, recomputing", "safecl, memory given back", "hugging face")
NUM_PROMPTS, NEW_TOKENS = 40, 24
START = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters())
ids = tokenizer(["Positive or negative? A fine film. positive"] * 40, return_tensors="pt").input_ids
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real-model"))
    parser.add_argument("--no-json", action="store_true", help="write no files")
    parser.add_argument("--contender", choices=CONTENDERS, help="train as one contender, and print its numbers")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.contender is not None:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(one_training(folder, Path(scratch) / "run", arguments.contender)))
        return
    if not (folder / "aligned" / "config.json").exists():
        sys.exit(f"no model in {folder}: run python -m benchmarks.real_model.run align first")
    with tempfile.TemporaryDirectory() as scratch:
        found = {"start": start(folder, Path(scratch))}
        found |= training(folder)
        found["generation"] = generation(folder)
    result = {
        "command": "python -m benchmarks.real_model.speed",
        "machine": harness.machine(torch.device("cpu")),
        **found,
    }
    print(table(result))
    if not arguments.no_json:
        harness.write_json(RESULTS, result)
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(head + BEGIN + table(result) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ training


def training(folder: Path) -> dict[str, Any]:
    """Return the tokens per second of each contender, and the kernel's share of its CPU time in the steps."""
    from safecl.distributed.environment import without_launcher

    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    shares: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _, name in itertools.product(range(ROUNDS), CONTENDERS):
        given_back = {"MALLOC_MMAP_THRESHOLD_": str(LARGE_BYTES)} if name == "safecl, memory given back" else {}
        command = [sys.executable, "-m", __spec__.name, "--folder", str(folder), "--contender", name]
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=without_launcher() | given_back)
        found = json.loads(run.stdout.splitlines()[-1])
        speeds[name].append(found["speed"])
        shares[name].append(found["system_share"])
    return {"training": speeds, "system_share": {name: statistics.median(each) for name, each in shares.items()}}


def one_training(folder: Path, output: Path, name: str) -> dict[str, float]:
    if name == "hugging face":
        return rival_speed(folder)
    return safecl_speed(folder, output, recomputes=name == "safecl, recomputing")


class Clock:
    """Measures from the end of the warm-up to the last step."""

    def start(self) -> None:
        self._began, self._used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

    def stop(self, tokens: int) -> dict[str, float]:
        """Return the tokens per second and the kernel's share of the CPU time."""
        seconds, used = time.perf_counter() - self._began, resource.getrusage(resource.RUSAGE_SELF)
        user, kernel = used.ru_utime - self._used.ru_utime, used.ru_stime - self._used.ru_stime
        return {"speed": round(tokens / seconds, 1), "system_share": round(kernel / (user + kernel), 4)}


def config_of(folder: Path, output: Path, recomputes: bool, steps: int = STEPS) -> dict[str, Any]:
    config = Run(PLAIN, 0, REPORTED).config(folder)
    config["model"]["gradient_checkpointing"] = recomputes
    config["train"] |= {"max_steps": steps, "allow_few_steps": True}
    return config | {"output": str(output), "safety": None}


def safecl_speed(folder: Path, output: Path, recomputes: bool) -> dict[str, float]:
    """Train a few steps, and return the task's tokens per second after the first ones."""
    from safecl.config import validate_tree
    from safecl.training.guard.measuring import Measurements
    from safecl.training.trainer import Trainer

    clock, begun, look = Clock(), [], Measurements.look

    def timed(self: Measurements, run: Any) -> dict[str, float]:  # before each step
        begun.append(run.global_step)
        if run.global_step == WARM_UP:
            clock.start()
        return look(self, run)

    Measurements.look = timed  # type: ignore[method-assign]
    trainer = Trainer(validate_tree(config_of(folder, output, recomputes), "speed"))
    found, after_task = {}, Measurements.after_task

    def done(self: Measurements, run: Any, task: Any) -> bool:
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        found.update(clock.stop(sum(line["tokens"] for line in lines[WARM_UP:])))
        return after_task(self, run, task)

    Measurements.after_task = done  # type: ignore[method-assign]
    trainer.fit()
    return found


def rival_speed(folder: Path) -> dict[str, float]:
    """Train the same model on the same rows without safecl, and return the tokens per second."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, clock = 0, Clock()
    for step, batch in zip(range(STEPS), batches(folder), strict=False):
        if step == WARM_UP:
            tokens = 0
            clock.start()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(batch["attention_mask"].sum())
    return clock.stop(tokens)


def batches(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches of about as many tokens as safecl's steps have."""
    from safecl.config import validate_tree
    from safecl.planning.run_plan import plan_run

    plan = plan_run(validate_tree(config_of(folder, folder / "speed", False), "speed"))
    dataset, taken = plan.tasks[0].dataset, []
    for number in range(len(dataset)):
        taken.append(dataset.row(number))
        if sum(len(row.input_ids) for row in taken) < plan.config.train.tokens_per_batch:
            continue
        longest = max(len(row.input_ids) for row in taken)
        batch = {name: torch.zeros(len(taken), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        batch["labels"] = torch.full((len(taken), longest), -100)
        for place, row in enumerate(taken):
            ids, length = torch.tensor(row.input_ids, dtype=torch.long), len(row.input_ids)
            batch["input_ids"][place, :length], batch["attention_mask"][place, :length] = ids, 1
            supervised = torch.tensor(row.loss_mask, dtype=torch.bool)
            batch["labels"][place, :length][supervised] = ids[supervised]
        yield batch
        taken = []


# ---------------------------------------------------------------------------------------------------------- generation


def generation(folder: Path) -> dict[str, Any]:
    """Return the seconds of each contender for the same answers, and whether they are the same."""
    from transformers import AutoModelForCausalLM

    from safecl.config import ModelConfig
    from safecl.data import load_tokenizer, read_prompts
    from safecl.evaluation.answers.model import HFEvalModel
    from safecl.evaluation.answers.prompts import answer_prompts

    prompts = read_prompts(str(folder / "prompts.jsonl"), NUM_PROMPTS)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "aligned")))
    ours, theirs = (
        HFEvalModel.load(folder / "aligned"),
        AutoModelForCausalLM.from_pretrained(folder / "aligned", dtype=torch.bfloat16),
    )
    chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    tokenizer.padding_side = "left"
    given = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    seconds: dict[str, list[float]] = {"safecl": [], "hugging face": []}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        answers = answer_prompts(ours, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=NUM_PROMPTS)
        middle = time.perf_counter()
        with torch.no_grad():
            written = theirs.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
        seconds["safecl"].append(round(middle - began, 2))
        seconds["hugging face"].append(round(time.perf_counter() - middle, 2))
    texts = tokenizer.batch_decode(written[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    same = sum(mine["text"].strip() == text.strip() for mine, text in zip(answers, texts, strict=True))
    return {"seconds": seconds, "same_answers": same, "answers": len(prompts)}


# --------------------------------------------------------------------------------------------------------------- start


def start(folder: Path, scratch: Path) -> dict[str, list[float]]:
    """Return the seconds from the command to the end of the first step, with nothing prepared for safecl's command."""
    from safecl.distributed.environment import without_launcher

    seconds: dict[str, list[float]] = {"safecl": [], "hugging face": []}
    for number in range(ROUNDS):
        path, output = scratch / f"start-{number}.yaml", scratch / f"start-{number}"
        path.write_text(yaml.safe_dump(config_of(folder, output, False, steps=1)))
        environment = without_launcher() | {"SAFECL_CACHE": str(scratch / f"cache-{number}")}
        began = time.time()
        subprocess.run(
            [sys.executable, "-m", "safecl", "train", str(path)], check=True, capture_output=True, env=environment
        )
        first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
        seconds["safecl"].append(round(first["time"] - began, 2))
        began = time.time()
        subprocess.run([sys.executable, "-c", START, str(folder / "aligned")], check=True, capture_output=True)
        seconds["hugging face"].append(round(time.time() - began, 2))
    return seconds


# -------------------------------------------------------------------------------------------------------------- report


def table(result: dict[str, Any]) -> str:
    """Return the medians as a Markdown table."""
    speeds = {name: statistics.median(values) for name, values in result["training"].items()}
    made, began = (result[key] for key in ("generation", "start"))
    seconds = {name: statistics.median(values) for name, values in made["seconds"].items()}
    starts = {name: statistics.median(values) for name, values in began.items()}
    rows = [
        (
            "training, tokens per second",
            f"{speeds['safecl']:.0f}",
            f"{speeds['hugging face']:.0f}",
            speeds["safecl"] / speeds["hugging face"],
        ),
        (
            "the same, activations recomputed",
            f"{speeds['safecl, recomputing']:.0f}",
            "",
            speeds["safecl, recomputing"] / speeds["hugging face"],
        ),
        (
            "the same, freed memory given back",
            f"{speeds['safecl, memory given back']:.0f}",
            "",
            speeds["safecl, memory given back"] / speeds["hugging face"],
        ),
        (
            f"{made['answers']} answers of {NEW_TOKENS} tokens, seconds",
            f"{seconds['safecl']:.1f}",
            f"{seconds['hugging face']:.1f}",
            seconds["hugging face"] / seconds["safecl"],
        ),
        (
            "command to the end of the first step, seconds",
            f"{starts['safecl']:.1f}",
            f"{starts['hugging face']:.1f}",
            starts["hugging face"] / starts["safecl"],
        ),
    ]
    lines = ["| | safecl | Hugging Face | speed of it |", "|---|---:|---:|---:|"]
    return "\n".join([*lines, *(f"| {what} | {ours} | {theirs} | {ratio:.2f} |" for what, ours, theirs, ratio in rows)])


if __name__ == "__main__":
    main()
