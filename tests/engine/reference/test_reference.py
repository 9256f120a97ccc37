"""The store of reference weights: it has the model's own values, once per node, refuses damaged ones by name, and is
gone with the run."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safecl import ReferenceStore
from safecl.engine.reference import shared_memory
from safecl.storage.untrusted import UnusableWeights
from tests.engine import scenes


def save(folder: Path, dtype: torch.dtype = torch.float32, shards: bool = False, **model) -> str:
    scenes.tiny_model(dtype=dtype, **model).save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    return str(folder)


def loaded(path: str, dtype: torch.dtype):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_store_holds_what_transformers_loads_under_all_names(tmp_path, family, tied):
    path = save(tmp_path, family=family, tied=tied, shards=True)
    for dtype in (torch.float32, torch.bfloat16):
        expected = dict(loaded(path, dtype).named_parameters(remove_duplicate=False))
        with ReferenceStore.open(path, dtype=dtype) as store:
            assert sorted(store.names()) == sorted(expected)
            for name, value in expected.items():
                assert store.tensor(name).dtype == dtype and store.shape(name) == tuple(value.shape)
                assert torch.equal(store.tensor(name), value), name
            if tied:
                assert store.tensor("lm_head.weight").data_ptr() == store.tensor("model.embed_tokens.weight").data_ptr()


def test_half_precision_files_are_rounded_once(tmp_path):
    path = save(tmp_path, dtype=torch.float16)
    expected = dict(scenes.tiny_model(dtype=torch.float16).named_parameters())
    with ReferenceStore.open(path, dtype=torch.bfloat16) as store:
        for name, value in expected.items():
            assert torch.equal(store.tensor(name), value.to(torch.bfloat16))


def test_ranges_are_read_into_tensors_of_any_dtype(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    with ReferenceStore.open(save(tmp_path), dtype=torch.bfloat16) as store:
        flat = store.tensor(name).view(-1)
        out = torch.zeros(90)
        assert torch.equal(store.read(name, 11, 101, out), flat[11:101].float())


def test_a_checkpoint_of_the_headless_model_is_found_under_its_own_names(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=131, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    expected = dict(loaded(str(tmp_path), torch.float32).named_parameters())
    with ReferenceStore.open(tmp_path, dtype=torch.float32) as store:
        assert all(torch.equal(store.tensor(name), value) for name, value in expected.items())


def test_names_that_only_transformers_knows_are_converted_by_it(tmp_path, monkeypatch):
    from safecl.engine.reference import sources

    path = save(tmp_path)
    expected = dict(loaded(path, torch.bfloat16).named_parameters())
    monkeypatch.setattr(sources, "_tensor_of", lambda *_: None)
    with ReferenceStore.open(path, dtype=torch.bfloat16) as store:
        assert all(torch.equal(store.tensor(name), value) for name, value in expected.items())


# ------------------------------------------------------------------------------------------------------------- refusals


def rewrite(path: str, change) -> Path:
    from safetensors.torch import load_file, save_file

    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return file


NAME = "model.layers.1.self_attn.v_proj.weight"


def without_a_tensor(path: str) -> None:
    rewrite(path, lambda tensors: tensors.pop(NAME))


def with_a_wrong_shape(path: str) -> None:
    rewrite(path, lambda tensors: tensors.update({NAME: torch.zeros(3, 32)}))


def with_another_vocabulary(path: str) -> None:
    rewrite(path, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(140, 32)}))


def with_integers(path: str) -> None:
    rewrite(path, lambda tensors: tensors.update({NAME: torch.zeros(16, 32, dtype=torch.int8)}))


def truncated(path: str) -> None:
    file = Path(path) / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 100)


DAMAGES = {
    without_a_tensor: rf"tensor {re.escape(NAME)} is missing",
    with_a_wrong_shape: rf"model\.safetensors: {re.escape(NAME)} has shape \[3, 32\], "
    r"the model's config.json says \[16, 32\]",
    with_another_vocabulary: r"model\.safetensors: a vocabulary of 140 tokens, but the model's config.json says 131",
    with_integers: rf"model\.safetensors: {re.escape(NAME)} is stored as I8",
    truncated: r"model\.safetensors: .*bytes long.*damaged or was not copied in full",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_weights_that_cannot_be_trusted_are_refused_by_name(tmp_path, damage):
    path = save(tmp_path)
    damage(path)
    with pytest.raises(UnusableWeights, match=DAMAGES[damage]):
        ReferenceStore.open(path, dtype=torch.bfloat16)


def test_a_file_that_the_index_names_and_that_is_not_there_is_told(tmp_path):
    path = save(tmp_path, shards=True)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UnusableWeights, match=re.escape(f"names {lost.name}, which is not there")):
        ReferenceStore.open(path)


def test_a_teacher_of_another_vocabulary_than_the_student_is_refused(tmp_path):
    with pytest.raises(UnusableWeights, match="a vocabulary of 131 tokens where 128 are needed"):
        ReferenceStore.open(save(tmp_path), vocab_size=128)


@pytest.mark.parametrize("where", ["segment", "file"])
def test_files_that_were_changed_since_the_run_began_are_told(tmp_path, where):
    path = save(tmp_path)
    with ReferenceStore.open(path, dtype=torch.float32, where=where) as store:
        store.check_unchanged()
        rewrite(path, lambda tensors: tensors[NAME].add_(1.0))
        with pytest.raises(UnusableWeights, match=r"model\.safetensors: was changed since the run began"):
            store.check_unchanged()


# --------------------------------------------------------------------------------------------------------------- memory


def mapped_segments() -> set[tuple[str, str]]:
    """(permissions, inode) of all segments that this process maps."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "safecl-reference" in line]
    return {(fields[1], fields[4]) for fields in lines}


def open_and_look(path: str):
    before = mapped_segments()  # other tests may have left models in this process
    store = ReferenceStore.open(path, dtype=torch.bfloat16)
    seen = mapped_segments() - before, float(store.tensor(NAME).float().sum()), store.digest
    store.close()
    return (*seen, mapped_segments() - before, store.notes)


def test_ranks_of_a_node_map_one_segment_that_nobody_can_write_to(rank_pool, tmp_path):
    path = save(tmp_path)
    first, second = rank_pool(2).run(open_and_look, path=path)
    assert first[:3] == second[:3]
    assert [permissions for permissions, _ in first[0]] == ["r--s"]
    assert first[3] == second[3] == set() and first[4] == second[4] == []


def numa_rules() -> list[str]:
    """The memory policies of all segments that this process maps."""
    lines = [line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    return [fields[1] for fields in lines if any("safecl-reference" in field for field in fields)]


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel shows no NUMA policies")
def test_the_pages_of_a_segment_come_from_all_numa_nodes_in_turn(tmp_path):
    path, before = save(tmp_path), len(numa_rules())
    with ReferenceStore.open(path, dtype=torch.bfloat16, where="segment"):
        assert len(numa_rules()) == before + 1 and numa_rules()[-1].startswith("interleave:0")


def test_the_nodes_with_memory_are_read_from_the_system(tmp_path):
    listed = tmp_path / "has_memory"
    listed.write_text("0-2,5,64-65\n")
    assert shared_memory.numa_nodes(listed) == [0, 1, 2, 5, 64, 65]
    assert shared_memory.numa_nodes(tmp_path / "absent") == []
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    assert not shared_memory.interleave(memory, []) and not shared_memory.interleave(memory, [1000])
    memory.close()


def refusal(path: str) -> str:
    try:
        ReferenceStore.open(path)
    except UnusableWeights as error:
        return str(error)


def refusal_of_the_first(path: str) -> str:
    """Only the rank that fills the segment meets the damage."""
    from unittest import mock

    from safecl.distributed import collectives
    from safecl.engine.reference import sources

    def broken(*_):
        raise OSError("Input/output error")

    with mock.patch.object(sources, "_load", broken) if collectives.rank() == 0 else mock.MagicMock():
        return refusal(path)


def test_what_one_rank_finds_is_told_on_all(rank_pool, tmp_path):
    said = rank_pool(2).run(refusal_of_the_first, path=save(tmp_path))
    assert said == ["Input/output error"] * 2


def open_behind_a_wall(path: str):
    """Rank 1 may not open rank 0's memory."""
    from unittest import mock

    from safecl.distributed import collectives
    from safecl.engine.reference import shared_memory

    hidden = mock.patch.object(shared_memory, "address", lambda handle: "/proc/1/fd/none")
    with hidden if collectives.rank() == 0 else mock.MagicMock():
        return open_and_look(path)


def test_a_rank_that_cannot_share_keeps_a_copy_and_says_so(rank_pool, tmp_path):
    first, second = rank_pool(2).run(open_behind_a_wall, path=save(tmp_path))
    assert first[1:3] == second[1:3]
    assert "keeps a copy of its own" in second[4][0]


def test_a_segment_that_does_not_fit_is_told_with_its_size_or_the_file_is_mapped(tmp_path, monkeypatch):
    path = save(tmp_path)
    monkeypatch.setattr(shared_memory, "available_memory", lambda: 1000)
    with pytest.raises(
        UnusableWeights, match=r"needs 48\.9 kB of host memory, 1\.0 kB are available; .*as F32, the run needs BF16"
    ):
        ReferenceStore.open(path, dtype=torch.bfloat16)
    with ReferenceStore.open(path, dtype=torch.float32) as store:
        assert store.where == "file" and "the model's files are mapped instead" in store.notes[0]
        assert torch.equal(store.tensor(NAME), scenes.tiny_model().state_dict()[NAME])


def test_the_digest_tells_models_and_dtypes_apart_and_not_where_they_lie(tmp_path):
    path = save(tmp_path)
    digests = [ReferenceStore.open(path, dtype=torch.float32, where=where).digest for where in ("segment", "file")]
    assert digests[0] == digests[1] != ReferenceStore.open(path, dtype=torch.bfloat16).digest
    rewrite(path, lambda tensors: tensors[NAME][0, 0].add_(1e-3))
    assert ReferenceStore.open(path, dtype=torch.float32).digest != digests[0]


HOLD = """
import sys, time, torch
from unittest import mock
from safecl import ReferenceStore
from safecl.engine.reference import shared_memory
if sys.argv[2] == "old kernel":
    shared_memory.os.memfd_create = mock.Mock(side_effect=OSError("not permitted"))
store = ReferenceStore.open(sys.argv[1], dtype=torch.float32)
print("open", flush=True)
if sys.argv[3] == "exit":
    sys.exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("kernel", "end"), [("memfd", signal.SIGKILL), ("old kernel", signal.SIGKILL), ("old kernel", "exit")]
)
def test_no_exit_leaves_anything_in_dev_shm(tmp_path, kernel, end):
    path = save(tmp_path)
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen([sys.executable, "-c", HOLD, path, kernel, str(end)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    if end == signal.SIGKILL:
        process.kill()
    assert process.wait(30) in (0, -signal.SIGKILL)
    left = [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("safecl")]
    assert left == []


def test_no_index_at_all_is_no_traceback(tmp_path):
    path = save(tmp_path, shards=True)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps([1, 2]))
    with pytest.raises(UnusableWeights, match="not an index of weight files"):
        ReferenceStore.open(path)


def test_the_example_of_the_documentation_runs(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "embedding.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "ReferenceStore" in block)
    names: dict = {}
    exec(compile(code.replace("path/to/model", save(tmp_path)), "docs/embedding.md", "exec"), names)
    assert torch.equal(names["part"], names["weight"].view(-1)[:16].float())
