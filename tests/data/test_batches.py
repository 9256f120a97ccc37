"""Packed, padded and single rows give the same losses, and no document sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safecl.data import Row, collate

VOCAB = 61


def rows_of(lengths, seed=0) -> list[Row]:
    source = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        mask = source.random(length) < 0.5
        mask[0], mask[-1] = False, True
        rows.append(Row(i, source.integers(1, VOCAB, length).astype(np.int32), mask))
    return rows


def model_of(family: str) -> torch.nn.Module:
    import transformers

    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **sizes, max_position_embeddings=256, pad_token_id=0, initializer_range=0.3
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).float().eval()


def logits_of(model, batch):
    with torch.no_grad():
        out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False)
    return out.logits.view(-1, VOCAB)  # [B * S, vocab]


def losses_of(model, batch) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(
        logits_of(model, batch).double(), batch.targets, ignore_index=-100, reduction="none"
    )
    return losses[batch.targets != -100]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma"])
def test_packed_and_padded_losses_equal_those_of_single_rows(family):
    model, rows = model_of(family), rows_of([7, 2, 23, 11, 30])
    alone = torch.cat([losses_of(model, collate([row], packed=False, pad_id=0)) for row in rows])
    assert len(alone) == sum(row.num_targets for row in rows)
    for packed in (True, False):
        assert difference(losses_of(model, collate(rows, packed=packed, pad_id=0)), alone) < 2e-6


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_document_does_not_see_its_neighbour(family, packed):
    model, (first, second, other) = model_of(family), rows_of([9, 12, 9])
    with_first, with_other = (collate([x, second], packed=packed, pad_id=0) for x in (first, other))
    start = with_first.starts[1]
    seen, unseen = (logits_of(model, batch)[start : start + 12] for batch in (with_first, with_other))
    assert torch.equal(seen, unseen)
    # The same neighbours without restarting positions do see each other, so the check can fail.
    if packed:
        with_first.position_ids = torch.arange(21)[None]
        assert difference(logits_of(model, with_first)[start : start + 12], seen) > 1e-2


@pytest.mark.parametrize("packed", [True, False])
def test_targets_are_the_supervised_next_tokens_at_the_promised_places(packed):
    rows = rows_of([5, 9, 2])
    batch = collate(rows, packed=packed, pad_id=0)
    flat, expected = batch.input_ids.flatten(), {}
    for row, start in zip(rows, batch.starts, strict=True):
        assert flat[start : start + len(row)].tolist() == row.input_ids.tolist()
        assert batch.position_ids.flatten()[start : start + len(row)].tolist() == list(range(len(row)))
        expected |= {start + j - 1: int(row.input_ids[j]) for j in range(1, len(row)) if row.loss_mask[j]}
    assert {int(i): int(batch.targets[i]) for i in (batch.targets != -100).nonzero().flatten()} == expected
    assert batch.lengths == [5, 9, 2] and batch.num_targets == len(expected)
    assert batch.input_ids.shape == ((1, 16) if packed else (3, 9))
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.targets)} == {torch.int64}


@pytest.mark.parametrize("packed", [True, False])
def test_no_rows_give_a_dummy_without_targets(packed):
    batch = collate([], packed=packed, pad_id=3)
    assert batch.input_ids.tolist() == [[3, 3]] and batch.position_ids.tolist() == [[0, 1]]
    assert batch.targets.tolist() == [-100, -100] and batch.starts == [] and batch.lengths == []


def test_rows_of_one_token_have_no_target():
    batch = collate([Row(1, np.array([4], np.int32), np.array([False]))] * 2, packed=True, pad_id=0)
    assert batch.targets.tolist() == [-100, -100] and batch.position_ids.tolist() == [[0, 0]]
