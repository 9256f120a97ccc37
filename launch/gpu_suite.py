"""The GPU suite: sections with a time limit each, which go on after a failure and resume where a call has stopped.

    launch/gpu_suite.sh --minutes 9.5        sections in order, as long as their time limits fit
    launch/gpu_suite.sh --minutes 2.5        the rest, in a second call
    launch/gpu_suite.sh --only flat-tests    these sections, whether done before or not
    launch/gpu_suite.sh --fresh              forget earlier results
    launch/gpu_suite.sh --dry                the same commands at toy size on the CPU

Results are in $OUT (default runs/gpu-suite): a log and the JSON of each section, `suite.json`, and `suite.md`, one
table of figures with the columns measured, floor, rival and met. Exit status: 0 where all sections that ran have
passed, 2 for an unknown section, 1 otherwise. Needs torch 2.8 to 2.13 with its Triton, and no network: WHEELS may name
a folder of wheels that are installed first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DRY = 10
"""Factor of the time limits in a dry run: the machine may be small and busy."""
SPARE_SECONDS = 5.0
"""Of what is left, kept for writing the results."""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    measured: str
    floor: str = ""
    rival: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Section:
    """A command with a time limit. `{out}` is the folder of results; `dry` replaces the arguments of a dry run."""

    name: str
    seconds: int
    command: str
    dry: str
    figures: Callable[[Path], Iterator[Figure]] = field(default=lambda out: iter(()))
    needed: bool = False
    """Whether nothing else can run where this fails."""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _of_smoke(out: Path) -> Iterator[Figure]:
    for run in _json(out / "smoke.json")["runs"]:
        yield Figure(f"engine, {run['name']}", f"{run['error']:.1e} from the CPU run", "1e-3", met=run["met"])


def _of_head(out: Path) -> Iterator[Figure]:
    found = _json(out / "head.json")
    groups = [found] if "limits" in found else [v for v in found.values() if isinstance(v, dict) and "limits" in v]
    for group in groups:
        for one in group["limits"]:
            yield Figure(
                f"head, {one['objective']}", f"{one['ratio']:.2f}x", f"{one['at_least']:g}x", one["rival"], one["met"]
            )


def _of_flat(out: Path) -> Iterator[Figure]:
    for one in _json(out / "flat.json")["ratios"]:
        is_roof = one["rival"].startswith("roof")
        floor = one["rival"] if is_roof else ""
        yield Figure(
            f"flat, {one['case']}",
            f"{one['ratio']:.2f} of {one['rival']}",
            floor,
            "" if is_roof else one["rival"],
            one["met"],
        )


def _of_step(out: Path) -> Iterator[Figure]:
    summary = _json(out / "step.json")["summary"]
    for side in ("plain", "safecl"):
        row = summary.get(side, {})
        if "problem" in row:
            yield Figure(f"7B step, {side}", "does not fit", met=None if side == "plain" else False)
        elif row:
            floor = f"{row['floor_seconds']} s of products" if "floor_seconds" in row else ""
            rate = f"{row['tokens_per_second']:,} tokens/s, MFU {row.get('mfu', 'unknown')}"
            yield Figure(f"7B step, {side}", f"{row['seconds']['whole step']} s, {rate}", floor)
    if "ratio" in summary:
        yield Figure("7B step, safecl over plain", f"{summary['ratio']}x", "", "DeepSpeed with its own Adam")
    if "memory" in summary:
        memory = summary["memory"]
        planned = f"{memory['planned'] / 2**30:.1f} GiB planned"
        yield Figure("7B step, peak", f"{memory['peak'] / 2**30:.1f} GiB", planned, met=memory["met"])


def _of_offload(out: Path) -> Iterator[Figure]:
    found = _json(out / "offload.json")["offload"]
    for tokens, share in found["added_share_of_a_step_at_tokens"].items():
        limit = found["limits"].get(tokens)
        floor, met = ("", None) if limit is None else (f"{limit:.0%}", share <= limit)
        yield Figure(f"offloaded anchor, Fisher, EMA at {int(tokens):,} tokens", f"{share:.1%}", floor, met=met)


def _of_teacher(out: Path) -> Iterator[Figure]:
    found = _json(out / "teacher.json")
    for one in found.get("passes", []):
        yield Figure(
            f"streamed teacher, {one['tokens']:,} tokens",
            f"{one['streamed_over_resident']:.2f}x",
            f"break-even at {found['break_even_tokens']:,} tokens",
            "resident weights",
        )


GPU_TESTS = "-m pytest -q -p no:cacheprovider -m gpu"
SECTIONS = [
    Section("environment", 15, "launch/gpu_environment.py {out}/environment.json",
            "launch/gpu_environment.py {out}/environment.json --dry", needed=True),
    Section("build", 35, "setup.py -q build_ext --inplace", "setup.py --version"),
    Section("engine-smoke", 90, "launch/engine_smoke.py --device cuda --out {out}/smoke.json",
            "launch/engine_smoke.py --device cpu --runs 2 --out {out}/smoke.json", _of_smoke),
    Section("flat-tests", 45, f"{GPU_TESTS} -n 6 tests/kernels/test_flat_gpu.py",
            f"{GPU_TESTS} tests/kernels/test_flat_gpu.py"),
    Section("head-tests", 110, f"{GPU_TESTS} -n 6 tests/kernels/test_head_gpu.py",
            f"{GPU_TESTS} tests/kernels/test_head_gpu.py"),
    Section("placement-and-teacher-tests", 40,
            f"{GPU_TESTS} -n 4 tests/engine/zero/test_placement_gpu.py tests/engine/zero/test_placement.py "
            "tests/engine/teachers/test_teacher_gpu.py",
            f"{GPU_TESTS} tests/engine/zero/test_placement_gpu.py tests/engine/zero/test_placement.py "
            "tests/engine/teachers/test_teacher_gpu.py"),
    Section("head", 75, "benchmarks/head.py --device cuda --repeats 8 --seconds 6 --shapes llama-3-8b --tokens 8192 "
            "--out {out}/head.json",
            "benchmarks/head.py --device cpu --threads 1 --repeats 1 --seconds 1 --toy --out {out}/head.json",
            _of_head),
    Section("flat", 75, "benchmarks/flat.py --device cuda --repeats 20 --seconds 25 --cases step ema "
            "--out {out}/flat.json",
            "benchmarks/flat.py --device cpu --threads 1 --numel 1e5 --repeats 1 --seconds 1 --cases step ema "
            "--out {out}/flat.json", _of_flat),
    Section("7b-step", 150, "benchmarks/engine_step.py --device cuda --model 7b --steps 3 --out {out}/step.json",
            "benchmarks/engine_step.py --model tiny --steps 1 --out {out}/step.json", _of_step),
    Section("reference-offload", 25, "benchmarks/reference.py --device cuda --only offload --weights 500000000 "
            "--out {out}/offload.json",
            "benchmarks/reference.py --device cpu --only offload --weights 100000 --tokens 512 2048 "
            "--out {out}/offload.json", _of_offload),
    Section("teacher", 60, "benchmarks/teacher.py --device cuda --tokens 2048 16384 --repeats 3 "
            "--out {out}/teacher.json",
            "benchmarks/teacher.py --device cpu --toy --out {out}/teacher.json", _of_teacher),
]  # fmt: skip


@dataclass
class Result:
    """The end of a section: passed, failed, or out of time."""

    section: str
    status: str
    seconds: float
    command: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""


class Suite:
    """The sections and what is known of them, in a folder."""

    def __init__(self, out: Path, *, dry: bool, fresh: bool):
        self.out, self.dry = out, dry
        self.path = out / "suite.json"
        out.mkdir(parents=True, exist_ok=True)
        known = [] if fresh or not self.path.is_file() else _json(self.path)["sections"]
        self.results = {one["section"]: Result(**one) for one in known}

    def run(self, sections: list[Section], deadline: float) -> bool:
        """Run the sections until the deadline; return whether all that ran have passed."""
        passed = True
        for section in sections:
            left, wanted = deadline - time.monotonic() - SPARE_SECONDS, section.seconds * (DRY if self.dry else 1)
            if left < min(wanted, 20):
                print(f"    {section.name} may take {wanted} s and {max(left, 0):.0f} s are left; call again")
                break
            result = self._run(section, min(wanted, left))
            # A section that was cut short by the end of this call is done again by the next.
            if result.status != "out of time" or left >= wanted:
                self.results[section.name] = result
                self.write()
            passed &= result.status == "passed"
            if section.needed and result.status != "passed":
                break
        return passed

    def _run(self, section: Section, seconds: float) -> Result:
        arguments = (section.dry if self.dry else section.command).replace("{out}", str(self.out)).split()
        command = [sys.executable, *_without_xdist(arguments)]
        print(f"==> {section.name} (at most {seconds:.0f} s): {' '.join(command[1:])}", flush=True)
        began = time.monotonic()
        with (self.out / f"{section.name}.log").open("w") as log:
            code = _call(command, self._environment(), log, seconds)
        took = round(time.monotonic() - began, 1)
        status = "passed" if code == 0 else "out of time" if code is None else "failed"
        result = Result(section.name, status, took, " ".join(command[1:]))
        if status != "passed":
            tail = (self.out / f"{section.name}.log").read_text(errors="replace").splitlines()[-15:]
            result.problem = tail[-1] if tail else ""
            print("\n".join(tail))
        try:
            result.figures = [asdict(figure) for figure in section.figures(self.out)]
        except (OSError, KeyError, ValueError, TypeError) as error:  # a section that failed may have written a part
            result.problem = result.problem or f"no figures: {error!r}"
            if status == "passed":
                result.status = "failed"
        print(f"    {result.status} after {took} s", flush=True)
        return result

    def _environment(self) -> dict[str, str]:
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu" if self.dry else "cuda",
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_ext")),
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(ROOT / ".torch_ext" / "triton")),
        }
        if self.dry:
            own["OMP_NUM_THREADS"] = "1"
        return {**os.environ, **own}

    def write(self) -> None:
        """Write suite.json and suite.md, after every section."""
        ordered = [self.results[s.name] for s in SECTIONS if s.name in self.results]
        text = json.dumps({"dry": self.dry, "sections": [asdict(one) for one in ordered]}, indent=2)
        self.path.write_text(text + "\n")
        (self.out / "suite.md").write_text(table(ordered))


def table(results: list[Result]) -> str:
    """One Markdown table of all figures."""
    lines = ["| figure | measured | floor | rival | met |", "|---|---|---|---|---|"]
    for result in results:
        if result.status != "passed" or not result.figures:
            end = f"{result.status}, {result.seconds:.0f} s"
            lines.append(f"| {result.section} | {end} | | | {_met(result.status == 'passed')} |")
        for figure in result.figures:
            cells = [figure["name"], figure["measured"], figure["floor"], figure["rival"], _met(figure["met"])]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _met(value: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[value]


def _without_xdist(arguments: list[str]) -> list[str]:
    """Return the arguments of pytest without `-n NUMBER` where pytest-xdist is not installed."""
    if "-n" not in arguments or importlib.util.find_spec("xdist") is not None:
        return arguments
    place = arguments.index("-n")
    return arguments[:place] + arguments[place + 2 :]


def _call(command: list[str], environment: dict[str, str], log: Any, seconds: float) -> int | None:
    """Run the command in a process group of its own; None where it took too long, and was ended with its children."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def install_wheels(folder: str) -> None:
    """Install the wheels that were carried to a machine without a network."""
    wheels = sorted(map(str, Path(folder).glob("*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="what is left for this call")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections, whether done before or not")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--list", action="store_true", help="print the sections")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if options.list:
        for section in SECTIONS:
            print(section.name, section.seconds, section.dry if options.dry else section.command)
        return 0
    names = [section.name for section in SECTIONS]
    if unknown := [name for name in options.only or () if name not in names]:
        print(f"no section {unknown[0]}; there are: {' '.join(names)}", file=sys.stderr)
        return 2
    suite = Suite(Path(os.environ.get("OUT", "runs/gpu-suite")).absolute(), dry=options.dry, fresh=options.fresh)
    if os.environ.get("WHEELS") and not suite.results:
        install_wheels(os.environ["WHEELS"])
    wanted = [s for s in SECTIONS if (s.name in options.only if options.only else s.name not in suite.results)]
    passed = suite.run(wanted, deadline)
    suite.write()
    print(f"{len(suite.results)} of {len(SECTIONS)} sections are done; results in {suite.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
