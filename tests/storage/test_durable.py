"""Files of arrays: every damage is refused by name, or changes no value."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

import safecl
from safecl.storage.durable import DamagedCheckpoint, map_array, read_arrays, write_arrays

ARRAYS = {
    "values": np.arange(6, dtype=np.float32),
    "counts": np.array([2, 4], np.int32),
}


@pytest.fixture
def path(tmp_path) -> Path:
    write_arrays(tmp_path / "scores" / "a.npz", ARRAYS)
    return tmp_path / "scores" / "a.npz"


def test_arrays_are_read_as_they_were_written_and_the_file_is_replaced_whole(path):
    for _ in range(2):
        found = read_arrays(path, ARRAYS)
        assert all(np.array_equal(found[name], value) for name, value in ARRAYS.items()) and len(found) == 2
        write_arrays(path, ARRAYS)
    assert [each.name for each in path.parent.iterdir()] == ["a.npz"]


def test_a_file_of_arrays_that_is_cut_anywhere_or_gone_is_refused_by_name(path):
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpoint, match=r"a\.npz"):
            read_arrays(path, ARRAYS)
    path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"a\.npz: No such file"):
        read_arrays(path, ARRAYS)


def test_a_flipped_bit_in_a_file_of_arrays_changes_no_value(path):
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        for bit in (1, 0x80):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                found = read_arrays(path, ARRAYS)
            except DamagedCheckpoint:
                refused += 1
            else:
                assert all(np.array_equal(found[name], value) for name, value in ARRAYS.items()), place
    assert refused > len(whole)


def test_a_file_of_arrays_holds_no_pickle_and_nothing_compressed_and_all_names(path, tmp_path):
    for write, said in (
        (lambda file: np.savez(file, values=np.array([{}], object)), "pickle"),
        (lambda file: np.savez_compressed(file, values=np.zeros(10**6)), "compressed"),
        (lambda file: np.savez(file, other=np.zeros(1)), "values"),
        (lambda file: np.save(file, np.zeros(1)), "not a zip"),
    ):
        with path.open("wb") as file:
            write(file)
        with pytest.raises(DamagedCheckpoint, match=said):
            read_arrays(path, ["values"])
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint):
        read_arrays(path, ["values"])


def test_a_mapped_array_that_is_cut_anywhere_or_an_archive_is_refused_by_name(tmp_path):
    path = tmp_path / "index.npy"
    np.save(path, np.arange(6).reshape(2, 3))
    whole = path.read_bytes()
    assert np.array_equal(map_array(path), np.arange(6).reshape(2, 3))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpoint, match=r"index\.npy"):
            map_array(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"")
    with pytest.raises(DamagedCheckpoint, match="not an array"):
        map_array(path)


def test_no_other_module_reads_or_writes_files_of_arrays():
    named = [path.name for path in Path(safecl.__file__).parent.rglob("*.py") if "np.load(" in path.read_text()]
    assert named == ["durable.py"]
