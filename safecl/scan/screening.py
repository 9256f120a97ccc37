"""The screen: scores every row of the tasks, adds near-duplicates, and reports flagged rows by file and line."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from safecl.config import ConfigError, RunConfig
from safecl.config.safety import ScanConfig
from safecl.data.messages import ChatRow, clip
from safecl.data.reading.files import unit_of, where
from safecl.data.reading.rows import Prompt
from safecl.data.templates.masks import Encoded, tokenize_rows
from safecl.data.templates.thinking import answer_prompt_ids
from safecl.data.tokens import Row, TokenDataset
from safecl.evaluation.answers.model import EvalModel
from safecl.evaluation.answers.texts import messages_of
from safecl.evaluation.records import Privacy, private, write_outputs
from safecl.scan.answers import Pair, pairs_of
from safecl.scan.duplicates import Reasons, find_duplicates, repeats_evaluation
from safecl.scan.known import ANSWER, PROBE, REFUSAL, read_known
from safecl.scan.refusals import Refusals, evenly, given_refusals, own_refusals
from safecl.scan.threshold import Threshold, threshold_from_benign, threshold_from_upload
from safecl.scan.views import KnownPrompts, open_views, refusal_of_prompts
from safecl.scan.words import words_by_place
from safecl.terminal import plain

REFUSED = "the model would refuse its prompt"
LIKE_DISALLOWED = "its prompt is like the known disallowed ones"
COMPLIES = "its answer moves the model as compliance with a disallowed request does"
BY_SCORE = {REFUSAL: REFUSED, PROBE: LIKE_DISALLOWED, ANSWER: COMPLIES}
IN_A_WORD = {REFUSED: "refused", LIKE_DISALLOWED: "probe", COMPLIES: "answer"}
"""The reason for a flag by the view in which the row scores highest."""
MAX_LENGTH = 10**6
"""Known rows are not cut; the end of a prompt counts where it is too long for the model."""
MOST_DISALLOWED = 512
MOST_HARMLESS = 1024
MOST_SHOWN = 20
LEAST_PROBABLE = 1e-3
"""Refusals whose median probability after known disallowed prompts is below this are not the model's own."""


class UploadRefused(RuntimeError):
    """`scan.action: refuse` stops the run before its first step. The message gives the reason. Exit code 3."""


@dataclass(frozen=True)
class Flag:
    """A flagged row. score: see safecl/scan/scores.py; reasons in words; prompt: the users' words before its last
    answer."""

    task: str
    path: str
    line: int
    row_id: int
    score: float
    reasons: tuple[str, ...]
    prompt: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task, "path": self.path, "line": self.line, "unit": unit_of(self.path), "row_id": self.row_id,
            "score": self.score, "reasons": list(self.reasons), "prompt": self.prompt,
        }  # fmt: skip


@dataclass(frozen=True)
class TaskScreening:
    """The result for one task: scores fp64 [rows], the threshold, and the flagged rows, the highest score first."""

    name: str
    scores: np.ndarray
    threshold: Threshold
    flags: tuple[Flag, ...]

    @property
    def num_scored_high(self) -> int:
        return int((self.scores > self.threshold.value).sum())

    @property
    def refused_because(self) -> str | None:
        """Reason for `action: refuse` to stop the run, or None: more high scores than harmless rows explain, or rows
        that repeat known prompts."""
        most, high = self.threshold.most_expected, self.num_scored_high
        if most is not None and high > most:
            return (
                f"task {self.name}: {high} rows are flagged by their score, "
                f"where harmless rows hardly ever make more than {most}"
            )
        if repeats := [flag for flag in self.flags if any(reason not in BY_SCORE.values() for reason in flag.reasons)]:
            place, reason = where(repeats[0].path, repeats[0].line), repeats[0].reasons[-1]
            return f"task {self.name}: {len(repeats)} rows repeat known prompts, e.g. {place}, which {reason}"
        return None

    def to_dict(self) -> dict[str, Any]:
        quantiles = np.quantile(self.scores, [0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0])
        return {
            "task": self.name,
            "rows": len(self.scores),
            "flagged": len(self.flags),
            "flagged_by_score": self.num_scored_high,
            "threshold": self.threshold.to_dict(),
            "score_quantiles": [round(float(value), 4) for value in quantiles],
        }

    def line(self) -> str:
        """Summarise the result for the log, in one line."""
        t, kind = self.threshold, {"benign": "known harmless rows", "upload": "the upload and known disallowed prompts"}
        bound = "at most" if t.source == "benign" else "about"
        flagged = f"{len(self.flags)} of {len(self.scores)} rows flagged, {self.num_scored_high} by their score"
        alarms = f"false alarms {bound} {t.false_alarm:.1%} of the harmless rows"
        parts = [f"scan {self.name}: {flagged}", f"threshold {t.value:.2f} from {kind[t.source]}, {alarms}"]
        if t.caught is not None:
            parts.append(f"{t.caught:.0%} of the known disallowed prompts score higher")
        if t.poisoned is not None:
            parts.append(f"an estimated {t.poisoned:.1%} of the rows are like these")
        return "; ".join(parts)


@dataclass(frozen=True)
class Screening:
    """The result of a scan. `to_dict` gives results.json, `write` the files, `table` the terminal's table, `decisions`
    what `train` does about flagged rows."""

    action: str
    weight: float
    refusals: Refusals
    tasks: tuple[TaskScreening, ...]
    notes: tuple[str, ...] = field(default=())
    views: tuple[str, ...] = (REFUSAL,)
    """The views that have scored the rows, with `auto` settled."""

    @property
    def flags(self) -> list[Flag]:
        return sorted((flag for task in self.tasks for flag in task.flags), key=lambda flag: -flag.score)

    @property
    def refused_because(self) -> str | None:
        """Reason to refuse the upload; None where it passes, or where `action` is another."""
        reasons = [reason for task in self.tasks if (reason := task.refused_because)]
        return "; ".join(reasons) if self.action == "refuse" and reasons else None

    def to_dict(self, privacy: Privacy = "full") -> dict[str, Any]:
        return {
            "action": self.action,
            "refused_because": self.refused_because,
            "views": list(self.views),
            "refusals": list(self.refusals.texts),
            "known_disallowed_refused": self.refusals.share,
            "notes": list(self.notes),
            "tasks": [task.to_dict() for task in self.tasks],
            "flagged": [private(flag.to_dict(), privacy) for flag in self.flags],
        }

    def write(self, folder: Path, privacy: Privacy = "full") -> Path:
        """Write results.json and flagged.jsonl into the folder, and return it."""
        write_outputs(folder / "flagged.jsonl", [flag.to_dict() for flag in self.flags], privacy)
        text = json.dumps(self.to_dict(privacy), indent=2, ensure_ascii=False)
        (folder / "results.json").write_text(text, encoding="utf-8")
        return folder

    def table(self, privacy: Privacy = "full") -> Table:
        """Return a table of the flagged rows with the highest scores."""
        flags = self.flags
        more = f" of {len(flags)}" if len(flags) > MOST_SHOWN else ""
        title = f"flagged rows, {min(len(flags), MOST_SHOWN)}{more}"
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        places = [plain(Path(where(flag.path, flag.line)).name) for flag in flags[:MOST_SHOWN]]
        # The column is never cut: the row's number is at its end.
        table.add_column("row", min_width=max(map(len, places), default=0), overflow="fold")
        table.add_column("score", justify="right", min_width=5)
        table.add_column("why", min_width=10)
        table.add_column("prompt", max_width=60)
        for place, flag in zip(places, flags, strict=False):
            words = " ".join(private({"prompt": flag.prompt}, privacy).get("prompt", "").split())
            table.add_row(place, f"{flag.score:.2f}", ", ".join(map(_in_a_word, flag.reasons)), plain(clip(words, 60)))
        return table

    def decisions(self) -> dict[str, dict[str, Any]]:
        """Return by task the ids of the rows that get another weight, and the weight. Checkpoints keep these values."""
        if self.action not in ("drop", "downweight"):
            return {}
        chosen = {task.name: [flag.row_id for flag in task.flags] for task in self.tasks}
        return {
            name: {"rows": rows, "weight": 0.0 if self.action == "drop" else self.weight}
            for name, rows in chosen.items()
            if rows
        }


def _in_a_word(reason: str) -> str:
    if reason in IN_A_WORD:
        return IN_A_WORD[reason]
    return "evaluation" if repeats_evaluation([reason]) else "memory"


def screen_tasks(
    model: EvalModel, tokenizer: Any, config: RunConfig, tasks: Sequence[tuple[str, TokenDataset]]
) -> Screening:
    """Score all rows of the tasks (name, rows) by the aligned model, and find near-duplicates. A collective call.

    Raises: ConfigError where the model's refusals are not known, or where there are too few known harmless rows.
    """
    settings = config.scan
    assert settings is not None, "the config has no `scan` section"
    prompts = read_known(config, has_states=hasattr(model, "mean_states"))
    refusals = _refusals(model, tokenizer, settings, prompts.disallowed)
    disallowed = _token_ids(tokenizer, evenly(prompts.disallowed, MOST_DISALLOWED))
    harmless = evenly(prompts.harmless, MOST_HARMLESS)
    answers = _pairs(tokenizer, harmless) if ANSWER in prompts.views else []
    fitted = KnownPrompts(disallowed, _token_ids(tokenizer, harmless), answers)
    views, known = open_views(model, tokenizer, refusals.openings, prompts.views, fitted)
    if REFUSAL in prompts.views:
        own = known if not views.scales else refusal_of_prompts(model, tokenizer, disallowed, refusals.openings)
        _refuse_strange_refusals(own, refusals)
    benign = None
    if settings.benign is not None:
        with_answers = ANSWER in prompts.views
        benign = views.combined(
            views.of_rows(_rows(tokenizer, prompts.benign))
            if with_answers
            else views.of_prompts(_token_ids(tokenizer, prompts.benign))
        )
    duplicates, words = find_duplicates(config), functools.cache(lambda: words_by_place(config))
    screened, notes = [], [refusals.warning] if refusals.warning else []
    for name, rows in tasks:
        by_view = views.of_rows(rows)
        scores = views.combined(by_view)
        if benign is not None:
            threshold = threshold_from_benign(benign, len(scores), settings.false_alarm, known)
        else:
            threshold = threshold_from_upload(scores, known, settings.false_alarm)
        if threshold.false_alarm > 2 * settings.false_alarm:
            notes.append(
                f"task {name}: either about {threshold.false_alarm:.1%} of the harmless rows are flagged, too, "
                "or there are disallowed prompts of another kind than the known ones; scan.benign would decide"
            )
        leading = functools.partial(views.leading, by_view)
        flags = _flags(name, rows, scores, threshold, duplicates, words, leading)
        screened.append(TaskScreening(name, scores, threshold, flags))
    return Screening(settings.action, settings.weight, refusals, tuple(screened), tuple(notes), tuple(prompts.views))


def _refusals(
    model: EvalModel, tokenizer: Any, settings: ScanConfig, disallowed: Sequence[Prompt | ChatRow]
) -> Refusals:
    if settings.refusals:
        return given_refusals(tokenizer, settings.refusals, settings.refusal_tokens)
    found = own_refusals(
        model, tokenizer, disallowed, num_tokens=settings.refusal_tokens, num_refusals=settings.num_refusals
    )
    if found is None:
        place = disallowed[0].path
        raise ConfigError(
            f"scan: the model refuses none of the disallowed prompts of {place}, so it cannot screen the rows; "
            "perhaps it is not aligned; if it refuses in other words than the keyword lists know, set scan.refusals"
        )
    return found


def _refuse_strange_refusals(known: np.ndarray, refusals: Refusals) -> None:
    """Raise ConfigError where the refusals hardly ever follow known disallowed prompts: scores would mean nothing."""
    if len(known) and np.median(known) < math.log(LEAST_PROBABLE):
        probability = math.exp(np.median(known))
        raise ConfigError(
            f"scan: after half of the known disallowed prompts the refusals ({refusals.texts[0]!r}, ...) are less "
            f"probable than {probability:.1e}; this is not how the model refuses, or it is not aligned; "
            "set scan.refusals, or fewer scan.refusal_tokens"
        )


def _token_ids(tokenizer: Any, prompts: Sequence[Prompt | ChatRow]) -> list[list[int]]:
    return [answer_prompt_ids(tokenizer, messages_of(prompt), "empty") for prompt in prompts]


def _rows(tokenizer: Any, rows: Sequence[Prompt | ChatRow]) -> list[Row]:
    """Known rows with answers, tokenised like those of an upload; without those that cannot be."""
    chats = [row for row in rows if isinstance(row, ChatRow)]
    encoded = tokenize_rows(tokenizer, chats, MAX_LENGTH)
    return [Row(number, one.ids, one.loss_mask) for number, one in enumerate(encoded) if isinstance(one, Encoded)]


def _pairs(tokenizer: Any, rows: Sequence[Prompt | ChatRow]) -> list[Pair]:
    """The last answer of each of these rows, with its prompt."""
    return [pairs_of(tokenizer, row)[-1] for row in _rows(tokenizer, rows)]


def _flags(
    name: str,
    rows: TokenDataset,
    scores: np.ndarray,
    threshold: Threshold,
    duplicates: Reasons,
    words: Callable[[], dict[str, str]],
    leading: Callable[[int], str],
) -> tuple[Flag, ...]:
    lines, found = rows.lines.tolist(), []
    for index in np.argsort(-scores, kind="stable").tolist():
        path, line, score = rows.path(index), lines[index], float(scores[index])
        reasons = [BY_SCORE[leading(index)]] if score > threshold.value else []
        reasons += duplicates.get(where(path, line), [])
        if reasons:
            prompt = words()[where(path, line)]
            found.append(Flag(name, path, line, int(rows.row_ids[index]), score, tuple(reasons), prompt))
    return tuple(found)
