"""Coverage-guided fuzzing of every reader of safecl's own formats (atheris, Python 3.11; not a requirement of safecl).

    pip install atheris                                     # or: pip install --target DIR atheris; PYTHONPATH=DIR
    python benchmarks/fuzz.py                               # every reader for an hour, one after the other
    python benchmarks/fuzz.py config segment --seconds 600  # only these
    python benchmarks/fuzz.py --list

The corpus grows in --corpus (default .fuzz/, which git ignores) and is used again by the next call, so fuzzing goes on
where it was stopped. A finding is written beside it as crash-READER-..., and belongs into tests/hostile/found/READER/
with its repair; tests/hostile/test_found.py reads these again. Writes benchmarks/results/fuzz.json: seconds and
executions of all calls so far, per reader. Exits with code 1 where there was a finding. There is no roof and no rival.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
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
    command = [sys.executable, __file__, "--inside", name, str(folder), f"-max_total_time={seconds}"]
    options = [
        f"-max_len={MOST_BYTES}",
        f"-timeout={SECONDS_FOR_ONE_INPUT}",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
    ]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *options, f"-artifact_prefix={corpus}/crash-{name}-"], capture_output=True, text=True, cwd=ROOT
    )
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
    parser.add_argument("--list", action="store_true", help="print the readers")
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(READERS))
        return
    clean = [fuzz(name, chosen.seconds, chosen.corpus.resolve()) for name in chosen.readers or READERS]
    sys.exit(0 if all(clean) else 1)


if __name__ == "__main__":
    main()
