"""Merges of a 1.5 GB checkpoint: peak memory beside the stated bound, and speed beside a plain copy of the same bytes.

    python -m benchmarks.merging.cost                  # makes the parents in a temporary folder, 3 rounds
    python -m benchmarks.merging.cost --folder /scratch --rounds 5 --kinds wise_ft ties
    python -m benchmarks.merging.cost --no-json        # prints only

The parents are random bf16 weights with the names and shapes of a Llama of 0.75 G parameters, in three files each. The
rival and roof is a copy: it reads every byte of the parents and writes as many bytes as the result has, in blocks of
16 MiB, to the same disk, and brings them to it (fsync). Before each run the parents leave the system's cache. Copy and
merges alternate, each in a process of its own; the speed of a merge is the median of the rounds' ratios, each of a copy
and the merge right after it. CPU seconds stand beside wall seconds, which other work disturbs. Memory is the growth of
the process above what it had when the libraries were loaded (VmHWM); it has no part of the system's cache. Writes
benchmarks/results/merging.json, where the rows of kinds that are not asked for stay, and the table of docs/merging.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import ROOT, harness
from safecl.merging.memory import memory_bound
from safecl.merging.registry import kind_module
from safecl.merging.run import merge

RESULTS = ROOT / "benchmarks" / "results" / "merging.json"
PAGE = ROOT / "docs" / "merging.md"
BEGIN, END = "<!-- made by benchmarks/merging/cost.py -->\n", "<!-- end -->"
VOCAB, HIDDEN, INNER, LAYERS, HEADS = 32_000, 1536, 4096, 23, 12
BLOCK = 16 * 2**20
KINDS = {
    "wise_ft": (1, {"alpha": 0.5}),
    "task_arithmetic": (2, {"scale": 0.5}),
    "slerp": (1, {"t": 0.5}),
    "magmax": (2, {}),
    "ties": (2, {"density": 0.2}),
    "dare": (2, {"density": 0.2}),
    "dare_ties": (2, {"density": 0.2}),
    "bang": (2, {}),
    "lines": (1, {"alpha": 0.5}),
    "linear": (2, {}),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the checkpoint."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def make_parents(folder: Path) -> list[Path]:
    """Write a base and two tuned models."""
    names = list(shapes())
    files = [names[i * len(names) // 3 : (i + 1) * len(names) // 3] for i in range(3)]
    folders = [folder / name for name in ("base", "tuned", "tuned2")]
    for parent in folders:
        parent.mkdir()
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
        sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
        (parent / "config.json").write_text(json.dumps(config | sizes | {"num_attention_heads": HEADS}))
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(VOCAB * HIDDEN, generator=generator)
    noise = 0.001 * torch.randn(VOCAB * HIDDEN, generator=generator)
    for index, parent in enumerate(folders):
        values = (start + (0, 1, -0.5)[index] * noise).bfloat16()  # every tensor is a part of these
        for number, part in enumerate(files, start=1):
            state = {name: values[: math.prod(shapes()[name])].clone().view(shapes()[name]) for name in part}
            save_file(state, parent / f"model-{number:05d}-of-00003.safetensors", {"format": "pt"})
    places = {name: f"model-{n:05d}-of-00003.safetensors" for n, part in enumerate(files, start=1) for name in part}
    for parent in folders:
        (parent / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folders


def forget(folders: list[Path]) -> None:
    """Let the parents' files leave the system's cache."""
    os.sync()
    for file in (file for folder in folders for file in folder.glob("*.safetensors")):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


# ------------------------------------------------------------------------------------------------------ in the process


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def copy(folders: list[Path], out: Path) -> None:
    """Read all files of the parents, and write the bytes of the first."""
    out.mkdir()
    block = bytearray(BLOCK)
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            writes = folder == folders[0]
            target = (out / file.name).open("wb", buffering=0) if writes else None
            with file.open("rb", buffering=0) as source:
                while count := source.readinto(block):
                    if target is not None:
                        target.write(memoryview(block)[:count])
            if target is not None:
                os.fsync(target.fileno())
                target.close()


def one_run(job: dict) -> None:
    """Do one copy or merge, and print its seconds and peak bytes as JSON."""
    folders, out = [Path(path) for path in job["folders"]], Path(job["out"])
    if job["kind"] == "copy":
        begin, worked = time.perf_counter(), time.process_time()
        copy(folders, out)
        print(json.dumps({"seconds": time.perf_counter() - begin, "cpu": time.process_time() - worked}))
        return
    kind_module(job["kind"])
    torch.ones(8).bfloat16().float().sum()
    before = status("VmRSS")
    begin, worked = time.perf_counter(), time.process_time()
    merge(job["kind"], base=folders[0], tuned=folders[1:], out=out, **job["settings"])
    seconds, cpu = time.perf_counter() - begin, time.process_time() - worked
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": status("VmHWM") - before}))


# -------------------------------------------------------------------------------------------------------------- report


def measured(kind: str, folders: list[Path], folder: Path, settings: dict) -> dict:
    out = folder / "out"
    forget(folders)
    job = {"kind": kind, "folders": list(map(str, folders)), "out": str(out), "settings": settings}
    command = [sys.executable, "-m", __spec__.name, "--job", json.dumps(job)]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    shutil.rmtree(out)
    return result


def bound(kind: str, num_models: int) -> int:
    """Return the bytes that docs/merging.md states for a merge of so many models."""
    largest = max(math.prod(shape) for shape in shapes().values())
    return memory_bound(num_models, largest, kind_module(kind).Merge.by_rows)


def compare(folders: list[Path], folder: Path, kinds: list[str], rounds: int) -> dict:
    rows = {}
    for kind in kinds:
        num_tuned, settings = KINDS[kind]
        parents = folders[: 1 + num_tuned]
        pairs = []
        for _ in range(rounds):
            pairs.append((measured("copy", parents, folder, {}), measured(kind, parents, folder, settings)))
        copied, merged = ([pair[i]["seconds"] for pair in pairs] for i in (0, 1))
        rows[kind] = {
            "models": len(parents),
            "copy_seconds": [round(value, 2) for value in copied],
            "merge_seconds": [round(value, 2) for value in merged],
            "copy_cpu_seconds": [round(pair[0]["cpu"], 2) for pair in pairs],
            "merge_cpu_seconds": [round(pair[1]["cpu"], 2) for pair in pairs],
            "of_copy": round(statistics.median(a / b for a, b in zip(copied, merged, strict=True)), 3),
            "peak_mb": round(max(pair[1]["peak"] for pair in pairs) / 1e6, 1),
            "bound_mb": round(bound(kind, len(parents)) / 1e6, 1),
            "load_average": round(os.getloadavg()[0], 1),
        }
        print(f"{kind:16} {rows[kind]}", flush=True)
    return rows


def table(rows: dict) -> str:
    """Return the table of the page."""
    lines = ["| | models | speed, of the copy's | CPU s | CPU s of the copy | MB of memory | at most |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for kind, row in rows.items():
        merged, copied = (statistics.median(row[f"{who}_cpu_seconds"]) for who in ("merge", "copy"))
        cells = (row["models"], f"{row['of_copy']:.2f}", f"{merged:.1f}", f"{copied:.1f}")
        lines.append(f"| `{kind}` | {' | '.join(map(str, cells))} | {row['peak_mb']:.0f} | {row['bound_mb']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--no-json", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        one_run(json.loads(arguments.job))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        folders = make_parents(folder)
        size = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB a model", flush=True)
        rows = compare(folders, folder, arguments.kinds, arguments.rounds)
    if not arguments.no_json:
        kept = json.loads(RESULTS.read_text())["merges"] if RESULTS.exists() else {}
        rows = {kind: (kept | rows)[kind] for kind in KINDS if kind in kept | rows}
        facts = harness.machine(torch.device("cpu"))
        harness.write_json(RESULTS, {"bytes_per_model": size, "machine": facts, "merges": rows})
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + table(rows) + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
