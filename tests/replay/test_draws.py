"""The rows that a step draws."""

from __future__ import annotations

import numpy as np
import pytest

from safecl.replay import ReplayBuffer
from safecl.replay.rows import ReplayError
from safecl.replay.selection.visits import num_strips_for
from tests.replay.samples import config, rows, token_row, tokens_of
from tests.replay.test_contents import chi_square_is_plausible


def filled(count: int, seed: int = 0, length: int | None = None, **settings) -> ReplayBuffer:
    buffer = ReplayBuffer(config(**settings), seed=seed)
    buffer.insert(rows(count, length=length))
    return buffer


def test_a_draw_is_a_function_of_seed_step_and_stream():
    a, b = filled(300), filled(300)
    for step in (5, 0, 3):
        assert a.draw(step, 500, "replay") == b.draw(step, 500, "replay") == a.draw(step, 500, "replay")
    draws = {tuple(a.draw(step, 500, stream)) for step in range(20) for stream in ("replay", "labels")}
    assert len(draws) == 40
    assert filled(300, seed=1).draw(0, 500, "replay") != a.draw(0, 500, "replay")


def test_a_draw_holds_distinct_rows_with_the_asked_tokens_on_average():
    buffer = filled(300)
    for tokens in (10, 100, 2000):
        draws = [buffer.draw(step, tokens, "replay") for step in range(600)]
        assert all(len(set(keys)) == len(keys) >= 1 for keys in draws)
        if tokens > 10:  # a draw has one row at least
            assert abs(np.mean([tokens_of(buffer, keys) for keys in draws]) / tokens - 1) < 0.03


def test_a_draw_of_more_than_there_is_gives_every_row_once():
    buffer = filled(30)
    assert sorted(buffer.draw(0, 10**9, "replay")) == list(range(30))
    assert ReplayBuffer(config()).draw(0, 100, "replay") == []


def inclusion_statistic(buffer: ReplayBuffer, tokens: int, steps: int) -> tuple[float, int]:
    """Chi-square of how often each row is drawn, against equal chances given the sizes of the draws."""
    counts, variance = np.zeros(len(buffer)), 0.0
    for step in range(steps):
        keys = buffer.draw(step, tokens, "replay")
        counts[keys] += 1
        variance += len(keys) / len(buffer) * (1 - len(keys) / len(buffer))
    return ((counts - counts.mean()) ** 2).sum() / variance, len(buffer) - 1


@pytest.mark.parametrize(("count", "tokens"), [(157, 300), (1000, 2000)])
def test_every_row_is_equally_likely_to_be_drawn_whatever_its_length(count, tokens):
    buffer = filled(count)
    statistic, degrees = inclusion_statistic(buffer, tokens, 3000)
    strips = num_strips_for(len(buffer.draw(0, tokens, "replay")))
    assert chi_square_is_plausible(statistic, degrees, together=strips)


def test_rows_are_equally_likely_when_shards_are_unequally_full():
    buffer = ReplayBuffer(config(capacity=100))
    buffer.insert(rows(5000, length=8))
    chosen = dict(zip(buffer.keys(), range(100), strict=True))
    counts, variance = np.zeros(100), 0.0
    for step in range(3000):
        keys = buffer.draw(step, 160, "replay")
        for key in keys:
            counts[chosen[key]] += 1
        variance += len(keys) / 100 * (1 - len(keys) / 100)
    assert chi_square_is_plausible(((counts - counts.mean()) ** 2).sum() / variance, 99, together=8)


def test_two_streams_meet_as_often_as_chance_says():
    buffer = filled(200, length=10)
    met = sum(len(set(buffer.draw(step, 400, "der")) & set(buffer.draw(step, 400, "labels"))) for step in range(1000))
    # 40 of 200 rows twice: 8 in common on average, standard deviation 2.3 by the hypergeometric law
    assert abs(met / 1000 - 8) < 5 * 2.3 / np.sqrt(1000)


def test_ranks_get_nearly_equal_tokens_for_world_sizes_dividing_64():
    buffer = filled(6000)
    draws = [buffer.draw(step, 64 * 16 * 32, "replay") for step in range(20)]
    for world_size in (2, 4, 8, 16, 32, 64):
        tokens = [np.bincount(buffer.ranks_of(keys, world_size), buffer.lengths(keys), world_size) for keys in draws]
        # independent draws of so many rows give 1.05 for 2 ranks and 1.4 for 64
        assert np.mean([t.max() / t.mean() for t in tokens]) < 1 + 0.16 * world_size / 64 + 0.015


def test_even_a_small_memory_lies_equally_on_all_ranks():
    buffer = filled(192)
    for world_size in (2, 4, 8, 16, 32, 64):
        owned = np.bincount(buffer.ranks_of(buffer.keys(), world_size), minlength=world_size)
        assert owned.min() == owned.max() == 192 // world_size
        assert [buffer.rank_of(key, world_size) for key in range(9)] == buffer.ranks_of(range(9), world_size).tolist()


# ------------------------------------------------------------------------------------------------------------- policies


def categories(buffer: ReplayBuffer, keys: list[int]) -> list[str]:
    return [buffer.get(key).tags["category"] for key in keys]


def test_balanced_draws_take_every_category_equally_often():
    buffer = ReplayBuffer(config(draw="balanced"))
    buffer.insert(
        token_row(i, length=10, tags={"category": "rare" if i < 20 else "usual" if i < 100 else "common"})
        for i in range(1000)
    )
    drawn = [category for step in range(400) for category in categories(buffer, buffer.draw(step, 120, "replay"))]
    for category in ("rare", "usual", "common"):
        assert (
            abs(drawn.count(category) / len(drawn) - 1 / 3) < 0.01
        )  # the rare class as well, whose rows meet twice in a draw
    statistic = np.zeros(20)
    for step in range(3000):
        for key in buffer.draw(step, 30, "replay"):
            if key < 20:
                statistic[key] += 1
    assert chi_square_is_plausible(((statistic - statistic.mean()) ** 2).sum() / (statistic.mean() * (1 - 1 / 20)), 19)


@pytest.mark.parametrize("rest_steps", [0, 2])
def test_shares_set_how_often_a_category_is_drawn_and_the_others_share_the_rest(rest_steps):
    buffer = ReplayBuffer(config(shares={"rare": 0.25}, rest_steps=rest_steps))
    buffer.insert(
        token_row(i, length=10, tags={"category": "rare" if i < 100 else "usual" if i < 400 else "common"})
        for i in range(1000)
    )
    drawn = [category for step in range(400) for category in categories(buffer, buffer.draw(step, 120, "replay"))]
    for category, share in (("rare", 0.25), ("usual", 0.375), ("common", 0.375)):
        assert abs(drawn.count(category) / len(drawn) - share) < 0.015, category


def test_rows_without_a_share_are_drawn_where_there_are_no_others():
    buffer = ReplayBuffer(config(shares={"elsewhere": 1.0}))
    buffer.insert(token_row(i, length=10, tags={"category": "here"}) for i in range(50))
    assert len(buffer.draw(0, 120, "replay")) >= 10


def test_a_resting_row_is_not_drawn_again_before_its_rest_is_over():
    buffer = filled(600, length=10, rest_steps=9)
    last: dict[int, int] = {}
    for step in range(120):
        for key in buffer.draw(step, 100, "replay"):
            assert step - last.get(key, -100) > 9
            last[key] = step
    assert len(last) > 400
    # too small for the rest that is wished for: rows rest as long as they can, and every draw is full
    small = filled(40, length=10, rest_steps=9)
    assert all(len(small.draw(step, 100, "replay")) == 10 for step in range(20))


def test_loss_aware_draws_follow_the_last_losses_like_an_independent_simulation():
    buffer = filled(200, length=10, draw="loss_aware")
    losses = np.random.default_rng(0).exponential(1.0, 200).astype(np.float32)
    losses[:10] = np.nan
    buffer.log_scores(0, np.arange(200), losses)
    mean = np.nanmean(losses)
    weights = np.clip(np.where(np.isnan(losses), mean, losses) / mean, 0.1, 4)
    counts = np.zeros(200)
    for step in range(2, 6002):
        counts[buffer.draw(step, 30, "replay")] += 1
    expected = counts.sum() * weights / weights.sum()
    # independent draws give 199; that the rows of a draw are distinct takes a little from the likeliest
    assert ((counts - expected) ** 2 / expected).sum() < 320
    assert np.corrcoef(counts, expected)[0, 1] > 0.99


def simulate_mix_cd(bins, prior, events, margin, decay=0.99):
    """mix-cd in plain Python: per bin counts of damaged and replayed rows, decayed once a step."""
    damaged, replayed = {}, {}
    for keys, losses in events:
        for b in damaged:
            damaged[b] *= decay
            replayed[b] *= decay
        for key, loss in zip(keys, losses, strict=True):
            b = bins[key]
            damaged[b] = damaged.get(b, 0.0) + (loss > prior[key] + margin)
            replayed[b] = replayed.get(b, 0.0) + 1
    sizes = {b: bins.count(b) for b in set(bins)}
    weight = {b: sizes[b] * (damaged.get(b, 0.0) + 1) / (replayed.get(b, 0.0) + 2) for b in sizes}
    return {b: w / sum(weight.values()) for b, w in weight.items()}


def test_mix_cd_draws_damaged_bins_like_an_independent_simulation():
    random = np.random.default_rng(1)
    prior = random.gamma(2.0, 0.3, 400)
    kinds = ["weapons" if i % 4 else "drugs" for i in range(400)]
    buffer = ReplayBuffer(config(draw="mix_cd", damage_margin=0.3))
    buffer.insert(token_row(i, length=10, prior_nll=float(prior[i]), tags={"category": kinds[i]}) for i in range(400))
    edges = np.quantile(np.float32(prior), [0.25, 0.5, 0.75])
    bins = [(kinds[i], int((np.float32(prior[i]) >= edges).sum())) for i in range(400)]
    events = []
    for step in range(60):
        keys = buffer.draw(step, 160, "replay")
        losses = [np.float32(prior[k] + (1.0 if kinds[k] == "drugs" and k % 3 else 0.0)) for k in keys]
        buffer.log_scores(step, keys, losses)
        events.append((keys, losses))
    expected = simulate_mix_cd(bins, np.float32(prior), events, 0.3)
    for step in (61, 62, 63):  # the last two steps' losses count from step 61 on
        buffer.draw(step, 160, "replay")
    counts = dict.fromkeys(expected, 0)
    for step in range(64, 1264):
        for key in buffer.draw(step, 80, "replay"):
            counts[bins[key]] += 1
    total = sum(counts.values())
    for b, share in expected.items():
        assert abs(counts[b] / total - share) < 0.15 * share + 0.004
    assert sum(counts[b] for b in counts if b[0] == "drugs") / total > 0.4  # a quarter of the rows


def test_draws_use_losses_two_steps_later_however_early_they_are_asked_for():
    def run(ahead: bool) -> list[list[int]]:
        buffer = filled(300, length=10, draw="loss_aware")
        drawn = [buffer.draw(0, 200, "replay")]
        for step in range(30):
            if ahead:
                drawn.append(buffer.draw(step + 1, 200, "replay"))
            losses = np.random.default_rng(step).exponential(1.0, len(drawn[step]))
            buffer.log_scores(step, drawn[step], losses)
            if not ahead:
                drawn.append(buffer.draw(step + 1, 200, "replay"))
        return drawn

    assert run(ahead=True) == run(ahead=False)


def test_the_order_in_which_ranks_report_losses_does_not_matter():
    a, b = (filled(100, length=10, draw="loss_aware") for _ in range(2))
    # two streams may have drawn the same row: it is logged twice, with losses that differ in the last digits or more
    keys, losses = np.concatenate([np.arange(100), np.arange(50)]), np.linspace(0, 3, 150)
    a.log_scores(0, keys, losses)
    b.log_scores(0, keys[::-1], losses[::-1])
    assert all(a.draw(step, 100, "replay") == b.draw(step, 100, "replay") for step in range(2, 10))


def test_losses_that_come_after_a_draw_relied_on_them_are_refused():
    buffer = filled(50, draw="loss_aware")
    buffer.draw(5, 100, "replay")
    with pytest.raises(ReplayError, match="too late"):
        buffer.log_scores(3, [0], [1.0])
    with pytest.raises(ReplayError, match="in order"):
        buffer.draw(4, 100, "replay")
    filled(50).draw(0, 100, "replay")  # policies without a log draw any step at any time
