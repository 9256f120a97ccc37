"""Under ZeRO-3 no rank ever holds the whole model on its device: each parameter is cut up as soon as it arrives.

The device is a stand-in: on a CPU, moving a tensor to the device copies nothing; here it copies, as on a GPU.
"""

from __future__ import annotations

import pytest

from tests.engine import scenes


def load_on_a_device(path: str, bf16: bool, **changes) -> dict[str, int]:
    """Bytes of the model and of its largest parameter, the most bytes of weights that were on the device until all were
    cut up, and the number of whole modules that were moved there."""
    from unittest import mock

    import torch

    from safecl.engine.model.language_model import LanguageModel
    from safecl.engine.passes.micro_batches import MicroBatchLayout
    from safecl.engine.passes.training_engine import TrainingEngine
    from safecl.engine.reference.loading import load_model
    from safecl.planning.costs.activations import LiveBytes

    model = {"path": path, "dtype": "bf16" if bf16 else "fp32", "gradient_checkpointing": False}
    config = scenes.run_config(model=model, **changes)
    loaded, store = load_model(config.model)
    sizes = [p.nbytes for p in loaded.parameters()]
    found = {"model": sum(sizes), "largest": max(sizes), "moves": 0}
    to, move = torch.Tensor.to, torch.nn.Module.to

    def copied(tensor, *arguments, **options):
        to_device = arguments and isinstance(arguments[0], torch.device)
        return to(tensor, *arguments, **options).clone() if to_device else to(tensor, *arguments, **options)

    def moved(module, *arguments, **options):
        found["moves"] += any(p.numel() for p in module.parameters())
        return move(module, *arguments, **options)

    live = LiveBytes(known=[*loaded.parameters(), *loaded.buffers()])

    def all_cut_up(engine):
        found.setdefault("peak", live.peak)
        release(engine)

    release = TrainingEngine.release_store
    patches = [
        mock.patch.object(torch.Tensor, "to", copied),
        mock.patch.object(torch.nn.Module, "to", moved),
        mock.patch.object(TrainingEngine, "release_store", all_cut_up),
    ]
    with patches[0], patches[1], patches[2], live:
        TrainingEngine(LanguageModel(loaded), config, MicroBatchLayout(2, 64, True), store, keep_store=False)
    return found


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_rank_holds_its_part_and_one_whole_parameter(rank_pool, tmp_path, bf16, offload):
    scenes.tiny_model().save_pretrained(tmp_path)
    deepspeed = {"stage": 3, "offload": {"parameters": offload}}
    for found in rank_pool(2).run(load_on_a_device, path=str(tmp_path), bf16=bf16, deepspeed=deepspeed):
        assert found["moves"] == 0
        padding = 2048
        assert found["peak"] <= found["model"] // 2 + found["largest"] + padding < found["model"], found


def test_the_stand_in_sees_a_whole_model_where_there_is_one(rank_pool, tmp_path):
    scenes.tiny_model().save_pretrained(tmp_path)
    for found in rank_pool(2).run(load_on_a_device, path=str(tmp_path), bf16=True, deepspeed={"stage": 2}):
        assert found["moves"] == 1 and found["peak"] >= found["model"], found
