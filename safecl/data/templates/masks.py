"""Token ids and loss masks of messages: which tokens are trained.

All turns of the assistant are trained, each with the token that ends it, so that the model learns to stop. The place of
a turn in the text comes from the template's `{% generation %}` markers. Without markers it comes from prefixes: turn i
begins where the rendering of messages[:i], with the opening of an answer, ends. Both are verified:

    text    render(messages[:i], opening) is a prefix of render(messages)
    tokens  encode(text[:start]) is a prefix of encode(text): the answer follows the same ids as in generation

Where the texts differ, the template is at fault, and the error names it. Where only the tokens differ (an answer that
begins with a newline, after a template that ends with one), the text is cut at the boundary and encoded in two parts,
which gives the ids that the model sees when it generates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from safecl.data.messages import ChatRow, DataError, Message, RowProblem
from safecl.data.reading.files import where
from safecl.data.templates.chat import (
    CLOSE,
    OPEN,
    control_tokens,
    encode_pieces,
    end_tokens,
    has_markers,
    marked_content,
    refusal,
    render,
    render_marked,
    split_literals,
    template_source,
    turn_shape,
    without_marks,
)
from safecl.data.templates.endings import Span, cut_behind_end, settle_end
from safecl.data.templates.turn_forms import call_names
from safecl.data.templates.written import after_thought, compare, probes_of
from safecl.data.tokens import Row, content_digest, row_key


@dataclass(frozen=True)
class Encoded:
    """A tokenised row. ids: int32 [length]; loss_mask: bool [length]; num_tokens: length before it was cut; notes: what
    the template does not write of it."""

    ids: np.ndarray
    loss_mask: np.ndarray
    num_tokens: int
    notes: tuple[str, ...] = ()


@dataclass
class _Chat:
    """One conversation between rendering and encoding.

    marked: character ranges that the template's markers enclose, None without markers. spans: those of trained turns.
    """

    messages: tuple[Message, ...]
    text: str = ""
    marked: list[Span] | None = None
    spans: list[Span] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    problem: RowProblem | None = None


def tokenize_row(tokenizer: Any, row: ChatRow, max_length: int) -> Row:
    """Tokenise one row and cut it to `max_length` tokens.

    Raises: DataError, with file and line, where the row has no supervised token or the template refuses it.
    """
    encoded = tokenize_rows(tokenizer, [row], max_length)[0]
    if isinstance(encoded, RowProblem):
        raise DataError(f"{where(row.path, row.line)}: {encoded}")
    return Row(row_key(content_digest(row), 0), encoded.ids, encoded.loss_mask)


def tokenize_rows(tokenizer: Any, rows: Sequence[ChatRow], max_length: int) -> list[Encoded | RowProblem]:
    """Tokenise many rows at once; a row that cannot be used gives a RowProblem in its place.

    Raises: DataError where the chat template breaks the prefix property, so that no mask can be trusted.
    """
    plain = [i for i, row in enumerate(rows) if row.messages[0].role == "text"]
    chats = [i for i, row in enumerate(rows) if row.messages[0].role != "text"]
    texts = _encode_texts(tokenizer, [rows[i].messages[0].content for i in plain])
    conversations = _encode_chats(tokenizer, [rows[i] for i in chats])
    encoded = dict(zip(plain, texts, strict=True)) | dict(zip(chats, conversations, strict=True))
    return [_cut(encoded[i], max_length) for i in range(len(rows))]


def _cut(encoded: Encoded | RowProblem, max_length: int) -> Encoded | RowProblem:
    if isinstance(encoded, RowProblem):
        return encoded
    mask = encoded.loss_mask[:max_length].copy()
    mask[:1] = False  # nothing before the first token can predict it
    if not mask.any():
        first = int(np.argmax(encoded.loss_mask[1:])) + 2  # counted from 1
        cut = f"cut to max_length {max_length}: the answer begins at token {first} of {encoded.num_tokens}"
        reason = cut if encoded.num_tokens > max_length else "in a row this short"
        return RowProblem(f"no supervised token is left, {reason}")
    return replace(encoded, ids=encoded.ids[:max_length], loss_mask=mask)


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[Encoded]:
    """Encode raw texts with every token trained: the tokenizer's special tokens around the text, and an end token."""
    encoded = []
    for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else []:
        ids = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
        encoded.append(Encoded(np.asarray(ids, np.int32), np.ones(len(ids), bool), len(ids)))
    return encoded


def _encode_chats(tokenizer: Any, rows: Sequence[ChatRow]) -> list[Encoded | RowProblem]:
    chats = [_Chat(row.messages) for row in rows]
    _render_all(tokenizer, chats)
    _compare_all(tokenizer, [chat for chat in chats if chat.problem is None])
    _locate_turns(tokenizer, chats, rows)
    good = [chat for chat in chats if chat.problem is None]
    tokens, ends = control_tokens(tokenizer), end_tokens(tokenizer) if good else ()
    for chat in good:
        said = [part for m in chat.messages for part in (m.content.strip(), m.thought, *call_names(m)) if part]
        spans = [settle_end(chat.text, span, tokens) for span in chat.spans]
        chat.spans = [cut_behind_end(chat.text, span, said, tokens, ends) for span in spans]
    encoded = iter(_encode_spans(tokenizer, good))
    return [chat.problem or _with_notes(next(encoded), chat) for chat in chats]


def _compare_all(tokenizer: Any, chats: list[_Chat]) -> None:
    written = compare(tokenizer, [chat.messages for chat in chats], [chat.text for chat in chats])
    for chat, found in zip(chats, written, strict=True):
        chat.problem, chat.notes = found.problem, tuple(found.notes)


def _with_notes(encoded: Encoded | RowProblem, chat: _Chat) -> Encoded | RowProblem:
    return replace(encoded, notes=chat.notes) if isinstance(encoded, Encoded) and chat.notes else encoded


# ------------------------------------------------------------------------------------------------ places of the turns


def _render_all(tokenizer: Any, chats: list[_Chat]) -> None:
    try:
        rendered = _rendered(tokenizer, [chat.messages for chat in chats])
    except Exception as error:  # a template may raise anything; rendering one by one shows which row is at fault
        if len(chats) > 1:
            for chat in chats:
                _render_all(tokenizer, [chat])
        else:
            chats[0].problem = refusal(tokenizer, error)
        return
    for chat, (text, marked) in zip(chats, rendered, strict=True):
        chat.text, chat.marked = text, marked


def _rendered(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> Sequence[tuple[str, list[Span] | None]]:
    if has_markers(tokenizer):
        return render_marked(tokenizer, conversations)
    return [(text, None) for text in render(tokenizer, conversations)]


def _locate_turns(tokenizer: Any, chats: list[_Chat], rows: Sequence[ChatRow]) -> None:
    """Fill in the spans of what is trained: all that the template marks, or the turns, found from prefixes. Of marks
    and flags in the data that choose among the turns, both count."""
    by_prefix = []
    for chat, row in zip(chats, rows, strict=True):
        if chat.problem is not None:
            continue
        wanted = [i for i, m in enumerate(chat.messages) if m.is_trained]
        if chat.marked is not None and all(m.train is None for m in chat.messages):
            chat.spans = chat.marked
        elif (owners := _owners(tokenizer, chat)) is not None and all(chat.messages[i].role != "user" for i in wanted):
            chat.spans = [span for i, span in zip(owners, chat.marked or [], strict=True) if i in wanted]
        else:
            by_prefix.append((chat, row, wanted))
    if by_prefix:
        _locate_by_prefix(tokenizer, by_prefix)
    for chat in chats:
        if chat.problem is None and not chat.spans:
            source = template_source(tokenizer)
            chat.problem = RowProblem(f"the chat template ({source}) marks nothing of what this row wants trained")


def _owners(tokenizer: Any, chat: _Chat) -> list[int] | None:
    """The message that each mark belongs to, by a rendering of probes; None where that has other marks."""
    if chat.marked is None:
        return None
    probes = probes_of(chat.messages)
    try:
        text, marked = render_marked(tokenizer, [probes])[0]
    except Exception:  # as below
        return None
    if len(marked) != len(chat.marked):
        return None
    marks = [probe.content or call_names(probe)[0] for probe in probes]
    ends = [text.find(mark) + len(mark) for mark in marks]
    answers = [i for i, probe in enumerate(probes) if probe.role == "assistant"]
    return [next((i for i in answers if ends[i] > start), answers[-1]) for start, _ in marked]


def _locate_by_prefix(tokenizer: Any, todo: list[tuple[_Chat, ChatRow, list[int]]]) -> None:
    openings = [(chat.messages[:i], chat.messages[i].role == "assistant") for chat, _, wanted in todo for i in wanted]
    # The last turn ends with the text; only earlier turns need a rendering of their own.
    closings = [
        (chat.messages[: i + 1], False) for chat, _, wanted in todo for i in wanted if i + 1 < len(chat.messages)
    ]
    opened, closed = iter(_render_prefixes(tokenizer, openings)), iter(_render_prefixes(tokenizer, closings))
    shape, tokens = turn_shape(tokenizer), control_tokens(tokenizer)
    for chat, row, wanted in todo:
        chat.spans = []
        for i in wanted:
            start, stop = next(opened), next(closed) if i + 1 < len(chat.messages) else chat.text
            span = _span(chat.text, start, stop) or _earlier_span(tokenizer, chat, i, start, shape, tokens)
            if span is None:
                raise _no_prefix(tokenizer, row, i)
            chat.spans += _marks_within(chat, i, span)


def _marks_within(chat: _Chat, i: int, span: Span) -> list[Span]:
    """The marked parts of an answer; the whole turn where the template has no marks, or somebody else speaks."""
    if chat.marked is None or chat.messages[i].role != "assistant":
        return [span]
    parts = [(max(start, span[0]), min(stop, span[1])) for start, stop in chat.marked]
    return [(start, stop) for start, stop in parts if start < stop]


def _span(text: str, start: str | None, stop: str | None) -> Span | None:
    """Return the part of `text` between two of its prefixes, or None where they are not such prefixes."""
    if start is None or stop is None or not text.startswith(start) or not text.startswith(stop):
        return None
    return (len(start), len(stop)) if len(stop) > len(start) else None


def _render_prefixes(tokenizer: Any, prefixes: list[tuple[tuple[Message, ...], bool]]) -> list[str | None]:
    """Render prefixes, given as (messages, whether an answer opens). None where the template refuses one."""
    out: list[str | None] = [""] * len(prefixes)
    for opening in (True, False):
        chosen = [i for i, (messages, flag) in enumerate(prefixes) if messages and flag == opening]
        try:
            texts: Sequence[str | None] = render(tokenizer, [prefixes[i][0] for i in chosen], generation_prompt=opening)
        except Exception:  # as above
            if len(prefixes) == 1:
                return [None]
            texts = [_render_prefixes(tokenizer, [prefixes[i]])[0] for i in chosen]
        for i, text in zip(chosen, texts, strict=True):
            out[i] = text
    return out


def _earlier_span(
    tokenizer: Any, chat: _Chat, i: int, opened: str | None, shape: tuple[str, str], tokens: tuple[str, ...]
) -> Span | None:
    """Find an earlier answer that the template renders otherwise than the last one.

    Qwen3 opens only the last answer with a <think> block, and Phi-3 closes only the last with one more token. An
    earlier one follows the turns before it and the header, as its content and the end of a turn.
    """
    text, message = chat.text, chat.messages[i]
    if message.role != "assistant" or i + 1 == len(chat.messages) or opened is None:
        return None
    header = next(
        (k for k, (a, b) in enumerate(zip(text, opened, strict=False)) if a != b), min(len(text), len(opened))
    )
    given = _render_prefixes(tokenizer, [(chat.messages[:i], False)])[0]
    if given is None or not text.startswith(given):
        if header < len(opened):
            return None
        given = opened
    before, after = shape
    if message.calls is not None:
        return _span_of_calls(
            tokenizer, chat.text, message, header + len(before) if text.startswith(before, header) else header
        )
    content = marked_content(tokenizer, message)
    answer = after_thought(content)  # templates leave the thoughts of earlier answers out
    bodies = [content, content.strip(), *(() if answer is None else (answer, answer.strip()))]
    starts = [header + len(before) if text.startswith(before, header) else header, *range(header, len(given) - 1, -1)]
    for start in starts:
        for body in bodies:
            stop = start + len(body)
            if text.startswith(body, start) and (text.startswith(after, stop) or text.startswith(tokens, stop)):
                return min(start, header), stop  # settle_end adds the end token
    return None


def _span_of_calls(tokenizer: Any, text: str, message: Message, start: int) -> Span | None:
    """The part of the text from `start` to the first token that ends an answer, if all calls stand in it."""
    ends = "|".join(map(re.escape, end_tokens(tokenizer)))
    found = re.compile(f"(?<!{OPEN})(?:{ends})").search(text, start)
    stop = found.start() if found else len(text)
    written = without_marks(text[start:stop])
    return (start, stop) if all(name in written for name in call_names(message)) else None


def _no_prefix(tokenizer: Any, row: ChatRow, i: int) -> DataError:
    source = template_source(tokenizer)
    return DataError(
        f"{where(row.path, row.line)}: the chat template ({source}) does not write before message {i + 1} what it "
        "writes when that message is to be generated, so the trained part cannot be separated from the rest; mark "
        "the assistant's turns in a copy of the template with {% generation %} ... {% endgeneration %} and name the "
        "copy in model.chat_template"
    )


# --------------------------------------------------------------------------------------------------------- ids and mask


def _encode_spans(tokenizer: Any, chats: list[_Chat]) -> list[Encoded | RowProblem]:
    """Encode whole texts in one batch, and in parts the rows with control tokens in their own text or with a token
    across a boundary."""
    simple = [i for i, chat in enumerate(chats) if OPEN not in chat.text and CLOSE not in chat.text]
    out: list[Encoded | RowProblem | None] = [None] * len(chats)
    if tokenizer.is_fast and simple:
        for i, encoded in zip(simple, _encode_whole(tokenizer, [chats[i] for i in simple]), strict=True):
            out[i] = encoded
    return [encoded or _encode_in_parts(tokenizer, chat) for encoded, chat in zip(out, chats, strict=True)]


def _encode_whole(tokenizer: Any, chats: list[_Chat]) -> list[Encoded | None]:
    texts = [chat.text for chat in chats]
    quiet = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    batch = tokenizer(texts, return_offsets_mapping=True, **quiet)
    checks = [(row, start) for row, chat in enumerate(chats) for start in _starts_to_check(chat)]
    prefixes = [texts[row][:start] for row, start in checks]
    prefix_ids = iter(tokenizer(prefixes, **quiet)["input_ids"] if prefixes else [])
    verified: list[dict[int, int | None]] = [{} for _ in chats]
    for row, start in checks:
        ids = next(prefix_ids)
        verified[row][start] = len(ids) if batch["input_ids"][row][: len(ids)] == ids else None
    return [
        _mask_whole(ids, offsets, chat.spans, starts)
        for ids, offsets, chat, starts in zip(batch["input_ids"], batch["offset_mapping"], chats, verified, strict=True)
    ]


def _starts_to_check(chat: _Chat) -> list[int]:
    """Return the boundaries whose prefix is encoded for comparison: the last one, and those after a space.

    The last prefix covers all before it. Some tokenizers leave a space out of a token's offsets, which then cannot show
    that a token crosses the boundary.
    """
    starts = [start for start, _ in chat.spans]
    return [start for start in starts if start == starts[-1] or chat.text[start - 1 : start] == " "]


def _mask_whole(
    ids: list[int], offsets: list[Span], spans: list[Span], verified: dict[int, int | None]
) -> Encoded | None:
    """Mask the trained turns; None where a token crosses the start of one. `verified`: first token by its start."""
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for start, stop in spans:
        first: int | None = int(np.searchsorted(ends, start, side="right"))  # first token that ends after the boundary
        if start in verified:
            first = verified[start]
        elif first is not None and first < len(ids) and begins[first] < start:
            first = None
        if first is None:
            return None
        mask[first : int(np.searchsorted(begins, stop, side="left"))] = True
    return Encoded(np.asarray(ids, np.int32), mask, len(ids))


def _encode_in_parts(tokenizer: Any, chat: _Chat) -> Encoded | RowProblem:
    """Encode with cuts at both ends of every trained turn: exact for any tokenizer, but slower."""
    pieces = split_literals(chat.text, [edge for span in chat.spans for edge in span])
    try:
        ids = encode_pieces(tokenizer, pieces)
    except RowProblem as problem:
        return RowProblem(f"{problem}, as the chat template ({template_source(tokenizer)}) needs it")
    trained = [any(start <= piece.start < stop for start, stop in chat.spans) for piece in pieces]
    mask = np.repeat(trained, [len(part) for part in ids])
    return Encoded(np.asarray([i for part in ids for i in part], np.int32), mask, len(mask))
