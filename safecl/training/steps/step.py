"""The rows of a step: task rows with their distances to teachers, and rows that are replayed from the memory.

Every rank makes the same list. Each row carries its weight in the loss, normaliser included; a rank loads only the rows
that it computes. Task rows depend on (seed, step), replayed rows also on the memory's score log.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from safecl.data import Row, TaskOrder, TokenDataset
from safecl.engine.model.features import Layers, layer_numbers
from safecl.engine.passes.step_rows import (
    HIDDEN,
    Asked,
    Distillation,
    LabelMean,
    Labels,
    Question,
    RowConstraint,
    RowNoise,
    StepRow,
    count_tokens,
)
from safecl.methods.base import Method
from safecl.methods.terms import PromptTerm, ReplayTerm, TaskTerm
from safecl.planning.loss_mean import token_weights
from safecl.planning.plans import TaskPlan
from safecl.training.recorded.teachers import access_to_teacher
from safecl.training.steps.state import RunState

TASK = "task"
"""Name of the step's own gradient, and of the term that its task rows belong to."""
TOO_SMALL_TO_COUNT = 1e-30


def rows_by_gradient(run: RunState, task: TaskPlan, step: int) -> dict[str, list[StepRow]]:
    """Return the rows of every gradient of a step: those that methods take by themselves, and `TASK`."""
    draws = [draw for method in run.active_methods for draw in method.gradient_draws(step)]
    return {draw.stream: drawn_rows(run, draw, step) for draw in draws} | {TASK: step_rows(run, task, step)}


def drawn_rows(run: RunState, draw: ReplayTerm, step: int) -> list[StepRow]:
    """Return the rows of one draw from the memory, or from harmful rows, weighted as it says."""
    if draw.harmful is not None:
        return _harmful_rows(run, draw, step)
    return _replay_rows(run, draw.stream, [draw], step)


def _harmful_rows(run: RunState, draw: ReplayTerm, step: int) -> list[StepRow]:
    """Return a step's rows of one draw from harmful rows: epochs of them in an order of their own."""
    assert draw.harmful is not None and run.task is not None
    data, wanted = run.harmful[draw.harmful], round((draw.share or 1.0) * run.task.tokens_per_batch)
    order = TaskOrder(data, seed=run.seed, tokens_per_batch=max(1, wanted), max_steps=1)
    indices = order.rows_of_step(run.first_step + step)
    weight = draw.ce_weight / max(1, int(data.num_targets[indices].sum()))
    rows = dataset_rows(data, indices, np.full(len(indices), weight))
    noises = _noises(run, draw, indices, data, step)
    return [
        replace(row.weighted(draw.stream, row.ce_weight), index=None, every_layer=draw.every_layer, noise=noise)
        for row, noise in zip(rows, noises, strict=True)
    ]


def _noises(
    run: RunState, draw: ReplayTerm, indices: np.ndarray, data: TokenDataset, step: int
) -> list[RowNoise | None]:
    """Return the noise that these rows' hidden states are compared with: a function of the seed, the step and the
    row."""
    if draw.noise_weight == 0:
        return [None] * len(indices)
    has_targets = data.num_targets[indices] > 0
    weight, first = draw.noise_weight / max(1, int(has_targets.sum())), f"{run.seed} noise {run.first_step + step}"
    ids = data.row_ids[indices].tolist()
    return [
        RowNoise(weight, random.Random(f"{first} {row_id}").getrandbits(62)) if has else None
        for row_id, has in zip(ids, has_targets, strict=True)
    ]


def step_rows(run: RunState, task: TaskPlan, step: int) -> list[StepRow]:
    """Return the rows of the step's own gradient: task rows first, or the draw that takes their place, then one draw
    from the memory per stream."""
    instead = memory_step(run.active_methods, step, task.num_steps)
    rows = drawn_rows(run, instead, step) if instead is not None else task_rows(run, task, step)
    for stream, terms in _by_stream(run.active_methods).items():
        rows += _with_labels(run, stream, _replay_rows(run, stream, terms, step, is_steered=True))
    for prompt_term in prompt_terms(run.active_methods):
        rows += run.prompt_anchors.rows_of_step(prompt_term, run.first_step + step)
    return rows


def memory_step(methods: Sequence[Method[Any]], step: int, num_steps: int) -> ReplayTerm | None:
    """Return the draw that takes the place of the task's rows in a step; None for an ordinary step."""
    draws = [draw for method in methods if (draw := method.memory_step(step, num_steps)) is not None]
    return draws[0] if draws else None


def task_terms(methods: Sequence[Method[Any]]) -> list[TaskTerm]:
    """Return the terms of these methods that have a weight."""
    return [term for method in methods for term in method.task_terms() if term.weight > 0]


def prompt_terms(methods: Sequence[Method[Any]]) -> list[PromptTerm]:
    """Return the prompt terms of these methods that have a weight."""
    return [term for method in methods for term in method.prompt_terms() if term.weight > 0]


# ------------------------------------------------------------------------------------------------------------ task rows


def dataset_rows(
    data: TokenDataset, indices: np.ndarray, ce_weights: np.ndarray, row_weights: np.ndarray | None = None
) -> list[StepRow]:
    """Return these rows of a data set as rows of a step.

    ce_weights: weight of each token of these rows, fp64 [rows]. row_weights [N] multiply the weight of single rows.
    """
    sizes = zip(indices.tolist(), data.lengths[indices].tolist(), data.num_targets[indices].tolist(), strict=True)
    weights = (ce_weights if row_weights is None else ce_weights * row_weights[indices].astype(np.float64)).tolist()
    return [
        StepRow(TASK, length, targets, functools.partial(_load_row, data, i), weight, index=i)
        for (i, length, targets), weight in zip(sizes, weights, strict=True)
    ]


def _load_row(data: TokenDataset, index: int) -> tuple[Row, None]:
    return data.row(index), None


def task_rows(run: RunState, task: TaskPlan, step: int) -> list[StepRow]:
    """Return the task's rows of a step, with their distances to teachers."""
    data, indices, terms = task.dataset, task.order.rows_of_step(step), task_terms(run.active_methods)
    factors, mixed = _row_factors(run, task, indices, step), _mixed_rows(run, step)
    token_factors = _token_factors(run, task, indices)
    counted = _token_factors(run, task, indices, counted=True)
    num_all = np.concatenate([data.num_targets[indices], [row.num_targets for row in mixed]]).astype(np.int64)
    if counted is not None:
        num_all = np.concatenate([[own.sum() for own in counted], num_all[len(indices) :]]).astype(np.float64)
    if factors is not None:
        factors = np.concatenate([factors, np.full(len(mixed), factors.mean())])
    ce_weights = token_weights(run.config.train.loss_mean, num_all, task.median_targets, factors)
    rows = dataset_rows(data, indices, ce_weights[: len(indices)], task.row_weights)
    constraints, shapes = _constraints(run, task, indices), _distance_factors(run, task, indices)
    of_tokens: Sequence[np.ndarray | None] = [None] * len(indices) if token_factors is None else token_factors
    totals = [_num_compared(term, data.lengths[indices], data.num_targets[indices]) for term in terms]
    steered = run.steering.weight_at(run.first_step + step)
    terms = [term if steered == 1.0 else replace(term, weight=steered * term.weight) for term in terms]
    return [
        replace(
            row,
            distillations=tuple(
                _shaped(_task_distillation(run, task, int(i), term, total), term, row.ce_weight, place, shapes)
                for term, total in zip(terms, totals, strict=True)
            ),
            constraint=constraint,
            token_factors=own,
        )
        for place, (row, i, constraint, own) in enumerate(zip(rows, indices, constraints, of_tokens, strict=True))
    ] + [replace(row, ce_weight=weight) for row, weight in zip(mixed, ce_weights[len(indices) :].tolist(), strict=True)]


def _mixed_rows(run: RunState, step: int) -> list[StepRow]:
    """Return the memory's rows that join the task's own mean, without their weights."""
    terms = [term for method in run.active_methods for term in method.replay_terms() if term.mixed]
    return [row.weighted(term.stream, 0.0) for term in terms for row in _drawn(run, term.stream, term.share, step)]


def _row_factors(run: RunState, task: TaskPlan, indices: np.ndarray, step: int) -> np.ndarray | None:
    """Return the product of the methods' factors of these rows, fp64 [rows]; None where no method has any."""
    found: list[np.ndarray | None] = []
    for method in run.active_methods:
        if scores := scores_of(run, method, task, indices):
            found.append(method.row_factors(scores))
        if method.config.follows_row_losses:
            found.append(method.learned_factors(step, indices.tolist()))
    factors = [own for own in found if own is not None]
    return functools.reduce(np.multiply, factors) if factors else None


def _token_factors(
    run: RunState, task: TaskPlan, indices: np.ndarray, *, counted: bool = False
) -> list[np.ndarray] | None:
    """Return the product of the methods' factors of these rows' tokens, fp32 [tokens] each; None without any.

    counted: only of the methods whose factors change the number of tokens that the mean is over.
    """
    product: list[np.ndarray] | None = None
    for method in run.active_methods:
        if counted and not method.factors_count:
            continue
        if (scores := scores_of(run, method, task, indices)) and (own := method.token_factors(scores)) is not None:
            product = own if product is None else [a * b for a, b in zip(product, own, strict=True)]
    return product


def _distance_factors(run: RunState, task: TaskPlan, indices: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Return the factors of the distances of these rows' tokens by term, fp32 [tokens] for each row."""
    found: dict[str, list[np.ndarray]] = {}
    for method in run.active_methods:
        if (scores := scores_of(run, method, task, indices)) and (own := method.distance_factors(scores)) is not None:
            found |= dict.fromkeys((term.name for term in method.task_terms()), own)
    return found


def _shaped(
    distillation: Distillation, term: TaskTerm, ce_weight: float, place: int, shapes: dict[str, list[np.ndarray]]
) -> Distillation:
    """Give a shaped distance the weight of its row's cross-entropy. place: of the row in the step. shapes: what
    `_distance_factors` returned."""
    if not term.shaped:
        return distillation
    factors = shapes[term.name][place] if term.name in shapes else None
    return replace(distillation, weight=term.weight * ce_weight, token_factors=factors)


def scores_of(run: RunState, method: Method[Any], task: TaskPlan, indices: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Return a method's scores of these rows of a task, by name: fp32 [tokens] for each row."""
    return {score.name: run.row_scores.of_rows(task.config.name, score, indices) for score in method.scores()}


def _constraints(run: RunState, task: TaskPlan, indices: np.ndarray) -> list[RowConstraint | None]:
    """Return the constraint on the tokens of each row; the last method that has one counts."""
    found: list[RowConstraint | None] = [None] * len(indices)
    for method in run.active_methods:
        if (rule := method.token_constraint()) is not None:
            (score,) = (score for score in method.scores() if score.name == rule.score)
            given = run.row_scores.of_rows(task.config.name, score, indices)
            found = [RowConstraint(rule, log_probs) for log_probs in given]
    return found


def _task_distillation(run: RunState, task: TaskPlan, index: int, term: TaskTerm, total: int) -> Distillation:
    """Return the distance of a term on one task row. total: tokens of the whole step that the term is a mean over."""
    access = access_to_teacher(term, run.has_adapters)
    asked: Asked | None = None
    load: Callable[[], Any] | None = None
    if access == "online":
        asked = _question(run, term)
        load = asked.answer
    elif access == "recorded":
        load = functools.partial(run.recorded_teachers.load, task.config.name, term.name, index)
    return Distillation(
        term.divergence,
        term.weight / total,
        term.temperature,
        term=term.name,
        load=load,
        live=access == "adapters off",
        tokens=term.tokens,
        layers=_layers(run, term),
        larger=term.larger,
        asked=asked,
    )


def _num_compared(term: TaskTerm, lengths: np.ndarray, num_targets: np.ndarray) -> int:
    """The number of tokens of these rows that a term is a mean over; 1 where there are none."""
    tokens = term.tokens if term.divergence == HIDDEN else "supervised"
    return max(1, int(count_tokens(tokens, lengths, num_targets).sum()))


def _question(run: RunState, term: TaskTerm) -> Asked:
    if term.divergence == HIDDEN:
        return Asked(term.teacher, Question("hidden", term.tokens, _layers(run, term)))
    return _topk_question(run, term.teacher, term.k, term.temperature)


def _topk_question(run: RunState, source: str, k: int, temperature: float) -> Asked:
    return Asked(source, Question("topk", k=min(k, int(run.engine.module.vocab_size)), temperature=temperature))


def _layers(run: RunState, term: TaskTerm) -> Layers:
    return layer_numbers(term.layers, run.engine.module.num_layers)


# -------------------------------------------------------------------------------------------------------- replayed rows


def _replay_rows(
    run: RunState, stream: str, terms: list[ReplayTerm], step: int, *, is_steered: bool = False
) -> list[StepRow]:
    """Return one draw from the memory, weighted as the terms of its stream say. is_steered: the controller acts on it,
    which is so for draws that enter the step's own gradient."""
    memory = run.memory
    assert memory is not None
    share_factor, weight_factor = run.steering.factors(run.first_step + step) if is_steered else (1.0, 1.0)
    share = next((term.share for term in terms if term.share is not None), None)
    drawn = _drawn(run, stream, share, step, share_factor)
    total = max(1, sum(row.num_targets for row in drawn))
    ce_weight = weight_factor * sum(term.ce_weight for term in terms) / total
    if ce_weight == 0 and memory.follows_losses:
        ce_weight = TOO_SMALL_TO_COUNT  # the head computes cross-entropies only where they have a weight
    kd_weights = {term.divergence: 0.0 for term in terms if term.kd_weight > 0}
    for term in terms:
        if term.kd_weight > 0:
            kd_weights[term.divergence] += weight_factor * term.kd_weight / total
    online = [distance for term in terms for distance in term.distances if distance.weight > 0]
    lengths, targets = np.array([row.length for row in drawn]), np.array([row.num_targets for row in drawn])
    counts = [_num_compared(term, lengths, targets) for term in online]
    return [
        row.weighted(
            stream,
            ce_weight,
            _replay_distillations(run, kd_weights)
            + tuple(
                _online_distance(run, term, weight_factor, count) for term, count in zip(online, counts, strict=True)
            ),
        )
        for row in drawn
    ]


def _online_distance(run: RunState, term: TaskTerm, factor: float, count: int) -> Distillation:
    """Return a distance of one replayed row to an online teacher. count: tokens of the whole draw that have it."""
    assert term.online, "only online teachers answer about replayed rows"
    asked = _question(run, term)
    return Distillation(
        term.divergence,
        factor * term.weight / count,
        term.temperature,
        term=term.name,
        load=asked.answer,
        tokens=term.tokens,
        layers=_layers(run, term),
        larger=term.larger,
        asked=asked,
    )


def _drawn(run: RunState, stream: str, share: float | None, step: int, factor: float = 1.0) -> list[StepRow]:
    """Return a draw of the memory. share: see ReplayTerm. factor: of the replay ratio, which has it without a share."""
    settings, memory, task = run.config.memory, run.memory, run.task
    assert settings is not None and memory is not None and task is not None
    if share is None:
        share = factor * settings.replay_ratio_at(min(1.0, step / max(1, task.num_steps - 1)))
    wanted = max(1, round(share * task.tokens_per_batch))
    return memory.draw(run.first_step + step, wanted, stream)


def _with_labels(run: RunState, stream: str, rows: list[StepRow]) -> list[StepRow]:
    """Return the rows of a draw with their part in the information over labels; the last method that asks counts."""
    for term in (term for method in run.active_methods for term in method.label_terms() if term.stream == stream):
        if term.weight > 0 and (count := sum(row.num_targets > 0 for row in rows)):
            mean = LabelMean(tuple(run.row_scores.answer_ids(text)[0] for text in term.labels))
            labels = Labels(term.name, term.weight / count, term.sharpen, mean)
            rows = [replace(row, labels=labels) if row.num_targets else row for row in rows]
    return rows


def _replay_distillations(run: RunState, weights: dict[str, float]) -> tuple[Distillation, ...]:
    """Return the distances of one replayed row to its stored outputs, or to the answer of an online teacher.

    weights: by divergence.
    """
    assert run.config.memory is not None
    teacher = run.config.memory.teacher
    if teacher.kind == "topk" or not weights:
        return tuple(Distillation(divergence, weight, teacher.temperature) for divergence, weight in weights.items())
    asked = _topk_question(run, teacher.source, teacher.k, teacher.temperature)
    return tuple(
        Distillation(divergence, weight, teacher.temperature, load=asked.answer, asked=asked)
        for divergence, weight in weights.items()
    )


def _by_stream(methods: Sequence[Method[Any]]) -> dict[str, list[ReplayTerm]]:
    """Return replay terms by stream: those of one stream share their rows."""
    streams: dict[str, list[ReplayTerm]] = {}
    for method in methods:
        for term in method.replay_terms():
            if not term.mixed and (term.ce_weight or term.kd_weight or term.distances or term.stream not in streams):
                streams.setdefault(term.stream, []).append(term)
    return streams
