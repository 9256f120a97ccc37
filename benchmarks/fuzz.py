"""Coverage-guided fuzzing of every reader of safecl's own formats (atheris, Python 3.11; not a requirement of safecl).

    pip install atheris                                     # or: pip install --target DIR atheris; PYTHONPATH=DIR
    python benchmarks/fuzz.py                               # every reader for an hour, one after the other
    python benchmarks/fuzz.py config segment --seconds 600  # only these
    python benchmarks/fuzz.py --turns 4 --seconds 60        # four rounds of a minute for each reader
    python benchmarks/fuzz.py --keep                        # fuzz no more; minimise the corpus, and keep it
    python benchmarks/fuzz.py --list

The corpus grows in --corpus (default .fuzz/, which git ignores) and is used again by the next call, so fuzzing goes on
where it was stopped. --keep writes the inputs that reach what no shorter one reaches into tests/hostile/inputs/, a file
per reader with one input in base64 a line. A finding is written beside the corpus as crash-READER-..., and belongs into
tests/hostile/found/READER/ with its repair. tests/hostile/test_found.py reads both again. Writes
benchmarks/results/fuzz.json: seconds and executions of all calls so far, per reader. Exits with code 1 where there was
a finding. There is no roof and no rival.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
KEPT = ROOT / "tests" / "hostile" / "inputs"
MOST_BYTES_KEPT = 20_000
"""Of the inputs of one reader; the shortest are kept."""
MOST_BYTES = 4096
SECONDS_FOR_ONE_INPUT = 10


def read_results() -> dict:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(RESULTS.read_text())
    return {}


def fuzz(name: str, seconds: int, corpus: Path) -> bool:
    """Fuzz one reader in a process of its own; return whether nothing was found."""
    folder = corpus / name
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    done = fuzzer(name, str(folder), f"-max_total_time={seconds}", f"-artifact_prefix={corpus}/crash-{name}-")
    count = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    executed = int(count[1]) if count else 0
    results = read_results()
    before = results.get(name, {"seconds": 0, "executions": 0, "findings": 0})
    results[name] = {
        "seconds": round(before["seconds"] + time.monotonic() - began),
        "executions": before["executions"] + executed,
        "findings": before["findings"] + (done.returncode != 0),
        "corpus": len(list(folder.iterdir())),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(f"{name:<14} {executed:>10,} executions, {'clean' if done.returncode == 0 else 'FOUND'}", flush=True)
    if done.returncode:
        print(done.stderr[-3000:], flush=True)
    return done.returncode == 0


def fuzzer(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, "--inside", name, *arguments]
    options = [f"-max_len={MOST_BYTES}", f"-timeout={SECONDS_FOR_ONE_INPUT}", "-rss_limit_mb=3000"]
    return subprocess.run([*command, *options, "-print_final_stats=1"], capture_output=True, text=True, cwd=ROOT)


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

        for number, seed in enumerate(readers.seeds(name)):
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
    clean = [fuzz(name, chosen.seconds, corpus) for _ in range(chosen.turns) for name in names]
    sys.exit(0 if all(clean) else 1)


if __name__ == "__main__":
    main()
