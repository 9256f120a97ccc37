"""The memory as a table for other tools, and `safecl memory`."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import typer.testing

from safecl.commands.memory.verbs import app
from safecl.config import ConfigError
from safecl.replay import MemoryRow, ReplayBuffer, TeacherOutputs
from safecl.replay.exchange import export_rows, read_table
from tests.replay.samples import config, rows, same_row, token_row, with_teacher


def mixed_rows() -> list[MemoryRow]:
    """Rows with and without tags, and with outputs in fp16 and fp32 of several k."""
    plain, tagged = rows(20), [token_row(i, tags={"category": "weapons", "quote": 'a "b" ü'}) for i in range(20, 30)]
    topk = [with_teacher(row) for row in rows(5, first=30)]
    for row in (with_teacher(row, k=4) for row in rows(3, first=40)):
        outputs = row.teacher
        fp32 = TeacherOutputs(outputs.log_probs.astype(np.float32), outputs.indices, outputs.log_tail)
        topk.append(dataclasses.replace(row, teacher=fp32))
    short = [token_row(i, length=1) for i in range(50, 53)]
    return plain + tagged + topk + short


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_come_back_from_parquet_and_arrow_bit_by_bit(tmp_path, suffix):
    offered = mixed_rows()
    buffer = ReplayBuffer(config())
    buffer.insert(offered)
    assert export_rows(buffer, tmp_path / f"rows{suffix}") == len(offered)
    again = ReplayBuffer(config())
    again.insert(read_table(tmp_path / f"rows{suffix}"))
    assert len(again) == len(offered)
    assert all(same_row(again.get(key), row) for key, row in enumerate(offered))
    assert np.array_equal(again.table["prior_nll"], buffer.table["prior_nll"], equal_nan=True)


def test_datasets_and_pyarrow_read_the_file_as_it_is(tmp_path):
    from datasets import load_dataset

    buffer = ReplayBuffer(config())
    buffer.insert(mixed_rows())
    export_rows(buffer, tmp_path / "rows.parquet", decode=lambda ids: " ".join(map(str, ids)))
    data = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path))
    assert json.loads(data[25]["tags"])["category"] == "weapons"
    assert data[3]["text"].split()[0] == str(data[3]["input_ids"][0])
    table = pa.parquet.read_table(tmp_path / "rows.parquet", columns=["key", "source", "teacher_kind"])
    assert table["key"].to_pylist() == buffer.keys()
    assert table["teacher_kind"].to_pylist().count("topk") == 8


def test_rows_of_other_people_need_only_ids_and_mask(tmp_path):
    pa.parquet.write_table(
        pa.table({"input_ids": [[1, 2, 3], [4, 5]], "loss_mask": [[0, 1, 1], [0, 1]]}), tmp_path / "theirs.parquet"
    )
    buffer = ReplayBuffer(config())
    buffer.insert(read_table(tmp_path / "theirs.parquet"))
    assert buffer.get(0).row.input_ids.tolist() == [1, 2, 3] and buffer.get(1).source == "theirs.parquet"
    assert len({buffer.get(key).row.row_id for key in (0, 1)}) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[1]]}, "the column 'loss_mask' is missing; there are input_ids"),
        ({"input_ids": [[1, 2]], "loss_mask": [[0, 1]], "tags": ["[]"]}, "row 0: tags are"),
        ({"input_ids": [[1, 2]], "loss_mask": [[0, 1]], "teacher_kind": ["gzip"]}, "row 0: teacher_kind 'gzip'"),
        ({"input_ids": ["a"], "loss_mask": [[0]]}, "row 0"),
    ],
)
def test_files_that_do_not_fit_are_told_by_file_and_row(tmp_path, columns, message):
    path = tmp_path / "bad.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    with pytest.raises(ConfigError, match=message) as told:
        list(read_table(path))
    assert str(path) in str(told.value)
    with pytest.raises(ConfigError, match="no such file"):
        list(read_table(tmp_path / "none.parquet"))
    with pytest.raises(ConfigError, match=r"must be one of \.parquet, \.arrow"):
        list(read_table(tmp_path / "none.csv"))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_table(path))


# ---------------------------------------------------------------------------------------------------------------- verbs


def run(*arguments) -> tuple[int, str]:
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output + (result.stderr if result.stderr_bytes else "")


@pytest.fixture
def run_folder(tmp_path):
    with ReplayBuffer(config(), tmp_path / "run" / "memory", seed=4) as buffer:
        buffer.insert(token_row(i, tags={"category": f"kind{i % 2}"}) for i in range(40))
    return tmp_path / "run"


def test_show_tells_rows_tokens_and_categories(run_folder):
    code, text = run("show", run_folder, "--rows", 2)
    assert code == 0 and "40 of 40 seen; room for 20,000 rows, policy reservoir" in text
    assert "kind0" in text and "kind1" in text and "row 20:" in text


def test_export_and_import_carry_a_memory_to_another_folder(run_folder, tmp_path):
    assert run("export", run_folder, tmp_path / "rows.parquet")[0] == 0
    code, text = run("import", tmp_path / "rows.parquet", tmp_path / "other", "--capacity", "25", "--policy", "fifo")
    assert code == 0 and "40 rows read, 25 in" in text
    code, text = run("import", tmp_path / "rows.parquet", tmp_path / "other")
    assert code == 0 and "25 in" in text
    with ReplayBuffer.open(tmp_path / "other" / "memory") as buffer:
        assert buffer.num_seen == 80 and buffer.config.policy == "fifo"


def test_verify_tells_damage_with_exit_code_1_and_repairs(run_folder):
    assert run("verify", run_folder)[0] == 0
    segment = next((run_folder / "memory").glob("*.segment"))
    data = bytearray(segment.read_bytes())
    data[-20] ^= 1
    segment.write_bytes(bytes(data))
    code, text = run("verify", run_folder)
    assert code == 1 and "row 39" in text and "is damaged" in text
    assert run("verify", run_folder, "--repair")[0] == 0
    with ReplayBuffer.open(run_folder / "memory") as buffer:
        assert buffer.keys() == list(range(39))


def test_wrong_usage_is_told_with_exit_code_2(tmp_path, run_folder):
    for arguments, message in (
        (("show", tmp_path / "nothing"), "there is no such folder"),
        (("show", tmp_path), "runs keep theirs in RUN/memory"),
        (("export", run_folder, tmp_path / "rows.csv"), "must be one of"),
        (("import", tmp_path / "no.parquet", run_folder), "no such file"),
        (("import", tmp_path / "no.parquet", tmp_path / "new", "--capacity", "many"), "capacity"),
        (("cache", tmp_path / "none.yaml"), "no such file"),
        (("build", tmp_path / "model", tmp_path / "prompts.jsonl"), "no such model folder"),
        (("build", tmp_path, tmp_path / "prompts.jsonl"), "there is no config.json in it"),
    ):
        code, text = run(*arguments)
        assert code == 2 and message in text.replace("\n", " "), (arguments, text)
    assert not (tmp_path / "new").exists()
