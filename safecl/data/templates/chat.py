"""The tokenizer with its chat template, and the text that the template renders.

The template is the file that `model.chat_template` names, else the tokenizer's own, else, for base models, a plain one:

    Answer briefly.

    User: What is two and two?
    Assistant: Four.</s>

A control token (`<|im_end|>`, `</s>`, ...) in the text of a message is encoded as text, not as the token, so that a row
cannot end its own turn and open another. Only the template writes control tokens. `text` rows are encoded as they are.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.config import ConfigError, ModelConfig
from safecl.config.texts import visible
from safecl.data.hub import refuse_unreachable, tokenizer_source
from safecl.data.messages import DataError, Message, RowProblem, clip
from safecl.data.templates.template_dates import fix_clock, set_date
from safecl.data.templates.tokenizer_class import remembering_class
from safecl.data.templates.trial import TooLong, try_in_a_child
from safecl.data.templates.turn_forms import forms_of
from safecl.storage.model_records import ModelRecords
from safecl.storage.untrusted import code_of, library_error

log = logging.getLogger("safecl")

# No newline follows the end token, and no space the colon. Every boundary between prompt and answer is then one that
# any tokenizer also makes when it sees the prompt alone.
PLAIN_TEMPLATE = (
    "{{ BOS }}{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private-use characters that enclose a control token in a message's own text, from rendering to encoding.
OPEN, CLOSE = "\uf8f0", "\uf8f1"
START, STOP = "\uf8f2", "\uf8f3"  # ends of a generation mark
_TAG = re.compile(r"\{%([-+]?)\s*(generation|endgeneration)\s*([-+]?)%\}")
_INNER_MARKS = re.compile(f"[{OPEN}{CLOSE}{START}{STOP}]")
_PROBE = "safecl probe answer"
_ANY_TEXT = "".join(map(chr, range(32, 127))) * 4 + "\n\u00e9\u4e2d" * 8


def load_tokenizer(model: ModelConfig, key: str | None = None, records: ModelRecords | None = None) -> Any:
    """Load the model's tokenizer and set its chat template and pad token. The log names the template.

    Args: `key`: the config key that an error names; by default the one that gives the tokenizer; `records`: remember
    which class the tokenizer has, since finding out imports the code of models.
    Raises: ConfigError where there is no tokenizer, the template does not work, or nothing ends an answer.
    """
    tokenizer = _from_pretrained(model, key or ("model.tokenizer" if model.tokenizer else "model.path"), records)
    if tokenizer.eos_token is None:
        name = model.tokenizer or model.path
        raise ConfigError(
            f"{name}: the tokenizer has no end-of-text token, so answers could not end; set `eos_token` in its folder"
        )
    _settle_template(tokenizer, model)
    _try_without_trust(tokenizer)
    set_date(tokenizer, model.template_date)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is neither attended to nor trained: no new token is needed
    _try_template(tokenizer)
    tokenizer.safecl_thinking = model.thinking  # for safecl.data.templates.thinking
    log.info("chat template: %s", template_source(tokenizer))
    return tokenizer


def _from_pretrained(model: ModelConfig, key: str, records: ModelRecords | None) -> Any:
    name = model.tokenizer or model.path
    refuse_unreachable(key, name)
    try:
        source, options = tokenizer_source(name)
        if model.trust_remote_code and (code := code_of(Path(source))):
            log.warning("%s: model.trust_remote_code is set, so code of %s runs: %s", key, name, ", ".join(code))
        if records is not None and not model.trust_remote_code and not options:
            return remembering_class(source, records, lambda: _chosen_by_the_library(source))
        return _chosen_by_the_library(source, trust_remote_code=model.trust_remote_code, **options)
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds for a missing, broken or unreachable tokenizer
        reason = clip(library_error(error), 200)
        raise ConfigError(f"{key}: {name}: no tokenizer could be loaded from here: {reason}") from None


def _chosen_by_the_library(source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def _settle_template(tokenizer: Any, model: ModelConfig) -> None:
    name = model.tokenizer or model.path
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"model.chat_template: {model.chat_template} cannot be read: {reason}") from None
        tokenizer.safecl_template = f"the file {model.chat_template}"
    elif tokenizer.chat_template:
        if isinstance(tokenizer.chat_template, dict):
            tokenizer.chat_template = tokenizer.chat_template.get("default") or next(
                iter(tokenizer.chat_template.values())
            )
        tokenizer.safecl_template = f"the tokenizer's own ({name})"
    else:
        use_plain_template(tokenizer)


def use_plain_template(tokenizer: Any) -> None:
    """Give a base model's tokenizer the plain `User: ... / Assistant: ...` template."""
    starts_with_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ BOS }}", "{{ bos_token }}" if starts_with_bos else "")
    tokenizer.safecl_template = "safecl's plain `User: ... Assistant: ...`, since the tokenizer has none"


def template_source(tokenizer: Any) -> str:
    """Origin of the chat template, in words."""
    return getattr(tokenizer, "safecl_template", "the tokenizer's own")


def _try_without_trust(tokenizer: Any) -> None:
    """Render and encode short texts in a child process first: neither may take long, or much memory."""
    system, user, answer = Message("system", _ANY_TEXT), Message("user", _ANY_TEXT), Message("assistant", _ANY_TEXT)

    def encode() -> None:
        tokenizer(_ANY_TEXT, add_special_tokens=False)

    def render_some() -> None:
        for messages in ([user, answer] * 3, [system, user, answer]):
            try:
                render(tokenizer, [messages])
            except MemoryError:
                raise
            except Exception:  # a template may refuse turns; `_try_template` reports its errors
                continue

    for what, work in (("the tokenizer", encode), (f"the chat template ({template_source(tokenizer)})", render_some)):
        try:
            try_in_a_child(work)
        except TooLong as error:
            raise ConfigError(f"{what} does not work: {error}") from None
        except RuntimeError as error:
            raise ConfigError(f"{what} does not work: {clip(visible(str(error)), 160)}") from None


def _try_template(tokenizer: Any) -> None:
    probe = [Message("user", "question"), Message("assistant", _PROBE)]
    try:
        text = render(tokenizer, [probe])[0]
    except Exception as error:
        raise ConfigError(
            f"the chat template ({template_source(tokenizer)}) does not work: {clip(str(error), 160)}"
        ) from None
    if _PROBE not in text:
        raise ConfigError(f"the chat template ({template_source(tokenizer)}) leaves the assistant's answer out")
    source = template_source(tokenizer)
    if not turn_end(tokenizer).strip():
        log.warning(
            "the chat template (%s) writes no end token after an answer, so the model is not taught to stop", source
        )
    if has_markers(tokenizer) and _marks_others(tokenizer):
        log.warning("the chat template (%s) marks more than answers as generated, and all that is trained", source)


def _marks_others(tokenizer: Any) -> bool:
    """Whether the user's words stand inside a generation mark."""
    asked = "safecl probe question"
    text, marked = render_marked(tokenizer, [[Message("user", asked), Message("assistant", _PROBE)]])[0]
    place = text.find(asked)
    return any(start <= place < stop for start, stop in marked)


# ------------------------------------------------------------------------------------------------------------ rendering


def has_markers(tokenizer: Any) -> bool:
    """Whether the template marks the assistant's turns with `{% generation %}`."""
    return bool(_MARKER.search(tokenizer.chat_template))


@functools.lru_cache(maxsize=8)
def _control_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts of the special tokens, sorted."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_tokens)))


def without_marks(text: str) -> str:
    """Take the inner marks out of a text."""
    return _INNER_MARKS.sub("", text)


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """Put the control tokens in the texts of a value inside OPEN and CLOSE."""
    if isinstance(value, str):
        return pattern.sub(lambda m: f"{OPEN}{m[0]}{CLOSE}", without_marks(value))
    if isinstance(value, dict):
        return {_marked(key, pattern): _marked(item, pattern) for key, item in value.items()}
    return [_marked(item, pattern) for item in value] if isinstance(value, list) else value


def as_dicts(
    tokenizer: Any, messages: Sequence[Message], pattern: re.Pattern[str] | None = None
) -> list[dict[str, Any]]:
    """Convert messages to the form that the template takes, with control tokens in their text inside OPEN and CLOSE."""
    pattern = pattern or _control_pattern(control_tokens(tokenizer))
    forms = forms_of(tokenizer)
    return [forms.turn(message, lambda said: _marked(said, pattern)) for message in messages]


def marked_content(tokenizer: Any, message: Message) -> str:
    """The content of a message, with control tokens in it inside OPEN and CLOSE."""
    content: str = _marked(message.content, _control_pattern(control_tokens(tokenizer)))
    return content


Ranges = list[tuple[int, int]]


def _by_tools(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    render_some: Callable[[list[list[dict[str, Any]]], dict[str, Any]], Sequence[Any]],
) -> list[Any]:
    """Call `render_some(conversations, variables)` for the conversations of each list of tools. Returns all results."""
    pattern = _control_pattern(control_tokens(tokenizer))
    dates = fix_clock(tokenizer, tokenizer.chat_template)
    tools_of = [messages[0].tools if messages else None for messages in conversations]
    out: dict[int, Any] = {}
    for tools in dict.fromkeys(tools_of):
        chosen = [i for i, own in enumerate(tools_of) if own == tools]
        turns = [as_dicts(tokenizer, conversations[i], pattern) for i in chosen]
        given = {} if tools is None else {"tools": _marked(json.loads(tools), pattern)}
        out |= zip(chosen, render_some(turns, given | dates), strict=True)
    return [out[i] for i in range(len(conversations))]


def render(tokenizer: Any, conversations: Sequence[Sequence[Message]], *, generation_prompt: bool = False) -> list[str]:
    """Render each conversation as text, with control tokens in the messages' own text inside OPEN and CLOSE.

    Raises: any error of the template.
    """
    call = functools.partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=generation_prompt)
    return _by_tools(tokenizer, conversations, lambda turns, given: call(turns, **given))


def render_marked(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[tuple[str, Ranges]]:
    """Render as `render` does, and return the character ranges between `{% generation %}` and `{% endgeneration %}`.

    The library counts characters from the start of the macro or block that a mark stands in, which misplaces the mark.
    Here the template writes a character at each end of a mark, which is taken out again.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = _TAG.sub(_with_character, tokenizer.chat_template)
    fix_clock(tokenizer, template)

    def render_some(turns: list[list[dict[str, Any]]], given: dict[str, Any]) -> list[str]:
        variables = {**given, **tokenizer.special_tokens_map}
        texts: Any = render_jinja_template(turns, chat_template=template, **variables)[0]
        return list(texts)

    return [_take_out_marks(text) for text in _by_tools(tokenizer, conversations, render_some)]


def _with_character(tag: re.Match[str]) -> str:
    character = START if tag[2] == "generation" else STOP
    return f"{{%{tag[1]} {tag[2]} %}}{{% if true %}}{character}{{% endif {tag[3]}%}}"


def _take_out_marks(text: str) -> tuple[str, Ranges]:
    parts, ranges, length, start = [], [], 0, 0
    for part in re.split(f"([{START}{STOP}])", text):
        if part == START:
            start = length
        elif part == STOP:
            ranges.append((start, length))
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), [(start, stop) for start, stop in ranges if stop > start]


def refusal(tokenizer: Any, error: Exception) -> RowProblem:
    """Turn a template's own error (an unknown role, turns that do not alternate) into the row's problem."""
    reason = clip(str(error) or type(error).__name__, 80)
    return RowProblem(f"the chat template ({clip(template_source(tokenizer), 80)}) refuses this row: {reason}")


def turn_shape(tokenizer: Any) -> tuple[str, str]:
    """Texts that the template writes before and after a last answer's content: ("", "<|im_end|>\\n") for ChatML.

    The tokenizer remembers them for its template: many rows ask.
    """
    template = tokenizer.chat_template, dict(tokenizer.special_tokens_map)
    known = getattr(tokenizer, "safecl_turn_shape", None)
    if known is None or known[0] != template:
        known = tokenizer.safecl_turn_shape = template, _find_turn_shape(tokenizer)
    return known[1]


def _find_turn_shape(tokenizer: Any) -> tuple[str, str]:
    probe = [Message("user", "question"), Message("assistant", _PROBE)]
    text = render(tokenizer, [probe])[0]
    given = render(tokenizer, [probe[:1]], generation_prompt=True)[0]
    before, _, after = text.rpartition(_PROBE)
    return before[len(given) :] if before.startswith(given) else "", after


def turn_end(tokenizer: Any) -> str:
    """Text that the template writes after an answer, e.g. "<|im_end|>\\n"."""
    return turn_shape(tokenizer)[1]


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Tokens that end an answer: the end-of-text token, and the control tokens that the template writes after it."""
    after = turn_end(tokenizer)
    return tuple({tokenizer.eos_token: None} | {token: None for token in control_tokens(tokenizer) if token in after})


def stop_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer."""
    return sorted({tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer)))})


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the turns before an answer, with the opening of the assistant's turn: the input of generation.

    These ids also stand before the answer in training, with one exception: after an earlier answer whose start the
    tokenizer joins with the template, the same text may have other tokens.

    Raises: DataError where the template refuses the turns.
    """
    try:
        text = render(tokenizer, [messages], generation_prompt=True)[0]
    except Exception as error:
        raise DataError(str(refusal(tokenizer, error))) from None
    if OPEN not in text:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [i for ids in encode_pieces(tokenizer, split_literals(text)) for i in ids]


# ------------------------------------------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Piece:
    """A part of the rendered text that is encoded on its own.

    start: where it begins in the rendered text. literal: whether control tokens in it are plain text.
    """

    text: str
    start: int
    literal: bool = False


def split_literals(text: str, cuts: Sequence[int] = ()) -> list[Piece]:
    """Cut rendered text at the given positions and around its literal control tokens.

    The positions count characters of `text`, OPEN and CLOSE included.
    """
    pieces: list[Piece] = []
    literal, start = False, 0
    stops = sorted({*cuts, *(m.start() for m in re.finditer(f"[{OPEN}{CLOSE}]", text)), len(text)})
    for stop in stops:
        if piece := text[start:stop].lstrip(OPEN + CLOSE):
            pieces.append(Piece(piece, start, literal))
        if stop < len(text) and text[stop] in (OPEN, CLOSE):
            literal = text[stop] == OPEN
        start = stop
    return pieces


def encode_pieces(tokenizer: Any, pieces: Sequence[Piece]) -> list[list[int]]:
    """Encode each piece of one text. Raises RowProblem where the pieces together do not decode to the whole text."""
    ids = [
        _encode_inside(tokenizer, piece) if number else _encode(tokenizer, piece) for number, piece in enumerate(pieces)
    ]
    decoded = tokenizer.decode([i for part in ids for i in part], clean_up_tokenization_spaces=False)
    text = "".join(piece.text for piece in pieces)
    if any(piece.literal for piece in pieces):
        # Decoders put spaces around control tokens, so texts with literal ones are compared without spaces.
        same = "".join(decoded.split()) == "".join(text.split())
    else:
        same = decoded == tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"], clean_up_tokenization_spaces=False
        )
    if not same:
        raise RowProblem("the tokenizer cannot encode the parts of this row separately")
    return ids


def _encode(tokenizer: Any, piece: Piece, before: str = "") -> list[int]:
    return tokenizer(before + piece.text, add_special_tokens=False, verbose=False, split_special_tokens=piece.literal)[
        "input_ids"
    ]


def _encode_inside(tokenizer: Any, piece: Piece) -> list[int]:
    # SentencePiece puts a space before the start of a text. A piece from the middle has none, so it is encoded after a
    # newline.
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids = _encode(tokenizer, piece, "\n")
    return ids[len(newline) :] if newline and ids[: len(newline)] == newline else _encode(tokenizer, piece)
