"""`safecl compare A B [PROMPTS]`: the answers of two models side by side, recorded, generated now, or typed live."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from safecl.commands.spinner import working
from safecl.config import ConfigError, ModelConfig
from safecl.evaluation.gates.folders import RESULTS, Measured, read_measured
from safecl.evaluation.gates.outcomes import Record, in_order_of
from safecl.storage.model_folder import tuned_model
from safecl.storage.records import read_record
from safecl.storage.run_records import Results
from safecl.terminal import Terminal, plain

if TYPE_CHECKING:
    from safecl.data import Prompt

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Pair:
    """A prompt and both answers; None where the text was not kept."""

    prompt: str | None
    answers: tuple[str | None, str | None]
    marks: tuple[str, str] = ("", "")
    """What is known of the answers: refused, complied, off-task."""


def compare_models(
    a: str, b: str, prompts: Path | None, *, live: bool, every: bool, max_prompts: int, max_new_tokens: int
) -> None:
    """Print pairs of answers.

    prompts: asked now. live: prompts are read from the standard input, a line each. Without both, the answers that the
    folders of two runs or evaluations hold are shown; those that differ in their marks, unless `every`. Raises
    ConfigError.
    """
    console = Terminal(soft_wrap=False)
    if not live and prompts is None:
        pairs = recorded_pairs(read_measured(a), read_measured(b))
        changed = [pair for pair in pairs if pair.marks[0] != pair.marks[1]]
        shown = (pairs if every else changed)[:max_prompts]
        for pair in shown:
            _print(pair, short_names(a, b), console)
        console.print(f"{len(changed)} of {len(pairs)} answers are of another kind; {len(shown)} shown")
        return
    models = []
    for path in (a, b):
        with working(f"loading {path}"):
            models.append(Answering.load(path, max_new_tokens))
    read = None if live else _read(prompts, max_prompts)
    of_all = "" if read is None else f" of {len(read)}"
    for number, prompt in enumerate(_typed(console) if read is None else read, 1):
        with working(f"answering prompt {number}{of_all}"):
            answers = tuple(model.answer(prompt) for model in models)
        _print(Pair(prompt.text, (answers[0], answers[1])), short_names(a, b), console)


def recorded_pairs(first: Measured, second: Measured) -> list[Pair]:
    """Pair the recorded answers of two folders by prompt. Raises ConfigError where the prompts differ, or no records
    were kept."""
    ours, theirs = first.safety.outputs, second.safety.outputs
    if not ours or not theirs:
        empty = first if not ours else second
        raise ConfigError(f"{empty.folder}: no recorded answers there (outputs/); name a file of PROMPTS to ask now")
    scorers = first.safety.scorer, second.safety.scorer
    return [
        Pair(
            record.get("prompt"),
            (record.get("answer"), other.get("answer")),
            (_mark(record, scorers[0]), _mark(other, scorers[1])),
        )
        for record, other in zip(ours, in_order_of(ours, theirs), strict=True)
    ]


def _mark(record: Record, scorer: str) -> str:
    if record.get("cut_off"):
        return "no answer"
    if record["set"].endswith("benign"):
        return "refused" if any(record["refused"].values()) else "answered"
    succeeded = record["attack_succeeded"].get(scorer)
    if succeeded is None:
        return "no verdict"
    if not succeeded:
        return "refused"
    return (
        f"off-task ({record['off_task']})"
        if record["off_task"]
        else "complied"
        if record["complied"]
        else "not refused"
    )


# --------------------------------------------------------------------------------------------------------------- asking


@dataclass
class Answering:
    """A model and its tokenizer, to ask one prompt at a time."""

    model: Any
    tokenizer: Any
    max_new_tokens: int

    @classmethod
    def load(cls, path: str, max_new_tokens: int) -> Answering:
        """Load a model folder, the tuned model of a run, or the model that an evaluation was of. Raises ConfigError."""
        from safecl.data import load_tokenizer
        from safecl.evaluation.answers.model import HFEvalModel

        folder = model_of(path)
        model = HFEvalModel.load(folder, dtype="auto")
        return cls(model, load_tokenizer(ModelConfig(path=folder)), max_new_tokens)

    def answer(self, prompt: Prompt) -> str:
        """Answer greedily."""
        from safecl.evaluation.answers.prompts import answer_prompts

        found = answer_prompts(self.model, self.tokenizer, [prompt], max_new_tokens=self.max_new_tokens, batch_size=1)
        return found[0]["text"]


def short_names(a: str, b: str) -> tuple[str, str]:
    """Return the last parts of two paths, as many as tell them apart."""
    parts = Path(a).parts, Path(b).parts
    for count in range(1, max(map(len, parts)) + 1):
        names = str(Path(*parts[0][-count:])), str(Path(*parts[1][-count:]))
        if names[0] != names[1]:
            return names
    return a, b


def model_of(path: str) -> str:
    """Return the model that a folder stands for: a run's tuned model, an evaluation's, or the folder itself."""
    if (tuned := tuned_model(path)) is not None:
        return str(tuned)
    found = read_record(Path(path) / RESULTS, Results)
    if found is not None and (model := found.get("model")):
        return model
    return path


def _read(path: Path | None, max_prompts: int) -> Sequence[Prompt]:
    from safecl.data import read_prompts

    return read_prompts(str(path), max_prompts)


def _typed(console: Terminal) -> Iterator[Prompt]:
    """Yield a prompt for each line of the standard input, until it ends."""
    from safecl.data import Message, Prompt

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        console.print("one prompt a line; Ctrl-D ends", style="dim")
    number = 0
    while True:
        if is_terminal:
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        number += 1
        if line.strip():
            yield Prompt((Message("user", line.strip()),), "typed", number)


# ------------------------------------------------------------------------------------------------------------- printing


def _print(pair: Pair, names: tuple[str, str], console: Terminal) -> None:
    title = "(the prompt was not kept)" if pair.prompt is None else pair.prompt
    table = Table(title=plain(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    for name, mark in zip(names, pair.marks, strict=True):
        table.add_column(plain(f"{name}{': ' + mark if mark else ''}"), ratio=1, overflow="fold")
    table.add_row(*(plain("(not kept)" if text is None else text or "(empty)") for text in pair.answers))
    console.print(table)
