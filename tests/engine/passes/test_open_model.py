"""The checks of a model at the start: made once for all ranks, and their outcome is that of all."""

from __future__ import annotations

import os
from unittest import mock

import torch

from safecl.config import ConfigError, ModelConfig
from tests.engine import scenes


def open_and_count(path: str, refused: bool = False, linear: bool = True):
    """(forward passes of this rank, whether the head is fused and the notes, or the error)."""
    from safecl.distributed import collectives
    from safecl.engine.passes import open_model

    passes, notes, first = [], [], collectives.rank() == 0
    real = open_model.check_head

    def check_head(model):
        model.model.register_forward_pre_hook(lambda *_: passes.append(torch.get_num_threads()))
        return real(model) and linear

    def check_packing(model):
        if refused and first:
            raise ConfigError("train.packing: packed documents see each other")

    with mock.patch.multiple(open_model, check_head=check_head, check_packing=check_packing):
        try:
            model, _, store = open_model.open_language_model(
                ModelConfig(path=path), packing="packed", tokens_per_microbatch=64, pad_id=0, note=notes.append
            )
        except ConfigError as error:
            return passes, str(error), torch.get_num_threads()
        store.close()
    return passes, (model.fused, notes), torch.get_num_threads()


def test_one_rank_checks_for_all_with_all_of_its_cores(rank_pool, tmp_path):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    first, second = rank_pool(2).run(open_and_count, path=str(tmp_path))
    threads = first[2]
    assert first == ([max(threads, len(os.sched_getaffinity(0)))] * 2, (True, []), threads)
    assert second == ([], (True, []), threads)


def test_all_ranks_compute_logits_as_the_first_has_found_them_and_say_so(rank_pool, tmp_path):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    for _, (fused, notes), _ in rank_pool(2).run(open_and_count, path=str(tmp_path), linear=False):
        assert not fused and "more than a linear head" in notes[0]


def test_what_the_check_refuses_is_refused_on_all_ranks(rank_pool, tmp_path):
    scenes.tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    for found in rank_pool(2).run(open_and_count, path=str(tmp_path), refused=True):
        assert found[:2] == ([], "train.packing: packed documents see each other")
