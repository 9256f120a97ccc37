"""Answers of a run for its page: the same prompts at the first and the last moment, changed answers first.

Answers are shown only where `privacy.examples` of the run is `full`. With `hashed` the outputs hold no text, and hashes
would be of no use to a reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safecl.evaluation.records import outputs_file
from safecl.evaluation.results.moment import Evaluation
from safecl.report.folder import ReportedRun
from safecl.storage.records import read_lines
from safecl.storage.run_records import Answer

CUT_OFF = "(no answer: the thought does not end)"
MOST_ANSWERS = 6
LONGEST_ANSWER = 400

Pairs = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Answers:
    """Prompts with one answer per title. num_prompts: all of them; only the first few are shown."""

    titles: list[str]
    prompts: Pairs
    num_prompts: int


def answers_of(run: ReportedRun) -> Answers | None:
    """Return the answers at the first and the last moment of safety; None where there are none to show."""
    safe = [evaluation for evaluation in run.evaluations if evaluation.safety is not None]
    ends = safe if len(safe) < 2 else [safe[0], safe[-1]]
    found = [answers_at(run, evaluation) for evaluation in ends]
    if not found or not found[0]:
        return None
    return Answers([evaluation.when for evaluation in ends], side_by_side(found), len(found[0]))


def answers_at(run: ReportedRun, evaluation: Evaluation) -> dict[str, str]:
    """Return the answer to each disallowed prompt at that moment; empty where privacy forbids it or files are
    missing."""
    if run.privacy != "full":
        return {}
    records = read_lines(outputs_file(run.folder / "outputs", evaluation.when, evaluation.step), Answer)
    return {
        record["prompt"]: CUT_OFF if record.get("cut_off") else record["answer"]
        for record in records
        if record["set"] == "disallowed" and "prompt" in record and "answer" in record
    }


def withheld(run: ReportedRun) -> bool:
    """Say whether answers exist and privacy forbids to show them."""
    return run.privacy != "full" and any(evaluation.safety for evaluation in run.evaluations)


def side_by_side(answers: Sequence[Mapping[str, str]], most: int = MOST_ANSWERS) -> Pairs:
    """Pair the prompts that all have answered with their answers, differing answers first. Long texts are cut."""
    common = [prompt for prompt in answers[0] if all(prompt in other for other in answers)]
    common.sort(key=lambda prompt: len({other[prompt] for other in answers}) == 1)
    return [(_cut(prompt), [_cut(other[prompt]) for other in answers]) for prompt in common[:most]]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " ..."
