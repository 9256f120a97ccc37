"""The GPU suite: sections with a time limit each, which go on after a failure and resume where a call has stopped.

    launch/gpu_suite.sh --minutes 9.5        sections in order, as long as their time limits fit
    launch/gpu_suite.sh --minutes 2.5        the rest, in a second call
    launch/gpu_suite.sh --only flat-tests    these sections, whether done before or not
    launch/gpu_suite.sh --fresh              forget earlier results
    launch/gpu_suite.sh --archive FILE       keep all results in one .tar.gz as well, and go on from it
    launch/gpu_suite.sh --dry                the same commands at toy size on the CPU

Results are in $OUT (default runs/gpu-suite): a log and the JSON of each section, `suite.json`, and `suite.md`, one
table of figures with the columns measured, floor, rival and met. Exit status: 0 where all sections that ran have
passed, 2 for an unknown section, 1 otherwise. Needs torch 2.8 to 2.13 with its Triton, and no network: WHEELS may name
a folder of wheels that are installed first. COMMIT names the commit where the copy of the sources has no git history.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_figures import (
    Figures,
    counts_of_tests,
    of_flat,
    of_head,
    of_offload,
    of_run,
    of_smoke,
    of_step,
    of_teacher,
    of_tests,
    read_json,
)

ROOT = Path(__file__).parent.parent
DRY = 10
"""Factor of the time limits in a dry run: the machine may be small and busy."""
SPARE_SECONDS = 5.0
"""Of what is left, kept for writing the results."""


@dataclass(frozen=True)
class Section:
    """A command with a time limit. `{out}` is the folder of results; `dry` replaces the arguments of a dry run."""

    name: str
    seconds: int
    command: str
    dry: str
    figures: Figures = field(default=lambda out: iter(()))
    needed: bool = False
    """Whether nothing else can run where this fails."""
    makes: str = ""
    """A file that later sections need; where it is missing, on another machine, the section is not done."""

    def files(self, out: Path) -> Iterator[Path]:
        """Yield the result files that the command writes."""
        yield from (out / word.removeprefix("{out}/") for word in self.command.split() if word.startswith("{out}/"))


def tests_of(name: str, seconds: int, processes: int, *files: str) -> Section:
    """Return the section that runs the tests marked `gpu` in some files."""
    command = "-m pytest -q -p no:cacheprovider -m gpu"
    paths = " ".join(f"tests/{file}" for file in files)
    return Section(name, seconds, f"{command} -n {processes} {paths}", f"{command} {paths}", of_tests(name))


SECTIONS = [
    Section("environment", 20, "launch/gpu_environment.py {out}/environment.json",
            "launch/gpu_environment.py {out}/environment.json --dry", needed=True),
    Section("build", 30, "setup.py -q build_ext --inplace", "setup.py --version", makes="safecl/kernels/libsafecl.so"),
    Section("engine-smoke", 65, "launch/engine_smoke.py --device cuda --out {out}/smoke.json",
            "launch/engine_smoke.py --device cpu --runs 2 --out {out}/smoke.json", of_smoke),
    Section("whole-run", 65, "launch/whole_run.py --device cuda --out {out}/run.json",
            "launch/whole_run.py --device cpu --out {out}/run.json", of_run),
    tests_of("flat-tests", 60, 6, "kernels/test_flat_gpu.py"),
    tests_of("head-tests", 110, 6, "kernels/test_head_gpu.py"),
    tests_of("placement-and-teacher-tests", 45, 4, "engine/zero/test_placement_gpu.py",
             "engine/zero/test_placement.py", "engine/teachers/test_teacher_gpu.py"),
    Section("head", 80, "-m benchmarks.kernels.head --device cuda --repeats 8 --seconds 6 --shapes llama-3-8b "
            "--tokens 8192 --out {out}/head.json",
            "-m benchmarks.kernels.head --device cpu --threads 1 --repeats 1 --seconds 1 --toy --out {out}/head.json",
            of_head),
    Section("flat", 65, "-m benchmarks.kernels.flat --device cuda --repeats 20 --seconds 25 --cases step ema "
            "--out {out}/flat.json",
            "-m benchmarks.kernels.flat --device cpu --threads 1 --numel 1e5 --repeats 1 --seconds 1 --cases step ema "
            "--out {out}/flat.json", of_flat),
    Section("7b-step", 105, "-m benchmarks.engine.step --device cuda --model 7b --steps 3 --out {out}/step.json",
            "-m benchmarks.engine.step --model tiny --steps 1 --out {out}/step.json", of_step),
    Section("reference-offload", 35, "-m benchmarks.engine.reference --device cuda --only offload --weights 500000000 "
            "--out {out}/offload.json",
            "-m benchmarks.engine.reference --device cpu --only offload --weights 100000 --tokens 512 2048 "
            "--out {out}/offload.json", of_offload),
    Section("teacher", 40, "-m benchmarks.engine.teacher --device cuda --tokens 2048 16384 --repeats 3 "
            "--out {out}/teacher.json",
            "-m benchmarks.engine.teacher --device cpu --toy --out {out}/teacher.json", of_teacher),
]  # fmt: skip
"""In this order: what tells most in the least time comes first."""


@dataclass
class Result:
    """The end of a section: passed, failed, or out of time."""

    section: str
    status: str
    seconds: float
    command: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    commit: str = ""
    """The commit of the sources that were measured; empty where it is not known."""
    date: str = ""


class Suite:
    """The sections and what is known of them, in a folder."""

    def __init__(self, out: Path, *, dry: bool, fresh: bool, archive: Path | None = None):
        """archive: a file that holds all results as well; where it exists and the folder has none, they come from
        there."""
        self.out, self.dry, self.archive = out, dry, archive
        self.path = out / "suite.json"
        out.mkdir(parents=True, exist_ok=True)
        if archive is not None and archive.is_file() and not fresh and not self.path.is_file():
            with tarfile.open(archive) as packed:
                packed.extractall(out, filter="data")
        known = read_json(self.path) if self.path.is_file() and not fresh else {"dry": dry, "sections": []}
        # What a dry run has found says nothing about a GPU.
        self.results = {one["section"]: Result(**one) for one in known["sections"] if known["dry"] == dry}

    def is_done(self, section: Section) -> bool:
        """Return whether the section need not run again."""
        result = self.results.get(section.name)
        if result is None or (section.needed and result.status != "passed"):
            return False
        return not section.makes or (ROOT / section.makes).is_file()

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
        for file in section.files(self.out):
            file.unlink(missing_ok=True)  # figures of an earlier try are not this one's
        print(f"==> {section.name} (at most {seconds:.0f} s): {' '.join(command[1:])}", flush=True)
        log, environment, began = self.out / f"{section.name}.log", self._environment(), time.time()
        with log.open("w") as file:
            code = _call(command, environment, file, seconds)
        took = round(time.time() - began, 1)
        if code is None:
            _forget_locks(Path(environment["TORCH_EXTENSIONS_DIR"]), began)
        status = "passed" if code == 0 else "out of time" if code is None else "failed"
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        result = Result(section.name, status, took, " ".join(command[1:]), commit=commit(), date=now)
        self._read(section, result, log.read_text(errors="replace"))
        print(f"    {result.status} after {took} s", flush=True)
        return result

    def _read(self, section: Section, result: Result, log: str) -> None:
        """Add the figures of a section that has ended, also of a part of it, and what went wrong."""
        if result.status != "passed":
            tail = log.splitlines()[-15:]
            result.problem = tail[-1] if tail else ""
            print("\n".join(tail))
        try:
            for figure in section.figures(self.out):
                result.figures.append(asdict(figure))
        except (OSError, KeyError, ValueError, TypeError) as error:  # a section that failed may have written a part
            self._fail(result, f"no figures: {error!r}")
        if result.command.startswith("-m pytest") and not self.dry and not counts_of_tests(log).get("passed"):
            self._fail(result, "no test has run")

    @staticmethod
    def _fail(result: Result, problem: str) -> None:
        result.problem = result.problem or problem
        result.status = "failed" if result.status == "passed" else result.status

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
        """Write suite.json and suite.md, after every section, and the archive of all results."""
        ordered = [self.results[s.name] for s in SECTIONS if s.name in self.results]
        text = json.dumps({"dry": self.dry, "sections": [asdict(one) for one in ordered]}, indent=2)
        self.path.write_text(text + "\n")
        (self.out / "suite.md").write_text(table(ordered))
        if self.archive is not None:
            partial = self.archive.with_name(f".{self.archive.name}")
            with tarfile.open(partial, "w:gz") as packed:
                for path in sorted(self.out.glob("*.*")):
                    if path not in (partial, self.archive):
                        packed.add(path, path.name)
            partial.replace(self.archive)


def commit() -> str:
    """Return the short hash of the sources' commit, with a plus where files differ from it; empty without a history."""
    if named := os.environ.get("COMMIT"):
        return named[:7]
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


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


def _forget_locks(folder: Path, since: float) -> None:
    """Remove locks of extensions that were being compiled when a section was ended: torch waits for them for ever."""
    for lock in folder.glob("**/lock"):
        if lock.stat().st_mtime >= since:
            lock.unlink(missing_ok=True)


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
    parser.add_argument("--archive", type=Path, metavar="FILE", help="all results as one .tar.gz; goes on from it")
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
    out = Path(os.environ.get("OUT", "runs/gpu-suite")).absolute()
    suite = Suite(out, dry=options.dry, fresh=options.fresh, archive=options.archive and options.archive.absolute())
    if os.environ.get("WHEELS") and importlib.util.find_spec("deepspeed") is None:
        install_wheels(os.environ["WHEELS"])
    wanted = [s for s in SECTIONS if (s.name in options.only if options.only else not suite.is_done(s))]
    passed = suite.run(wanted, deadline)
    suite.write()
    print(f"{len(suite.results)} of {len(SECTIONS)} sections are done; results in {suite.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
