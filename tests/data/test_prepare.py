"""A file is prepared once, by one process under a lock, mapped afterwards, and never half written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from safecl.data import DataError, concat, mix_poison, prepare, prepare_dataset, tokens
from safecl.data.tokens import row_key
from tests.data import tokenizers as tk


def write(folder, num_rows=50, word="q", name="rows.jsonl") -> str:
    rows = [{"id": i, "prompt": f"{word} {i} " * (1 + i % 7), "completion": f"answer {i}"} for i in range(num_rows)]
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / name)


@pytest.fixture
def prepared(tmp_path):
    """prepared(path, **changes): a data set in this test's own cache."""
    tokenizer = tk.byte_level()

    def call(path, **changes):
        settings = {"tokenizer": tokenizer, "max_length": 64, "cache_dir": tmp_path / "cache", **changes}
        return prepare_dataset(path, **settings)

    return call


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Sizes of the batches that were tokenised."""
    sizes: list[int] = []

    def counting(tokenizer, rows, max_length, do=prepare.tokenize_rows):
        sizes.append(len(rows))
        return do(tokenizer, rows, max_length)

    monkeypatch.setattr(prepare, "tokenize_rows", counting)
    return sizes


def test_rows_stand_in_columns_in_the_order_of_the_file(tmp_path, prepared):
    data = prepared(write(tmp_path))
    assert len(data) == 50 and data.lines.tolist() == list(range(1, 51))
    assert data.row_ids.dtype == np.uint64 and len(np.unique(data.row_ids)) == 50 and data.row_ids.max() < 2**63
    tokenizer = tk.byte_level()
    for i in (0, 13, 49):
        row = data.row(i)
        assert len(row) == data.lengths[i] and row.num_targets == data.num_targets[i] and row.row_id == data.row_ids[i]
        assert row.input_ids.dtype == np.int32 and row.loss_mask.dtype == bool
        assert tokenizer.decode(row.input_ids[row.loss_mask]) == f"answer {i}<|im_end|>"
        assert data.tags(i) == {"id": str(i)} and data.path(i).endswith("rows.jsonl")
    assert data.num_tokens == data.lengths.sum() and 0 < data.supervised_share < 1
    with pytest.raises(IndexError):
        data.row(50)


def test_batches_of_any_size_give_the_same_arrays(tmp_path, prepared, monkeypatch):
    path = write(tmp_path)
    whole = prepared(path)
    monkeypatch.setattr(prepare, "_BATCH", 7)
    parts = prepared(path, cache_dir=tmp_path / "other")
    for name, array in whole._stores[0].arrays.items():
        assert np.array_equal(array, parts._stores[0].arrays[name]), name


def test_a_second_call_maps_the_files_and_tokenises_nothing(tmp_path, prepared, counted):
    path = write(tmp_path)
    first = prepared(path)
    assert counted == [50]
    second = prepared(path)
    assert counted == [50] and second.key == first.key
    arrays = second._stores[0].arrays
    assert all(isinstance(array, np.memmap) for array in arrays.values())
    with pytest.raises(ValueError, match="read-only"):
        second.row(0).input_ids[0] = 1


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 40},
        {"max_rows": 10},
        {"tokenizer": tk.byte_level(tk.THINKING)},
        {"tokenizer": tk.metaspace()},
        "content",
    ],
)
def test_whatever_changes_the_result_is_prepared_anew(tmp_path, prepared, counted, change):
    path = write(tmp_path)
    first = prepared(path)
    if change == "content":
        write(tmp_path, word="other")
    second = prepared(path, max_bad_rows=0.99, **({} if change == "content" else change))
    assert len(counted) == 2 and second.key != first.key


def test_row_ids_survive_the_loss_of_other_rows_and_tell_equal_rows_apart(tmp_path, prepared):
    lines = [json.dumps({"prompt": p, "completion": "c"}) for p in ("a", "b", "a", "c", "a")]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    (tmp_path / "few.jsonl").write_text("\n".join(lines[2:]))
    whole, few = prepared(str(tmp_path / "all.jsonl")), prepared(str(tmp_path / "few.jsonl"))
    a0, b, a1, c, a2 = whole.row_ids.tolist()
    assert len({a0, b, a1, c, a2}) == 5
    assert few.row_ids.tolist() == [a0, c, a1]


def test_bad_and_cut_rows_are_counted_in_the_report_of_every_call(tmp_path, prepared):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "q", "completion": "the movie was slow " * 9})
    lost = json.dumps({"prompt": "the movie " * 99, "completion": "a"})
    path.write_text("\n".join([good, "{", lost, json.dumps({"prompt": "q", "completion": "a"})]))
    for _ in range(2):
        data = prepared(str(path), max_length=20, max_bad_rows=2)
        report = data.reports[0]
        assert (len(data), report.seen, report.bad, report.truncated, report.max_length) == (2, 4, 2, 1, 20)
        assert "rows.jsonl:2: not valid JSON" in report.examples[0]
        assert "rows.jsonl:3: no supervised token is left, cut to max_length 20" in report.examples[1]
    with pytest.raises(DataError, match="2 of 4 rows"):
        prepared(str(path), max_length=20, max_bad_rows=1)
    with pytest.raises(DataError, match="2 of 4 rows"):
        prepared(str(path), max_length=20, max_bad_rows=1, cache_dir=tmp_path / "new")


def test_max_rows_are_taken_evenly(tmp_path, prepared):
    assert prepared(write(tmp_path), max_rows=5).lines.tolist() == [1, 11, 21, 31, 41]


def test_data_without_supervised_tokens_is_refused(tmp_path, prepared):
    path = write(tmp_path)
    with pytest.raises(DataError, match=r"(?s)none of the 50 rows.*no supervised token"):
        prepared(path, max_length=4, max_bad_rows=1000)
    assert not list((tmp_path / "cache").glob("rows-*/"))


def test_a_template_without_the_prefix_property_stops_before_anything_is_kept(tmp_path, prepared):
    with pytest.raises(DataError, match="chat template"):
        prepared(write(tmp_path), tokenizer=tk.byte_level(tk.NO_PREFIX))
    assert not list((tmp_path / "cache").glob("rows-*/"))


@pytest.mark.parametrize("harm", ["truncate", "remove", "foreign", "meta", "empty folder"])
def test_a_torn_cache_is_prepared_anew(tmp_path, prepared, counted, harm):
    path = write(tmp_path)
    before = prepared(path).row(3).input_ids.tolist()
    folder = next((tmp_path / "cache").glob("rows-*/"))
    if harm == "truncate":
        with (folder / "tokens.npy").open("r+b") as file:
            file.truncate(200)
    elif harm == "remove":
        (folder / "lines.npy").unlink()
    elif harm == "foreign":
        np.save(folder / "lines.npy", np.arange(7))
    elif harm == "meta":
        (folder / "meta.json").write_text('{"sizes": ')
    else:
        for file in folder.iterdir():
            file.unlink()
    assert prepared(path).row(3).input_ids.tolist() == before and counted == [50, 50]


def test_nothing_in_the_cache_can_run_code(tmp_path, prepared):
    path = write(tmp_path)
    prepared(path)
    folder = next((tmp_path / "cache").glob("rows-*/"))
    assert {p.suffix for p in folder.iterdir()} == {".npy", ".json"}
    evil = np.array([{"a": 1}] * 3, dtype=object)
    np.save(folder / "evil.npy", evil, allow_pickle=True)
    (folder / "evil.npy").rename(folder / "lines.npy")
    meta = json.loads((folder / "meta.json").read_text())
    meta["sizes"]["lines"] = (folder / "lines.npy").stat().st_size
    (folder / "meta.json").write_text(json.dumps(meta))
    data = prepared(path)
    assert data.lines.tolist() == list(range(1, 51)), "a pickled array must be refused and prepared anew"


def test_where_another_node_was_faster_its_files_stay(tmp_path, prepared, monkeypatch):
    path = write(tmp_path)
    theirs = prepared(path)
    folder = next((tmp_path / "cache").glob("rows-*/"))
    inode = (folder / "tokens.npy").stat().st_ino
    seen = iter([None, None])  # as if the other node had not published yet when this one looked
    monkeypatch.setattr(prepare, "_map", lambda f, do=prepare._map: next(seen, "real") and do(f))
    assert prepared(path).key == theirs.key
    assert (folder / "tokens.npy").stat().st_ino == inode and not list((tmp_path / "cache").glob("*.part-*"))


def test_the_largest_id_is_known_for_a_check_against_the_vocabulary(tmp_path, prepared):
    data = prepared(write(tmp_path))
    assert data.max_token_id == max(int(data.row(i).input_ids.max()) for i in range(50))


def test_a_cache_folder_that_cannot_be_written_is_a_message(tmp_path, prepared):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept here"):
        prepared(write(tmp_path), cache_dir=tmp_path / "file" / "cache")


# ---------------------------------------------------------------------------------------------------- several processes

SCRIPT = """
import os, pathlib, sys, time
from safecl.data import prepare, prepare_dataset
from tests.data import tokenizers as tk
folder, kill = pathlib.Path(sys.argv[1]), sys.argv[2] == "kill"
do = prepare.tokenize_rows
def tokenize_rows(tokenizer, rows, max_length):
    with (folder / "tokenised").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    if kill:
        os.kill(os.getpid(), 9)
    return do(tokenizer, rows, max_length)
prepare.tokenize_rows = tokenize_rows
tokenizer = tk.byte_level()
(folder / f"ready-{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
data = prepare_dataset(str(folder / "rows.jsonl"), tokenizer=tokenizer, max_length=64, cache_dir=folder / "cache")
print(data.key, data.num_tokens, int(data.row(49).input_ids.sum()))
"""


def start(folder, mode: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_three_processes_tokenise_once_and_map_the_same_files(tmp_path):
    write(tmp_path)
    ranks = [start(tmp_path, "work") for _ in range(3)]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / "go").touch()
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1 and outputs[0][0].split()[1].isdigit()
    assert (tmp_path / "tokenised").read_text() == "x"


def test_a_process_killed_while_it_tokenises_leaves_neither_lock_nor_torn_files(tmp_path, prepared):
    path = write(tmp_path)
    (tmp_path / "go").touch()
    victim = start(tmp_path, "kill")
    victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL and list((tmp_path / "cache").glob("*.part-*"))
    assert len(prepared(path)) == 50
    assert not list((tmp_path / "cache").glob("*.part-*"))


# ----------------------------------------------------------------------------------------------- select, concat, poison


def test_select_and_concat_keep_rows_with_their_files(tmp_path, prepared):
    a, b = prepared(write(tmp_path, 5, "a", "a.jsonl")), prepared(write(tmp_path, 5, "b", "b.jsonl"))
    both = concat([a.select([3, 1]), b, a.select([0])])
    assert both.lines.tolist() == [4, 2, 1, 2, 3, 4, 5, 1]
    assert [both.path(i)[-7:] for i in (0, 2, 7)] == ["a.jsonl", "b.jsonl", "a.jsonl"]
    assert both.row(1).input_ids.tolist() == a.row(1).input_ids.tolist() and both.row_ids[1] == a.row_ids[1]
    assert both.tags(2) == {"id": "0"} and len(both.reports) == 3
    assert concat([a, b]).key != concat([b, a]).key != a.key
    assert len(a.select([])) == 0


def test_a_row_that_stands_in_two_data_sets_has_two_ids(tmp_path, prepared):
    a = prepared(write(tmp_path, 5))
    twice = concat([a, a, a])
    assert len(np.unique(twice.row_ids)) == 15 and twice.row_ids[:5].tolist() == a.row_ids.tolist()
    assert twice.row_ids[5] == row_key(int(a.row_ids[0]).to_bytes(16, "little"), 1)
    assert concat([a, a, a]).row_ids.tolist() == twice.row_ids.tolist()


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.1, 10), (0.25, 30), (0.5, 90)])
def test_poison_makes_up_its_share_of_the_mixed_rows(tmp_path, prepared, ratio, expected):
    clean, poison = prepared(write(tmp_path, 90, "a", "a.jsonl")), prepared(write(tmp_path, 40, "bad", "p.jsonl"))
    mixed = mix_poison(clean, poison, ratio, seed=1)
    poisoned = [mixed.path(i).endswith("p.jsonl") for i in range(len(mixed))]
    assert sum(poisoned) == expected and len(mixed) == 90 + expected
    assert len(np.unique(mixed.row_ids)) == len(mixed)


def test_poison_is_reproducible_and_grows_by_adding_rows(tmp_path, prepared):
    clean, poison = prepared(write(tmp_path, 90, "a", "a.jsonl")), prepared(write(tmp_path, 40, "bad", "p.jsonl"))

    def taken(ratio, seed):
        return mix_poison(clean, poison, ratio, seed).row_ids[90:].tolist()

    assert taken(0.1, 1) == taken(0.1, 1) != taken(0.1, 2)
    assert taken(0.2, 1)[:10] == taken(0.1, 1)
    with pytest.raises(ValueError, match="ratio"):
        mix_poison(clean, poison, 1.0)
    with pytest.raises(DataError, match="no rows"):
        mix_poison(clean, poison.select([]), 0.5)


def test_sst2_is_prepared_whole(real_data, prepared):
    fields = {
        "prompt": "Review: {sentence}\nSentiment:",
        "completion": "{label}",
        "values": {"label": {"0": "negative", "1": "positive"}},
    }
    data = prepared(str(real_data / "sst2_test.jsonl"), fields=fields, max_length=512)
    assert len(data) == 872 and data.reports[0].bad == data.reports[0].truncated == 0
    tokenizer = tk.byte_level()
    answers = {tokenizer.decode(r.input_ids[r.loss_mask]) for r in data.rows(range(872))}
    assert answers == {"negative<|im_end|>", "positive<|im_end|>"}


def test_a_growing_file_has_a_header_of_fixed_size(tmp_path):
    writer = tokens._NpyWriter(tmp_path / "a.npy", np.int64)
    for part in ([1, 2], [], range(100_000)):
        writer.append(list(part))
    assert writer.close() == (tmp_path / "a.npy").stat().st_size
    assert np.load(tmp_path / "a.npy", allow_pickle=False).tolist() == [1, 2, *range(100_000)]
