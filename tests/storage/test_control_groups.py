"""The tightest control group of a process is found in both versions, in groups of groups, and inside of containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from safecl.storage.control_groups import GroupMemory, tightest_group


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def version_1(folder: Path, limit: int, used: int, cache: int) -> None:
    files = {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used}
    write(folder, memory__stat=f"cache 5\ntotal_inactive_file {cache}", **files)


def version_2(folder: Path, limit: int | str, used: int, cache: int) -> None:
    write(folder, memory__max=limit, memory__current=used, memory__stat=f"anon 5\ninactive_file {cache}")


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ("4:memory:/slurm/job_7\n1:cpu:/\n", GroupMemory(900, 500)),  # a group above is tighter than its own
        ("4:memory:/slurm\n", GroupMemory(900, 500)),
        ("0::/user.slice/run.scope\n", GroupMemory(700, 650)),
        ("0::/user.slice\n", None),
        ("4:memory:/docker/of/the/host\n", GroupMemory(2000, 1300)),  # inside of a container only the root is seen
        ("", None),
    ],
)
def test_the_tightest_group_is_found(tmp_path, own, found):
    (tmp_path / "own").write_text(own)
    root = tmp_path / "cgroup"
    version_1(root / "memory", limit=2000, used=800, cache=100)
    version_1(root / "memory" / "slurm", limit=900, used=500, cache=100)
    version_1(root / "memory" / "slurm" / "job_7", limit=9223372036854771712, used=300, cache=100)
    version_2(root / "unified" / "user.slice", limit="max", used=50, cache=0)
    version_2(root / "unified" / "user.slice" / "run.scope", limit=700, used=60, cache=10)
    assert tightest_group(root, tmp_path / "own") == found


def test_where_there_are_no_groups_there_is_no_limit(tmp_path):
    assert tightest_group(tmp_path / "none", tmp_path / "none") is None
