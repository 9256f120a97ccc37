"""Real runs without room: little memory, few open files, no home, no place for temporary files, full disks, a small
/dev/shm, a run folder that vanishes, a launcher that is killed. Each ends in a message without a traceback, and what
was saved is loaded again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from safecl.distributed import environment
from tests.commands.processes import ROOT

pytestmark = pytest.mark.long
VARIABLES = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture
def config(task_config, tmp_path) -> Path:
    return task_config(
        tasks=[{"name": "task", "train": str(tmp_path / "rows.jsonl")}],
        memory=None, methods={}, safety=None, train={"max_steps": 6}, checkpoint={"every": 2, "keep": 1},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def rows(tmp_path):
    lines = (json.dumps({"prompt": f"Is {n} good?", "completion": "Yes, it is good."}) + "\n" for n in range(60))
    (tmp_path / "rows.jsonl").write_text("".join(lines))


def train(config: Path, *overrides: str, before: str = "", **variables: str | None) -> tuple[int, str]:
    """(exit code, what it says) of a run in a shell, after the commands `before`. A `mount` is its own."""
    chosen = {key: value for key, value in (os.environ | VARIABLES | variables).items() if value is not None}
    words = [sys.executable, "-m", "safecl", "train", str(config), *overrides]
    apart = ["unshare", "-m"] if before.startswith("mount") else []
    command = [*apart, "bash", "-c", f"{before}\nexec {shlex.join(words)}"]
    done = subprocess.run(command, cwd=ROOT, env=chosen, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


def as_root() -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounts need root")


@pytest.mark.parametrize("kilobytes", [500_000, 1_500_000, 3_300_000, 3_500_000, 3_800_000])
def test_a_limit_of_address_space_is_a_message_with_its_number(config, kilobytes):
    code, said = train(config, before=f"ulimit -v {kilobytes}")
    assert code in (0, 1, 2) and "Traceback" not in said, said[-2000:]
    assert code == 0 or f"{kilobytes * 1024 / 1e9:.1f} GB" in said or f"{kilobytes * 1024 / 1e6:.1f} MB" in said
    assert code != 1 or ("are available" in said and "the run takes about" in said), said[-2000:]


@pytest.fixture
def control_group():
    """Make a control group with so many MB, as the shell command that joins it."""
    made: list[Path] = []

    def make(megabytes: int) -> str:
        root = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").is_dir() else Path("/sys/fs/cgroup")
        limit = "memory.limit_in_bytes" if root.name == "memory" else "memory.max"
        folder = root / f"safecl-test-{os.getpid()}-{megabytes}"
        try:
            folder.mkdir()
            made.append(folder)
            (folder / limit).write_text(str(megabytes * 2**20))
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        return f"echo $$ > {folder}/cgroup.procs"

    yield make
    for folder in made:
        folder.rmdir()


def test_a_control_group_that_is_too_small_is_named_before_the_system_kills_the_run(config, control_group):
    code, said = train(config, "checkpoint.every=2", before=control_group(500))
    assert "of host memory are needed and" in said and "the control group allows 524.3 MB" in said, said[-2000:]
    assert code in (0, 1, -signal.SIGKILL, 128 + signal.SIGKILL) and "Traceback" not in said
    code, said = train(config, "checkpoint.every=2", before=control_group(3000))
    assert code == 0 and "the control group" not in said, said[-2000:]


@pytest.mark.parametrize(("files", "code"), [(24, 2), (100, 2), (128, 0)])
def test_few_open_files_suffice_or_are_refused(config, files, code):
    ended, said = train(config, before=f"ulimit -n {files}")
    assert ended == code, said[-2000:]
    assert code == 0 or f"only {files} files" in said


def test_no_home_and_no_cache_is_refused_and_a_named_cache_suffices(config, tmp_path):
    code, said = train(config, HOME="/proc/none", SAFECL_CACHE=None)
    assert code == 2 and "set SAFECL_CACHE to a folder" in said
    code, said = train(config, HOME="/proc/none", SAFECL_CACHE=str(tmp_path / "cache"))
    assert code == 0, said[-2000:]


def test_a_home_that_cannot_be_written_is_refused_and_a_named_cache_suffices(config, tmp_path):
    as_root()
    (tmp_path / "home").mkdir()
    for cache, code in ((None, 2), (str(tmp_path / "cache"), 0)):
        mount = f"mount -t tmpfs -o ro tmpfs {tmp_path}/home"
        ended, said = train(config, before=mount, HOME=str(tmp_path / "home"), SAFECL_CACHE=cache)
        assert ended == code and (code == 0 or "set SAFECL_CACHE to a folder" in said), said[-2000:]


@pytest.mark.parametrize("kilobytes", [64, 1000])
def test_a_full_folder_for_temporary_files_is_no_obstacle_or_is_named(config, tmp_path, kilobytes):
    as_root()
    (tmp_path / "tmp").mkdir()
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {tmp_path}/tmp; head -c 60000 /dev/zero > {tmp_path}/tmp/full"
    code, said = train(config, before=mount, TMPDIR=str(tmp_path / "tmp"))
    assert code in (0, 1, 2) and "Traceback" not in said, said[-2000:]
    assert code == 0 or "No space left" in said or "no folder for temporary files" in said, said[-2000:]


@pytest.mark.parametrize("kilobytes", [8, 40, 120])
def test_a_full_disk_of_the_cache_ends_in_a_message_and_a_larger_one_suffices(config, tmp_path, kilobytes):
    as_root()
    cache = tmp_path / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(cache)], check=True)
    try:
        code, said = train(config, SAFECL_CACHE=str(cache))
        assert code in (0, 1, 2) and "Traceback" not in said, said[-2000:]
        assert code == 0 or (str(cache) in said and "No space left" in said), said[-2000:]
        subprocess.run(["mount", "-o", "remount,size=90m", str(cache)], check=True)
        code, said = train(config, SAFECL_CACHE=str(cache))
        assert code == 0, said[-2000:]
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_no_place_for_temporary_files_is_refused(config):
    as_root()
    if ROOT.is_relative_to("/tmp"):
        pytest.skip("this checkout lies in /tmp, which is hidden here")
    hidden = "mount -t tmpfs -o ro tmpfs /tmp; mount -t tmpfs -o ro tmpfs /var/tmp; mount -t tmpfs -o ro tmpfs /usr/tmp"
    inner = f"{hidden}; cd /proc; {sys.executable} -m safecl env"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", inner], env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": "/proc/none"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "no folder for temporary files can be written" in done.stderr, done.stderr[-2000:]


def test_a_dev_shm_of_1_mb_is_no_obstacle(config):
    as_root()
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    words += [str(environment.free_port()), "-m", "safecl", "train", str(config)]
    small = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && {shlex.join(words)}"
    command, variables = ["unshare", "-m", "bash", "-c", small], os.environ | VARIABLES
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("megabytes", [1, 14, 20, 26, 32, 45])
def test_a_full_disk_ends_in_a_message_and_the_run_resumes_on_a_larger_one(config, tmp_path, megabytes):
    """A checkpoint takes 13 MB, a model folder 4."""
    as_root()
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)], check=True)
    try:
        code, said = train(config, f"output={disk / 'run'}")
        assert code in (0, 1, 2) and "Traceback" not in said, said[-2000:]
        assert code == 0 or "MB are free" in said or "No space left" in said, said[-2000:]
        subprocess.run(["mount", "-o", "remount,size=90m", str(disk)], check=True)
        code, said = train(config, f"output={disk / 'run'}")
        assert code == 0, said[-2000:]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(config, tmp_path):
    as_root()
    place = tmp_path / "fixed"
    place.mkdir()
    code, said = train(config, f"output={place}/run", before=f"mount -t tmpfs -o ro none {place}")
    assert code == 2 and str(place) in said and "Traceback" not in said, said[-2000:]


def test_a_run_folder_that_vanishes_ends_the_run_with_its_name(config, tmp_path):
    tree = yaml.safe_load(config.read_text())
    command = [sys.executable, "-m", "safecl", "train", str(config), "train.max_steps=40"]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | VARIABLES, **streams)
    folder, deadline = Path(tree["output"]), time.monotonic() + 200
    while not (folder / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in said
    assert "has vanished" in said and str(folder) in said


def test_ranks_whose_launcher_is_killed_save_and_end(config, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    words += [str(environment.free_port()), "-m", "safecl", "train", str(config), "train.max_steps=100000"]
    words += ["checkpoint.every=never"]
    output = tmp_path / "said"
    with output.open("w") as file:
        launcher = subprocess.Popen(words, cwd=ROOT, env=os.environ | VARIABLES, stdout=file, stderr=file)
    metrics, deadline = Path(yaml.safe_load(config.read_text())["output"]) / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and launcher.poll() is None, output.read_text()[-2000:]
        time.sleep(0.05)
    ranks = [int(name) for name in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    assert len(ranks) == 2
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, output.read_text()[-2000:]
        time.sleep(0.1)
    assert "the launcher has ended: finishing this step and saving" in output.read_text()
    assert (metrics.parent / "checkpoints" / "latest").exists()
    code, said = train(config, "train.max_steps=100000", "checkpoint.every=never", before="ulimit -t 1")
    assert code != 0
    assert "in use by" not in said
