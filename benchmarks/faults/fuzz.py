"""Coverage-guided fuzzing of every reader of safecl's own formats (atheris, Python 3.11; not a requirement of safecl).

    pip install atheris                                     # or: pip install --target DIR atheris; PYTHONPATH=DIR
    python -m benchmarks.faults.fuzz                               # every reader for an hour, one after the other
    python -m benchmarks.faults.fuzz config segment --seconds 600  # only these
    python -m benchmarks.faults.fuzz --turns 4 --seconds 60        # four rounds of a minute for each reader
    python -m benchmarks.faults.fuzz --parallel 2                  # two readers at once
    python -m benchmarks.faults.fuzz --keep                        # fuzz no more; minimise the corpus, and keep it
    python -m benchmarks.faults.fuzz --list

The corpus grows in --corpus (default .fuzz/, which git ignores), begins with the kept inputs, and is used again by the
next call, so fuzzing goes on where it was stopped. --keep writes the inputs that reach what no shorter one reaches into
tests/hostile/inputs/, a file per reader with one input in base64 a line. A finding is written beside the corpus as
crash-READER-..., and belongs into tests/hostile/found/READER/ with its repair. tests/hostile/test_found.py reads both
again. Writes benchmarks/results/fuzz.json: processor seconds and executions of all calls so far, per reader. Exits with
code 1 where there was a finding. There is no roof and no rival.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from benchmarks import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
KEPT = ROOT / "tests" / "hostile" / "inputs"
MOST_BYTES_KEPT = 20_000
"""Of the inputs of one reader; the shortest are kept."""
MOST_BYTES = 4096
SECONDS_FOR_ONE_INPUT = 10
_RESULTS_LOCK = threading.Lock()


def read_results() -> dict:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(RESULTS.read_text())
    return {}


def fuzz(name: str, seconds: int, corpus: Path) -> bool:
    """Fuzz one reader in a process of its own; return whether nothing was found."""
    folder = corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    code, said, used = fuzzer(
        name, str(folder), f"-max_total_time={seconds}", f"-artifact_prefix={corpus}/crash-{name}-"
    )
    count = re.search(r"number_of_executed_units: (\d+)", said)
    executed = int(count[1]) if count else 0
    with _RESULTS_LOCK:
        add_results(name, used, executed, code != 0, len(list(folder.iterdir())))
        print(f"{name:<14} {executed:>10,} executions, {'clean' if code == 0 else 'FOUND'}", flush=True)
        if code:
            print(said[-3000:], flush=True)
    return code == 0


def add_results(name: str, cpu_seconds: float, executions: int, found: bool, corpus: int) -> None:
    results = read_results()
    before = results.get(name, {})
    results[name] = {
        "cpu_seconds": round(before.get("cpu_seconds", 0) + cpu_seconds),
        "executions": before.get("executions", 0) + executions,
        "findings": before.get("findings", 0) + found,
        "corpus": corpus,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


def fuzzer(name: str, *arguments: str) -> tuple[int, str, float]:
    """Run the fuzzer in a process of its own; return its exit code, what it said, and its processor seconds."""
    command = [sys.executable, "-m", __spec__.name, "--inside", name, *arguments]
    options = [f"-max_len={MOST_BYTES}", f"-timeout={SECONDS_FOR_ONE_INPUT}", "-rss_limit_mb=3000"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*command, *options, "-print_final_stats=1"], stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace"), usage.ru_utime + usage.ru_stime


def keep(name: str, corpus: Path) -> None:
    """Write the inputs of a reader's corpus that reach what no shorter one reaches, and its seeds."""
    from tests.hostile import readers

    found = {path.read_bytes() for path in (corpus / name).glob("*")} | set(readers.seeds(name))
    lines, seen, size = [], set(), 0
    for data in sorted(found, key=lambda data: (len(data), data)):
        reached = branches(lambda data=data: readers.read(name, data))
        if reached - seen and size + len(data) <= MOST_BYTES_KEPT:
            lines.append(base64.b64encode(data).decode())
            seen |= reached
            size += len(data)
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"{name:<14} {len(lines)} inputs kept of {len(found)}", flush=True)


def branches(read: Callable[[], object]) -> set[tuple[str, int, int]]:
    """Return the jumps from line to line of safecl's code that a call makes."""
    made: set[tuple[str, int, int]] = set()
    package = str(ROOT / "safecl")

    def trace(frame: FrameType, event: str, value: object) -> Callable | None:
        if not frame.f_code.co_filename.startswith(package):
            return None
        last = frame.f_lineno

        def step(frame: FrameType, event: str, value: object) -> Callable:
            nonlocal last
            made.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
            return step

        return step

    sys.settrace(trace)
    try:
        with contextlib.suppress(Exception):
            read()
    finally:
        sys.settrace(None)
    return made


def inside(name: str, folder: str, options: list[str]) -> None:
    """The fuzzer itself; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["safecl", "tests.hostile", "yaml"]):
        from tests.hostile import readers

        kept = [base64.b64decode(line) for line in (KEPT / f"{name}.txt").read_text().split()]
        for number, seed in enumerate([*readers.seeds(name), *kept]):
            (Path(folder) / f"seed-{number}").write_bytes(seed)
        with contextlib.suppress(Exception):
            readers.read(name, readers.seeds(name)[0])

    def test_one_input(data: bytes) -> None:
        readers.read(name, data)

    atheris.Setup([sys.argv[0], folder, *options], test_one_input)
    atheris.Fuzz()


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:  # before anything of safecl is imported, which could not be instrumented then
        inside(sys.argv[2], sys.argv[3], sys.argv[4:])
    from tests.hostile.readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], metavar="READER")
    parser.add_argument("--seconds", type=int, default=3600, help="for each reader")
    parser.add_argument("--corpus", type=Path, default=ROOT / ".fuzz")
    parser.add_argument("--turns", type=int, default=1, help="rounds over the readers")
    parser.add_argument("--parallel", type=int, default=1, help="readers at once")
    parser.add_argument("--keep", action="store_true", help="minimise the corpus into tests/hostile/inputs/")
    parser.add_argument("--list", action="store_true", help="print the readers")
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(READERS))
        return
    names, corpus = chosen.readers or list(READERS), chosen.corpus.resolve()
    if chosen.keep:
        for name in names:
            keep(name, corpus)
        return
    clean = True
    with ThreadPoolExecutor(chosen.parallel) as pool:
        for _ in range(chosen.turns):
            clean &= all(list(pool.map(lambda name: fuzz(name, chosen.seconds, corpus), names)))
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
