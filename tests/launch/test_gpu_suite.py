"""The GPU suite on a machine without a GPU: its sections, their time limits, failures, and how it goes on."""

from __future__ import annotations

import dataclasses
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


gpu_figures, gpu_suite, pages = load("gpu_figures"), load("gpu_suite"), load("pages")
Figure, Section, Suite = gpu_figures.Figure, gpu_suite.Section, gpu_suite.Suite


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
            files = re.findall(r"(?:launch|tests)/\S+\.py|setup\.py", command)
            files += [f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (benchmarks\.\S+)", command)]
            assert files and all((ROOT / file).is_file() for file in files), command


def test_a_section_that_does_not_exist_is_refused_by_name(tmp_path):
    done = suite(tmp_path, "--only", "flat-test")
    assert done.returncode == 2 and "no section flat-test; there are: environment build engine-smoke" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_after_the_first_section_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    first = dataclasses.replace(gpu_suite.SECTIONS[0], seconds=100)
    made = Suite(tmp_path, dry=False, fresh=True)
    assert not made.run([first, *gpu_suite.SECTIONS[1:]], time.monotonic() + 600)
    assert "torch sees no CUDA device" in capsys.readouterr().out
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


def test_a_section_that_is_ended_while_it_compiles_leaves_no_lock(sections, tmp_path, monkeypatch):
    """torch's extensions wait for such a lock for ever."""
    extensions = tmp_path / "extensions"
    (extensions / "fused_adam").mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    other, own = extensions / "lock", extensions / "fused_adam" / "lock"
    other.touch()
    os.utime(other, (1, 1))  # somebody else's, from before
    (tmp_path / "compiles.py").write_text(f"open({str(own)!r}, 'w'); import time; time.sleep(600)")
    made = Suite(tmp_path / "out", dry=False, fresh=True)
    assert not made.run([Section("compiles", 2, f"{tmp_path}/compiles.py", "")], time.monotonic() + 600)
    assert made.results["compiles"].status == "out of time" and other.exists() and not own.exists()


def test_a_dry_run_in_the_same_folder_does_not_count_as_measured(sections, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "SECTIONS", sections)
    dry = Suite(tmp_path / "out", dry=True, fresh=True)
    dry.run([Section("fails", 60, "", f"{tmp_path}/fails.py")], time.monotonic() + 600)
    assert Suite(tmp_path / "out", dry=True, fresh=False).results
    assert not Suite(tmp_path / "out", dry=False, fresh=False).results


def test_an_archive_holds_all_results_and_another_machine_goes_on_from_it(sections, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "SECTIONS", sections[:2])
    archive = tmp_path / "results.tar.gz"
    first = Suite(tmp_path / "one machine", dry=False, fresh=True, archive=archive)
    first.run(sections[:2], time.monotonic() + 600)
    other = tmp_path / "another"
    again = Suite(other, dry=False, fresh=False, archive=archive)
    assert again.results == first.results and set(again.results) == {"fails", "figure"}
    assert (other / "fails.log").read_text() == "it broke\n" and (other / "suite.md").is_file()
    assert not Suite(tmp_path / "third", dry=False, fresh=True, archive=archive).results


def test_what_a_new_machine_lacks_is_made_again_and_a_machine_that_failed_is_looked_at_again(tmp_path):
    made = Suite(tmp_path, dry=False, fresh=True)
    ended = {name: gpu_suite.Result(name, "failed", 1.0, "") for name in ("environment", "build", "flat", "head")}
    made.results = ended | {"build": gpu_suite.Result("build", "passed", 1.0, "")}
    done = lambda name, **changes: made.is_done(Section(name, 1, "", "", **changes))  # noqa: E731
    assert done("flat") and done("build", makes="setup.py") and not done("environment", needed=True)
    assert not done("build", makes="safecl/kernels/no_library.so") and not done("teacher")


def test_a_section_of_tests_in_which_none_has_run_has_failed(tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.mark.skip\ndef test_it(): pass\n")
    (tmp_path / "test_two.py").write_text("def test_one(): pass\ndef test_two(): assert 0\n")
    made, dry = (Suite(tmp_path / str(dry), dry=dry, fresh=True) for dry in (False, True))
    for name, file in (("skipped", "test_it.py"), ("half", "test_two.py"), ("good", "test_two.py -k one")):
        command = f"-m pytest -q -p no:cacheprovider {tmp_path}/{file}"
        section = Section(name, 60, command, command, gpu_figures.of_tests(name))
        made.run([section], time.monotonic() + 600)
    dry.run([Section("skipped", 60, "", f"-m pytest -q -p no:cacheprovider {tmp_path}/test_it.py")],
            time.monotonic() + 600)  # fmt: skip
    assert made.results["skipped"].status == "failed" and made.results["skipped"].problem == "no test has run"
    shown = {name: (result.status, result.figures[0]["measured"], result.figures[0]["met"])
             for name, result in made.results.items()}  # fmt: skip
    assert shown["half"] == ("failed", "1 failed, 1 passed", False)
    assert shown["good"] == ("passed", "1 passed", True)
    assert dry.results["skipped"].status == "passed", "without a GPU all are skipped"


def test_figures_of_an_earlier_try_are_not_those_of_one_that_fails(tmp_path):
    (tmp_path / "fails.py").write_text("raise SystemExit(1)")
    (tmp_path / "run.json").write_text(json.dumps({"compared": 5, "differences": []}))
    made = Suite(tmp_path, dry=False, fresh=True)
    made.run([Section("whole-run", 60, f"{tmp_path}/fails.py {{out}}/run.json", "", gpu_figures.of_run)],
             time.monotonic() + 600)  # fmt: skip
    assert made.results["whole-run"].status == "failed" and made.results["whole-run"].figures == []


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
        "page_locked": {"locked": 38 * 2**30, "planned": 38 * 2**30, "met": True},
    }
}


def test_the_figures_of_a_step_show_measured_floor_rival_and_met(tmp_path):
    (tmp_path / "step.json").write_text(json.dumps(STEP))
    figures = [(f.name, f.measured, f.floor, f.rival, f.met) for f in gpu_figures.of_step(tmp_path)]
    assert figures[1] == (
        "7B step, safecl", "2.0 s, 8,000 tokens/s, MFU 0.36", "0.9 s of products", "", None,
    )  # fmt: skip
    assert figures[3] == ("7B step, peak", "130.0 GiB", "122.0 GiB planned", "", True)
    assert figures[4] == ("7B step, page-locked", "38.00 GiB", "38.00 GiB planned", "", True)


def test_the_figures_of_the_head_are_those_of_the_objectives_that_were_measured(tmp_path):
    rows = {"bare products": {"ms": 10.0}, "safecl": {"ms": 11.5}, "trl": {"ms": 30.0}, "naive torch": {"ms": 20.0}}
    slow = {"bare products": {"ms": 10.0}, "safecl": {"ms": 13.0}}
    objectives = {"KL": {"rows": rows}, "top-k + CE": {"rows": slow}}
    report = {"machine": {"gpu": "NVIDIA H200"}, "threads": 2, "llama-3-8b/8192": {"objectives": objectives}}
    (tmp_path / "head.json").write_text(json.dumps(report))
    assert [(f.name, f.measured, f.floor, f.rival, f.met) for f in gpu_figures.of_head(tmp_path)] == [
        (
            "head, KL",
            "11.50 ms, 1.15x of bare products",
            "1.2x of 10.00 ms",
            "naive torch 20.00 ms, trl 30.00 ms",
            True,
        ),
        ("head, top-k + CE", "13.00 ms, 1.30x of bare products", "1.2x of 10.00 ms", "", False),
    ]


def test_whole_runs_that_leave_other_bytes_are_named():
    whole_run = load("whole_run")
    whole = {"metrics": [{"loss": 1.0}, {"loss": 2.0}], "models": {"model/a": b"12", "model/b": b"3"}, "outputs": {}}
    assert whole_run.differences(whole, whole) == []
    other = whole | {"metrics": [{"loss": 1.0}, {"loss": 2.5}, {"loss": 3.0}], "models": {"model/a": b"13"}}
    assert whole_run.differences(whole, other) == ["metrics/1", "metrics/2", "models/model/a", "models/model/b"]


def test_pages_keep_a_suite_and_refuse_a_dry_run(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    machine = {"gpus": [{"name": "NVIDIA H200"}], "torch": "2.11", "triton": "3.6", "deepspeed": "0.19.8"}
    (folder / "environment.json").write_text(json.dumps(machine))
    figures = [gpu_suite.asdict(Figure("rate", "0.95"))]
    one = gpu_suite.Result("flat", "passed", 3.0, "-m benchmarks.kernels.flat", figures)
    one.date, one.commit = "2030-01-02 10:00 UTC", "abc1234"
    content = {"dry": False, "sections": [gpu_suite.asdict(one)]}
    (folder / "suite.json").write_text(json.dumps(content))
    (folder / "flat.json").write_text("{}")
    assert pages.text(tmp_path / "kept.json") == "Not measured yet."
    pages.keep(folder, tmp_path / "kept.json")
    assert "NVIDIA H200; torch 2.11" in pages.text(tmp_path / "kept.json")
    assert "| rate | 0.95 |  |  |  |" in pages.text(tmp_path / "kept.json")
    assert (tmp_path / "flat-cuda.json").read_text() == "{}"
    later = gpu_suite.Result("build", "passed", 2.0, "setup.py", commit="def5678", date="2030-01-03 09:00 UTC")
    (folder / "suite.json").write_text(json.dumps({"dry": False, "sections": [gpu_suite.asdict(later)]}))
    pages.keep(folder, tmp_path / "kept.json")
    dates = "2030-01-03, commit def5678: build; 2030-01-02, commit abc1234: flat."
    assert dates in pages.text(tmp_path / "kept.json"), "a section that was not measured again stays, with its commit"
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
