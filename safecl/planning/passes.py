"""The largest passes of a planned run: the fullest micro-batch of its steps, and the largest batches of its
evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from safecl.config.run import most_replayed
from safecl.data import TokenDataset
from safecl.data.assignment import assign
from safecl.engine.model.settings import choose_attention
from safecl.evaluation.answers.likelihood import LOGITS_BYTES
from safecl.evaluation.answers.prompts import encode_within
from safecl.evaluation.task import GENERATED
from safecl.evaluation.variants import asked_in, prefills_of
from safecl.planning.plans import RunPlan, TaskPlan

STEPS_LOOKED_AT = 64
"""Steps of a task, at equal distances, whose micro-batches are made."""
ROWS_OF_AN_EVALUATION = 32


@dataclass(frozen=True)
class Inference:
    """A batch of an evaluation: `rows` rows of `tokens` tokens, and the tokens that are then generated for each."""

    rows: int
    tokens: int
    answer: int = 0
    """0: the logits of all tokens are kept, to score a given answer."""

    @property
    def size(self) -> int:
        return self.rows * (self.tokens + self.answer)


@dataclass(frozen=True)
class Passes:
    """The largest passes of a rank. micro_batch: [rows, tokens]."""

    micro_batch: tuple[int, int]
    generated: Inference | None = None
    scored: Inference | None = None
    alignment_tokens: int = 0
    """Tokens of a rank in a step of the alignment stage, all micro-batches together."""


def largest_passes(plan: RunPlan, world_size: int, vocab: int) -> Passes:
    """Return the largest passes of a run on `world_size` ranks; a replay draw is one of random rows of the memory."""
    batches = [shape for task in plan.tasks for shape in _micro_batches(plan, task, world_size)]
    inferences = list(_inferences(plan, world_size, vocab))
    generated = [one for one in inferences if one.answer]
    scored = [one for one in inferences if not one.answer]
    return Passes(
        max(batches, key=lambda shape: (shape[0] * shape[1], shape[1])),
        max(generated, key=lambda one: one.size, default=None),
        max(scored, key=lambda one: one.size, default=None),
        max((-(-t.tokens_per_batch // world_size) for t in plan.tasks if t.config.role == "align"), default=0),
    )


def _micro_batches(plan: RunPlan, task: TaskPlan, world_size: int) -> Iterator[tuple[int, int]]:
    """Yield [rows, tokens] of the micro-batches of some steps, with their replayed rows, and of a Fisher estimate."""
    random = np.random.default_rng(0)
    methods = [method for method in plan.methods if method.config.acts_on == task.config.role]
    shares = {term.stream: term.share for method in methods for term in method.replay_terms()}
    of_their_own = [draw for method in methods for draw in method.gradient_draws(0)]
    for step in np.unique(np.linspace(0, task.num_steps - 1, STEPS_LOOKED_AT).astype(int)):
        lengths = task.dataset.lengths[task.order.rows_of_step(int(step))].tolist()
        lengths += [length for share in shares.values() for length in _draw(plan, task, random, share, plan.memory)]
        lengths += _prompts(plan, sum(term.prompts for method in methods for term in method.prompt_terms()), random)
        yield from _shapes(plan, lengths, world_size)
        for draw in of_their_own:
            drawn = plan.memory if draw.harmful is None else plan.harmful[draw.harmful]
            yield from _shapes(plan, _draw(plan, task, random, draw.share, drawn), world_size)
    for settings in plan.config.methods.values() if methods else ():
        size = getattr(settings, "rows_per_batch", None)
        if size is not None and settings.fisher_file is None and plan.memory is not None:
            chosen = np.sort(plan.memory.lengths)[-size:]
            yield from _shapes(plan, chosen.tolist(), world_size)


def _draw(
    plan: RunPlan, task: TaskPlan, random: np.random.Generator, share: float | None, rows: TokenDataset | None
) -> list[int]:
    """Return the lengths of one draw from `rows`, the memory's or harmful ones. share: see ReplayTerm."""
    if rows is None:
        return []
    lengths = random.permutation(rows.lengths)
    share = most_replayed(plan.config) if share is None else share
    wanted = max(1, round(share * task.tokens_per_batch))
    return lengths[: 1 + int(np.searchsorted(np.cumsum(lengths), wanted))].tolist()


def _prompts(plan: RunPlan, count: int, random: np.random.Generator) -> list[int]:
    """Return the lengths of so many of the memory's prompts."""
    if plan.memory is None or count == 0:
        return []
    return random.choice(plan.memory.lengths - plan.memory.num_targets, count).tolist()


def _shapes(plan: RunPlan, lengths: Sequence[int], world_size: int) -> Iterator[tuple[int, int]]:
    train = plan.config.train
    flash = choose_attention(plan.config.model.attention)[0] == "flash_attention_2"
    packed = train.packing == "packed" or (train.packing == "auto" and flash)
    ranks = assign(lengths, world_size=world_size, tokens_per_microbatch=train.tokens_per_microbatch, packed=packed)
    for rows in (rows for micros in ranks for rows in micros if rows):
        chosen = [lengths[row] for row in rows]
        yield (1, sum(chosen)) if packed else (len(chosen), max(chosen))


def _inferences(plan: RunPlan, world_size: int, vocab: int) -> Iterator[Inference]:
    safety = plan.config.safety
    if safety is not None and safety.every != "never" and plan.prompts:
        tokens = encode_within(None, plan.tokenizer, [*plan.prompts, *plan.benign])
        rows = min(safety.batch_size, -(-len(tokens) // world_size))
        for variant in safety.variants:
            asked = asked_in(variant, safety, plan.prompts, plan.benign)
            tokens += encode_within(None, plan.tokenizer, asked, None, prefills_of(variant, plan.tokenizer, asked))
        yield Inference(rows, max(map(len, tokens)), safety.max_new_tokens)
    for task in plan.tasks:
        if (settings := task.config.eval) is None or not task.eval_rows:
            continue
        longest, own = task.longest_evaluated, -(-len(task.eval_rows) // world_size)
        if settings.metric in GENERATED:
            yield Inference(min(ROWS_OF_AN_EVALUATION, own), longest, settings.max_new_tokens)
        else:
            yield Inference(min(max(1, LOGITS_BYTES // (4 * vocab * longest)), own), longest)
