"""The trained model is made from the store: the same model as transformers loads, in every stage, without writing to
the store."""

from __future__ import annotations

import pytest
import torch

from safecl.config import ModelConfig
from tests.engine import scenes
from tests.engine.reference.test_reference import mapped_segments

PLACES = [(0, "none"), (1, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")]
LORA = {"r": 2, "alpha": 4.0}


@pytest.mark.parametrize("family", ["llama", "qwen", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_the_one_that_transformers_loads(tmp_path, family, tied):
    import transformers

    from safecl.engine.reference.loading import load_model

    scenes.tiny_model(tied, family=family).save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, store = load_model(ModelConfig(path=str(tmp_path), gradient_checkpointing=False))
    for of in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, of)()), dict(getattr(expected, of)())
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    assert all(store.holds(p) for p in model.parameters())
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_buffers_that_a_checkpoint_holds_are_taken_from_it(tmp_path):
    import transformers

    from safecl.engine.model.structure import empty_model
    from safecl.engine.reference.loading import take_weights
    from safecl.engine.reference.store import ReferenceStore

    config = transformers.LlamaConfig(
        vocab_size=131, hidden_size=32, intermediate_size=45, num_hidden_layers=1, num_attention_heads=4
    )
    saved = transformers.LlamaForCausalLM(config)
    saved.model.norm.register_buffer("scale", torch.arange(3))
    saved.save_pretrained(tmp_path)
    model = empty_model(str(tmp_path), torch.bfloat16)
    model.model.norm.register_buffer("scale", torch.zeros(3, dtype=torch.int64))
    with ReferenceStore.open(tmp_path, model=model) as store:
        take_weights(model, store)
    assert model.model.norm.scale.tolist() == [0, 1, 2]


def train_from_a_folder(path: str, steps: int = 3, **changes):
    """Train from the folder; return the weights before and after, whether a trained tensor is a view of the store, and
    whether the store is unchanged."""
    from safecl.engine.reference.loading import load_model
    from safecl.engine.reference.store import ReferenceStore

    model = {"path": path, "dtype": "bf16", "gradient_checkpointing": False, **changes.pop("model", {})}
    config = scenes.run_config(model=model, memory=None, **changes)
    torch.manual_seed(0)
    loaded, store = load_model(config.model)
    run, task = scenes.build_run(config, loaded, store)
    trained = [p for p in run.engine.module.parameters() if p.requires_grad]
    start = scenes.state_of(run)["weights"]
    aliased = any(store.holds(p) for p in [*trained, *run.engine.shards.flats])
    scenes.begin(run, task)
    for _ in range(steps):
        run.train_step(task)
    return (
        start,
        scenes.state_of(run)["weights"],
        aliased,
        ReferenceStore.open(path, dtype=store.dtype).digest == store.digest,
    )


@pytest.mark.parametrize(("stage", "offload"), PLACES)
@pytest.mark.parametrize("lora", [False, True])
def test_every_stage_trains_its_own_copy_and_leaves_the_store_alone(rank_pool, tmp_path, stage, offload, lora):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    deepspeed = {"stage": stage, "offload": {"optimizer": offload, "parameters": offload if stage == 3 else "none"}}
    model = {"lora": LORA if lora else None}
    expected = dict(scenes.tiny_model(dtype=torch.bfloat16).named_parameters())
    ranks = rank_pool(2).run(train_from_a_folder, path=str(tmp_path), model=model, deepspeed=deepspeed)
    for start, end, aliased, untouched in ranks:
        assert lora or all(torch.equal(start[name], value.float()) for name, value in expected.items())
        assert any(not torch.equal(start[name], end[name]) for name in start)
        assert all(torch.equal(end[name], ranks[0][1][name]) for name in end)
        assert untouched and not aliased


def segments_when_masters_are_made(path: str, keep_store: bool) -> tuple[int, int, bool]:
    """Number of the store's segments that this rank maps when ZeRO-3 makes the master weights, and at the end."""
    import gc
    from unittest import mock

    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    from safecl.distributed import collectives
    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.engine.reference.loading import load_model

    gc.collect()
    before, seen, make = mapped_segments(), [], Stage3._create_fp32_partitions

    def look(self):
        seen.append(len(mapped_segments() - before))
        make(self)

    config = scenes.run_config(model={"path": path, "dtype": "bf16"}, memory=None, deepspeed={"stage": 3})
    loaded, store = load_model(config.model)
    filled = mapped_segments() - before
    assert len(filled) == 1 and store.where == "segment"
    with mock.patch.object(Stage3, "_create_fp32_partitions", look):
        engine = TrainingEngine(
            LanguageModel(loaded),
            config,
            MicroBatchLayout(collectives.world_size(), 64, True),
            store,
            keep_store=keep_store,
        )
    return seen[0], len(mapped_segments() - before), engine.store is not None


@pytest.mark.parametrize("keep_store", [False, True])
def test_zero_3_gives_the_store_back_before_master_weights_are_made_unless_somebody_reads_it(
    rank_pool, tmp_path, keep_store
):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    for at_masters, at_end, kept in rank_pool(2).run(
        segments_when_masters_are_made, path=str(tmp_path), keep_store=keep_store
    ):
        assert (at_masters, at_end, kept) == ((1, 1, True) if keep_store else (0, 0, False))
