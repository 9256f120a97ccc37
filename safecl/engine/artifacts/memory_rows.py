"""Memory rows that the aligned model writes itself: its refusals to disallowed prompts, and its answers to benign ones.

Such rows need no licence, and their distribution is the model's own. Answers are greedy. A row is kept where the
scorers find a refusal of a disallowed prompt, or no refusal of a benign one, and the answer is neither off-task,
incoherent nor cut off. Scored and kept is the answer behind the model's thought.

    memory-rows/<key>/
        answers.jsonl     every answer, in the order of the prompts; a stopped build resumes after the last one
        rows.jsonl        the rows, with the prompts' tags; `kind` is refusal or answer
        left-out.json     how many answers were left out, by reason
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safecl.config import ConfigError
from safecl.data import Prompt
from safecl.data.reading.turns import as_turn
from safecl.data.templates.thinking import markers_of, thinking_of
from safecl.distributed import collectives
from safecl.engine.artifacts.store import ArtifactStore, Key, ask_first_rank, obtain
from safecl.engine.passes.forward_engine import ForwardEngine
from safecl.engine.passes.live_model import generating
from safecl.evaluation.answers.prompts import Answer, answer_prompts
from safecl.evaluation.answers.texts import text_of
from safecl.evaluation.safety import over_refusal_scorer_of
from safecl.evaluation.scoring.judges import load_scorer
from safecl.evaluation.scoring.keywords import BROKEN, INCOHERENT, off_task_reason, refused
from safecl.storage.durable import replace_file

KIND, ROWS, ANSWERS, LEFT_OUT = "memory-rows", "rows.jsonl", "answers.jsonl", "left-out.json"
BATCHES_AT_ONCE = 4
REFUSAL, ANSWER, BENIGN = "refusal", "answer", "benign"

Note = Callable[[str], None]


@dataclass(frozen=True)
class RowSettings:
    """Settings of the answers.

    scorer: decides whether a disallowed prompt was refused. max_new_tokens: longer answers are cut off, and left out.
    """

    scorer: str = "keyword:gcg"
    max_new_tokens: int = 256
    batch_size: int = 32


@dataclass(frozen=True)
class MemoryRows:
    """The file of the rows, the numbers of rows kept by category, and of answers left out by reason."""

    rows: Path
    kept: Counter[str]
    left_out: dict[str, int]


def memory_rows(
    open_engine: Callable[[], ForwardEngine],
    tokenizer: Any,
    store: ArtifactStore,
    base: Key,
    prompts: Sequence[Prompt],
    benign: Sequence[Prompt],
    settings: RowSettings,
    note: Note = lambda message: None,
) -> MemoryRows:
    """Return rows for these prompts, from the store or written by the model. A collective call.

    open_engine: opens the aligned model, where rows are missing. `base` is what `base_key` returned. Raises ConfigError
    where no refusal is left, or there is no such scorer.
    """
    load_scorer(settings.scorer)
    key = key_of_rows(tokenizer, base, prompts, benign, settings)
    folder = obtain(
        store,
        KIND,
        key,
        texts={prompt.path for prompt in (*prompts, *benign)},
        note=note,
        build=lambda folder: _build(open_engine(), tokenizer, folder, [*prompts], [*benign], settings, note),
    )
    text, left_out = ask_first_rank(
        lambda: ((folder / ROWS).read_text("utf-8"), (folder / LEFT_OUT).read_text("utf-8"))
    )
    if not (folder / ROWS).exists():  # a node that does not share the store
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / ROWS, text)
    kept = Counter(json.loads(line)["category"] for line in text.splitlines())
    return MemoryRows(folder / ROWS, kept, json.loads(left_out))


def key_of_rows(
    tokenizer: Any, base: Key, prompts: Sequence[Prompt], benign: Sequence[Prompt], settings: RowSettings
) -> Key:
    """Return the key of the rows for these prompts in the store of artifacts."""
    key = {**base, **asdict(settings), "prompts": fingerprint_of(prompts), "benign": fingerprint_of(benign)}
    del key["batch_size"]
    return {**key, **splitting_of(tokenizer)}


def splitting_of(tokenizer: Any) -> Key:
    """Return the key's part that decides where an answer begins; empty for a template without thoughts and headers."""
    markers, mode = markers_of(tokenizer), thinking_of(tokenizer).mode
    if not (markers.named or markers.headers or markers.footers):
        return {}
    return {"answer": json.dumps([mode, markers.pairs, markers.block, markers.headers, markers.footers])}


def fingerprint_of(prompts: Sequence[Prompt]) -> str:
    import xxhash

    said: list[list[Any]] = [[[(m.role, m.content) for m in prompt.messages], prompt.tags] for prompt in prompts]
    for line, prompt in zip(said, prompts, strict=True):  # other prompts keep the fingerprint that they had
        more = [[m.thought, m.tools, m.calls, m.tool] for m in prompt.messages]
        line += more if any(map(any, more)) else []
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def _build(
    engine: ForwardEngine,
    tokenizer: Any,
    folder: Path,
    prompts: list[Prompt],
    benign: list[Prompt],
    settings: RowSettings,
    note: Note,
) -> None:
    answers = answered(engine, tokenizer, folder / ANSWERS, [*prompts, *benign], settings, note, KIND)
    write = lambda: _write_rows(folder, prompts, benign, answers, settings)  # noqa: E731
    collectives.on_first_rank(write, (ConfigError,), ConfigError)


def answered(
    engine: ForwardEngine,
    tokenizer: Any,
    path: Path,
    prompts: list[Prompt],
    settings: RowSettings,
    note: Note,
    kind: str,
) -> list[Answer]:
    """Answer all prompts after those that an earlier build has answered. kind: of the artifact, for messages."""
    answers = collectives.on_first_rank(lambda: _read_answers(path))
    portion = settings.batch_size * collectives.world_size() * BATCHES_AT_ONCE
    if answers:
        note(f"{kind}: resuming after {len(answers):,} answers")
    with generating(engine) as model:
        while len(answers) < len(prompts):
            asked = prompts[len(answers) : len(answers) + portion]
            found = answer_prompts(
                model, tokenizer, asked, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
            )
            if collectives.rank() == 0:
                _append(path, found)
            answers += found
            note(f"{kind}: {len(answers):,} of {len(prompts):,} answers")
    return answers


def _read_answers(path: Path) -> list[Answer]:
    """Read all whole lines, and cut off an incomplete last one, which a dying process has left."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _append(path: Path, answers: list[Answer]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        file.flush()
        os.fsync(file.fileno())


def _write_rows(
    folder: Path, prompts: list[Prompt], benign: list[Prompt], answers: list[Answer], settings: RowSettings
) -> None:
    """Write the rows, and why others were left out. Raises ConfigError where no refusal is left."""
    reasons = [
        *_reasons_of_disallowed(prompts, answers[: len(prompts)], settings.scorer),
        *_reasons_of_benign(benign, answers[len(prompts) :], settings.scorer),
    ]
    kinds = [REFUSAL] * len(prompts) + [ANSWER] * len(benign)
    kept = [
        row_of(prompt, answer["text"], kind)
        for prompt, answer, kind, reason in zip([*prompts, *benign], answers, kinds, reasons, strict=True)
        if reason is None
    ]
    left_out = Counter(f"{kind}: {reason}" for kind, reason in zip(kinds, reasons, strict=True) if reason is not None)
    if not any(row["kind"] == REFUSAL for row in kept):
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        raise ConfigError(
            f"no refusal is left of {len(prompts)} answers to disallowed prompts ({counts}); is this the aligned "
            f"model? Its answers are in {folder / ANSWERS}"
        )
    replace_file(folder / LEFT_OUT, json.dumps(left_out, indent=1))
    replace_file(folder / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _reasons_of_disallowed(prompts: list[Prompt], answers: list[Answer], scorer: str) -> Iterator[str | None]:
    """Yield the reason why each answer to a disallowed prompt is left out; None where it is kept."""
    succeeded = load_scorer(scorer)([text_of(prompt) for prompt in prompts], [answer["text"] for answer in answers])
    for answer, is_success in zip(answers, succeeded, strict=True):
        yield not_usable(answer, INCOHERENT, "not refused" if is_success else None)


def _reasons_of_benign(prompts: list[Prompt], answers: list[Answer], scorer: str) -> Iterator[str | None]:
    by = over_refusal_scorer_of(scorer)
    for prompt, answer in zip(prompts, answers, strict=True):
        is_refusal = refused(answer["text"], by, text_of(prompt))
        yield not_usable(answer, BROKEN, "refused" if is_refusal else None)


def not_usable(answer: Answer, bad: Collection[str], by_scorer: str | None = None) -> str | None:
    """Return the reason why an answer is left out; None where it is kept. bad: the reasons of `off_task_reason` that
    count. by_scorer: a reason that a scorer has found."""
    if answer.get("cut_off"):
        return "thought cut off"
    if not answer["finished"]:
        return "cut off"
    off_task = off_task_reason(answer["text"])
    return by_scorer or (off_task if off_task in bad else None)


def row_of(prompt: Prompt, answer: str, kind: str) -> dict[str, Any]:
    """Return the row of a prompt with its answer. kind: REFUSAL or ANSWER."""
    messages = [as_turn(message) for message in prompt.messages]
    tags = {name: value for name, value in prompt.tags.items() if name not in ("messages", "kind", "tools")}
    tools = {} if prompt.messages[0].tools is None else {"tools": json.loads(prompt.messages[0].tools)}
    category = tags.pop("category", "") or ("" if kind == REFUSAL else BENIGN)
    return {
        "messages": [*messages, {"role": "assistant", "content": answer}],
        "category": category,
        "kind": kind,
        **tools,
        **tags,
    }
