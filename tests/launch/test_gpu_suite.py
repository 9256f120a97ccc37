"""The GPU suite on a machine without a GPU: its sections, their time limits, failures, and how it goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_suite, pages = load("gpu_suite"), load("pages")
Figure, Section, Suite = gpu_suite.Figure, gpu_suite.Section, gpu_suite.Suite


def suite(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [ROOT / "launch/gpu_suite.sh", *arguments], env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_all_sections_fit_twelve_minutes_and_run_files_that_exist():
    assert sum(section.seconds for section in gpu_suite.SECTIONS) <= 12 * 60
    assert len({section.name for section in gpu_suite.SECTIONS}) == len(gpu_suite.SECTIONS)
    for section in gpu_suite.SECTIONS:
        for command in (section.command, section.dry):
            files = re.findall(r"(?:launch|tests|benchmarks)/\S+\.py|setup\.py", command)
            assert files and all((ROOT / file).is_file() for file in files), command


def test_a_section_that_does_not_exist_is_refused_by_name(tmp_path):
    done = suite(tmp_path, "--only", "flat-test")
    assert done.returncode == 2 and "no section flat-test; there are: environment build engine-smoke" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_after_the_first_section_and_says_why(tmp_path):
    done = suite(tmp_path)
    assert done.returncode == 1 and "torch sees no CUDA device" in done.stdout
    sections = json.loads((tmp_path / "suite.json").read_text())["sections"]
    assert [(s["section"], s["status"]) for s in sections] == [("environment", "failed")]


@pytest.fixture
def sections(tmp_path) -> list:
    """Three sections: one fails, one has a figure, one sleeps for ever with a child that does, too."""
    (tmp_path / "fails.py").write_text("print('it broke'); raise SystemExit(3)")
    (tmp_path / "figure.py").write_text("import sys; open(sys.argv[1], 'w').write('0.95')")
    (tmp_path / "sleeps.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)"
    )

    def figures(out: Path):
        yield Figure("rate", (out / "figure").read_text(), "copy", "torch", True)

    return [
        Section("fails", 60, f"{tmp_path}/fails.py", ""),
        Section("figure", 60, f"{tmp_path}/figure.py {{out}}/figure", "", figures),
        Section("sleeps", 3, f"{tmp_path}/sleeps.py {{out}}/child", ""),
    ]


def test_it_goes_on_after_a_failure_and_ends_a_section_with_its_children_when_its_time_is_over(sections, tmp_path):
    made = Suite(tmp_path / "out", dry=False, fresh=True)
    assert not made.run(sections, time.monotonic() + 600)
    found = {name: (result.status, result.problem) for name, result in made.results.items()}
    assert found["fails"] == ("failed", "it broke") and found["figure"] == ("passed", "")
    assert found["sleeps"][0] == "out of time"
    child = int((tmp_path / "out" / "child").read_text())
    assert ends(child)
    rows = gpu_suite.table(list(made.results.values())).splitlines()
    assert rows[0] == "| figure | measured | floor | rival | met |" and "| rate | 0.95 | copy | torch | yes |" in rows
    assert re.fullmatch(r"\| fails \| failed, \d+ s \| \| \| no \|", rows[2])


def test_a_second_call_goes_on_where_the_first_stopped(sections, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "SECTIONS", sections[:2])
    first = Suite(tmp_path / "out", dry=False, fresh=True)
    first.run(sections[:1], time.monotonic() + 600)
    first.run(sections[1:2], time.monotonic() + 10)  # too little is left: nothing begins
    again = Suite(tmp_path / "out", dry=False, fresh=False)
    assert set(again.results) == {"fails"}
    assert again.run([s for s in sections[:2] if s.name not in again.results], time.monotonic() + 600)
    assert set(Suite(tmp_path / "out", dry=False, fresh=False).results) == {"fails", "figure"}


def test_a_section_that_the_end_of_a_call_cuts_short_is_done_again(sections, tmp_path):
    made = Suite(tmp_path / "out", dry=False, fresh=True)
    slow = Section("sleeps", 60, sections[2].command, "")
    gpu_suite_spare, gpu_suite.SPARE_SECONDS = gpu_suite.SPARE_SECONDS, -20.0
    try:
        made.run([slow], time.monotonic() - 17)  # three seconds
    finally:
        gpu_suite.SPARE_SECONDS = gpu_suite_spare
    assert not made.results


def test_without_xdist_tests_run_in_one_process(monkeypatch):
    arguments = ["-m", "pytest", "-m", "gpu", "-n", "6", "tests/kernels/test_flat_gpu.py"]
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None)
    assert gpu_suite._without_xdist(arguments) == ["-m", "pytest", "-m", "gpu", "tests/kernels/test_flat_gpu.py"]
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: name)
    assert gpu_suite._without_xdist(arguments) == arguments


def test_continuous_integration_runs_the_suite_at_toy_size():
    assert "gpu-dry" in (ROOT / ".ci/run").read_text() and "gpu-dry" in (ROOT / ".github/workflows/ci.yml").read_text()


def test_a_section_whose_results_cannot_be_read_has_failed(tmp_path):
    (tmp_path / "nothing.py").write_text("")
    made = Suite(tmp_path / "out", dry=False, fresh=True)
    figures = gpu_suite.SECTIONS[-1].figures
    assert not made.run([Section("teacher", 60, f"{tmp_path}/nothing.py", "", figures)], time.monotonic() + 600)
    assert made.results["teacher"].status == "failed" and "no figures" in made.results["teacher"].problem


def ends(process: int, seconds: float = 30.0) -> bool:
    """Whether a process is gone, or about to be: signals take a moment on a busy machine."""
    deadline, state = time.monotonic() + seconds, Path(f"/proc/{process}/stat")
    while time.monotonic() < deadline:
        try:
            if state.read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


STEP = {
    "summary": {
        "plain": {"tokens_per_second": 9000, "mfu": 0.4, "floor_seconds": 0.9, "seconds": {"whole step": 1.8}},
        "safecl": {"tokens_per_second": 8000, "mfu": 0.36, "floor_seconds": 0.9, "seconds": {"whole step": 2.0}},
        "ratio": 1.11,
        "memory": {"peak": 130 * 2**30, "planned": 122 * 2**30, "met": True},
    }
}


def test_the_figures_of_a_step_show_measured_floor_rival_and_met(tmp_path):
    (tmp_path / "step.json").write_text(json.dumps(STEP))
    figures = [(f.name, f.measured, f.floor, f.rival, f.met) for f in gpu_suite._of_step(tmp_path)]
    assert figures[1] == (
        "7B step, safecl", "2.0 s, 8,000 tokens/s, MFU 0.36", "0.9 s of products", "", None,
    )  # fmt: skip
    assert figures[3] == ("7B step, peak", "130.0 GiB", "122.0 GiB planned", "", True)


def test_pages_keep_a_suite_and_refuse_a_dry_run(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    machine = {"gpus": [{"name": "NVIDIA H200"}], "torch": "2.11", "triton": "3.6", "deepspeed": "0.19.8"}
    (folder / "environment.json").write_text(json.dumps(machine))
    one = gpu_suite.Result("flat", "passed", 3.0, "benchmarks/flat.py", [gpu_suite.asdict(Figure("rate", "0.95"))])
    content = {"dry": False, "sections": [gpu_suite.asdict(one)]}
    (folder / "suite.json").write_text(json.dumps(content))
    assert pages.text(tmp_path / "kept.json") == "Not measured yet."
    pages.keep(folder, tmp_path / "kept.json")
    assert "NVIDIA H200; torch 2.11" in pages.text(tmp_path / "kept.json")
    assert "| rate | 0.95 |  |  |  |" in pages.text(tmp_path / "kept.json")
    (folder / "suite.json").write_text(json.dumps({**content, "dry": True}))
    with pytest.raises(SystemExit, match="a dry run"):
        pages.keep(folder, tmp_path / "kept.json")


def test_the_page_shows_what_is_kept():
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert page.split("<!-- gpu -->\n")[1].split("\n<!-- end -->")[0] == pages.text()


@pytest.mark.long
def test_every_section_runs_at_toy_size_on_the_cpu(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "launch/gpu_suite.sh", "--dry", "--minutes", "30"], env=env, check=False)
    assert done.returncode == 0
    statuses = {s["section"]: s["status"] for s in json.loads((tmp_path / "suite.json").read_text())["sections"]}
    assert statuses == {section.name: "passed" for section in gpu_suite.SECTIONS}
