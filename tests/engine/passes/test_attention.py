"""flash-attention is taken into use on the device only, knows the documents by their bounds, and gives way by name.

The kernel is a stand-in with flash-attention's interface in transformers. It refuses CPU tensors until the test says
that the weights are on the device, and it refuses masks and packed rows without bounds.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from safecl.config import ConfigError, ModelConfig
from safecl.engine.model import attention, settings
from safecl.engine.passes import attention as engine_attention
from safecl.engine.passes import forward_engine, open_model
from tests.engine import scenes

NAME = "stand_in_kernel"


class StandIn:
    """The kernel. scale: factor on its result, 1 for an exact one."""

    def __init__(self):
        self.on_device, self.scale, self.calls, self.masks, self.packed_tests = False, 1.0, [], 0, 0

    def __call__(self, module, query, key, value, mask, scaling=None, dropout=0.0, **options):
        if not self.on_device:
            raise RuntimeError("FlashAttention only supports CUDA tensors")
        self.masks += mask is not None
        self.calls.append(options.get("max_length_q"))
        rows, tokens = query.shape[0], query.shape[2]
        bounds = options.get("cu_seq_lens_q")
        if bounds is None:
            bounds = torch.arange(rows + 1, dtype=torch.int32) * tokens
        assert bounds.dtype == torch.int32 and torch.equal(bounds, options.get("cu_seq_lens_k", bounds))
        flat = [t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value)]
        output = attention.exact_attention(*flat, bounds, scaling=scaling, softcap=options.get("softcap"),
                                           window=options.get("sliding_window"))  # fmt: skip
        return (self.scale * output).to(query.dtype).view(rows, tokens, *output.shape[2:]), None


@pytest.fixture
def stand_in(monkeypatch):
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = StandIn()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, kernel)
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, NAME, masking_utils.flash_attention_mask)
    monkeypatch.setattr(attention, "ON_GPUS_ONLY", {NAME})
    monkeypatch.setattr(engine_attention, "ON_GPUS_ONLY", {NAME})
    monkeypatch.setattr(open_model, "ON_GPUS_ONLY", {NAME})
    for module in (engine_attention, open_model, settings):
        monkeypatch.setattr(
            module, "choose_attention", lambda wanted, dtype="bf16": (NAME if wanted == "auto" else wanted, "")
        )
    start = engine_attention.start_attention

    def start_on_the_device(*arguments, **options):
        kernel.on_device = True
        start(*arguments, **options)

    monkeypatch.setattr(forward_engine, "start_attention", start_on_the_device)
    find = masking_utils.find_packed_sequence_indices

    def counted(position_ids):
        kernel.packed_tests += 1
        return find(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", counted)
    return kernel


def open_engine(path, notes: list[str], packing: str = "auto", family: str = "llama"):
    from types import SimpleNamespace

    from safecl.config import DeepSpeedConfig

    scenes.tiny_model(family=family).save_pretrained(path)
    return forward_engine.open_forward_engine(
        ModelConfig(path=str(path), dtype="fp32"),
        SimpleNamespace(pad_token_id=0),
        sharding=DeepSpeedConfig(stage=0),
        tokens_per_microbatch=64,
        packing=packing,
        note=notes.append,
    )


def outputs(engine, packed: bool) -> torch.Tensor:
    """nll of the targets of four rows in one micro-batch."""
    from dataclasses import replace

    from safecl.engine.teachers.outputs import _outputs_of

    rows = scenes.random_dataset(4, seed=3).rows(range(4))
    engine.layout = replace(engine.layout, packed=packed)
    found = _outputs_of(engine, range(4), rows, "topk", False, {"k": 2, "temperature": 1.0})
    return torch.cat([values["nll"] for _, values in found])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_it_starts_on_the_device_and_packed_rows_need_neither_mask_nor_question(stand_in, tmp_path, family):
    notes: list[str] = []
    engine = open_engine(tmp_path, notes, family=family)
    assert not notes and engine.layout.packed and attention.attention_of(engine.module.model) == NAME
    stand_in.calls.clear()
    stand_in.packed_tests = 0
    packed, padded = outputs(engine, True), outputs(engine, False)
    lengths = scenes.random_dataset(4, seed=3).lengths
    assert set(stand_in.calls) == {int(lengths.max())} and stand_in.masks == 0 and stand_in.packed_tests == 0
    attention.use_attention(engine.module.model, engine.module.runs_anywhere)
    expected = outputs(engine, True)
    for found in (packed, padded):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_rows_under_sdpa_ask_the_device_nothing_either(stand_in, tmp_path):
    engine = open_engine(tmp_path, [], packing="padded")
    attention.use_attention(engine.module.model, "sdpa")
    stand_in.packed_tests = 0
    for packed in (False, True):
        outputs(engine, packed)
        assert stand_in.packed_tests == 0, packed


@pytest.mark.parametrize(("device", "proofs"), [("cuda", 1), ("cpu", 0)])
def test_on_a_gpu_the_packing_is_proved_for_the_kernel_that_runs_anywhere_too(monkeypatch, device, proofs):
    """On a CPU it was proved before the engine was made, with the same kernel."""
    from types import SimpleNamespace

    proved = []
    monkeypatch.setattr(engine_attention, "_check_packing", proved.append)
    engine = SimpleNamespace(device=torch.device(device))
    engine_attention.start_attention(engine, ModelConfig(path="m", attention="sdpa"), packing="packed", note=print)
    assert proved == [engine] * proofs


@pytest.mark.parametrize(("packing", "packed"), [("auto", False), ("packed", True)])
def test_a_kernel_that_is_not_exact_gives_way_to_sdpa_by_name(stand_in, tmp_path, packing, packed):
    notes: list[str] = []
    stand_in.scale = 1.03
    engine = open_engine(tmp_path, notes, packing)
    assert attention.attention_of(engine.module.model) == "sdpa" and engine.layout.packed == packed
    assert notes == [
        f"attention: {NAME} is not used: a layer is 3.0% away from exact attention (limit 2%); sdpa takes its place"
    ]


def test_a_kernel_in_which_documents_see_each_other_gives_way(stand_in, tmp_path, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr(attention, "document_arguments", lambda model, sequences: {})
    from safecl.engine.model import language_model

    monkeypatch.setattr(language_model, "document_arguments", lambda model, sequences: {})
    engine = open_engine(tmp_path, notes)
    assert attention.attention_of(engine.module.model) == "sdpa" and "packed documents see each other" in notes[0]


def test_a_model_without_the_kernel_keeps_sdpa_by_name(stand_in, tmp_path, monkeypatch):
    notes: list[str] = []

    def refuse(model, name):
        raise ValueError("TinyForCausalLM does not support Flash Attention 2 yet.")

    use = attention.use_attention
    monkeypatch.setattr(
        engine_attention, "use_attention", lambda model, name: refuse(model, name) if name == NAME else use(model, name)
    )
    engine = open_engine(tmp_path, notes)
    assert not engine.layout.packed and "does not support Flash Attention 2" in notes[0]


def test_a_kernel_that_the_config_names_is_refused_where_it_does_not_serve(stand_in, tmp_path):
    engine = open_engine(tmp_path, [])
    stand_in.scale = float("nan")
    config = ModelConfig(path=str(tmp_path), dtype="fp32")
    config.attention = NAME
    with pytest.raises(ConfigError, match="stand_in_kernel cannot be used: a layer is nan% away"):
        engine_attention.start_attention(engine, config, packing="auto", note=print)


def test_the_guard_finds_a_kernel_that_has_become_inexact(stand_in, tmp_path):
    notes: list[str] = []
    engine = open_engine(tmp_path, notes)
    engine_attention.guard_attention(engine, notes.append)
    assert not notes
    stand_in.scale = 0.9
    engine_attention.guard_attention(engine, notes.append)
    assert "10.0% away from exact attention" in notes[0] and attention.attention_of(engine.module.model) == "sdpa"


def test_a_run_compares_every_n_steps_when_it_is_asked_to(monkeypatch, rank_pool):
    assert rank_pool(1).run(steps_with_a_comparison, every=2) == [[2, 4]]
    assert rank_pool(1).run(steps_with_a_comparison, every=None) == [[]]


def steps_with_a_comparison(every: int | None) -> list[int]:
    from unittest import mock

    from safecl.training import run as run_module

    run, task = scenes.make_run(scenes.run_config(model={"attention_check": every}))
    seen: list[int] = []
    with mock.patch.object(run_module, "guard_attention", lambda engine, note: seen.append(run.global_step)):
        for _ in range(5):
            run.train_step(task)
    with contextlib.suppress(ValueError):
        run.close()
    return seen
