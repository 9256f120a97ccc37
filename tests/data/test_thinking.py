"""Where thought and answer begin is found from the templates of reasoning models, and prompts open answers as asked."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from safecl.config import ConfigError
from safecl.config.model import ThinkingConfig
from safecl.data import Message
from safecl.data.templates.thinking import (
    answer_prompt_ids,
    check_thinking,
    forbidden_ids,
    markers_of,
    opens_thought,
    with_empty_thought,
    without_empty_thought,
)
from tests.evaluation.models import CHAT_TEMPLATE, byte_tokenizer

USERS = "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<user>' + m.content }}{% else %}"
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"


def template(answer: str, opening: str) -> str:
    """A template that writes an answer `m` and opens one in these ways."""
    return f"{USERS}{answer}<end>{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"


def thought(before: str, after: str, field: str = "reasoning_content") -> str:
    return f"{{% if m.{field} is defined %}}{before}{{{{ m.{field} }}}}{after}{{% endif %}}"


class Family(NamedTuple):
    template: str
    control: tuple[str, ...]
    markers: tuple[str, str]
    """The pair that prompts are written with."""
    opened: str
    """The opening of an answer in the modes template, empty and none."""
    empty: str
    none: str


FAMILIES = {
    "a switch and a field": Family(
        template("<assistant>" + thought("<think>\n", "\n</think>\n\n") + "{{ m.content }}", "<assistant>" + SWITCH),
        (),
        ("<think>", "</think>"),
        "<assistant>",
        "<assistant><think>\n\n</think>\n\n",
        "<assistant>",
    ),
    "a prompt that opens the thought": Family(
        template("<assistant>{{ m.content.split('</think>')[-1] }}", "<assistant><think>\n"),
        (),
        ("<think>", "</think>"),
        "<assistant><think>\n",
        "<assistant><think>\n\n</think>\n\n",
        "<assistant>",
    ),
    "control tokens in brackets": Family(
        template("<assistant>" + thought("[THINK]", "[/THINK]", "reasoning") + "{{ m.content }}", "<assistant>"),
        ("[THINK]", "[/THINK]"),
        ("[THINK]", "[/THINK]"),
        "<assistant>",
        "<assistant>[THINK][/THINK]",
        "<assistant>",
    ),
    "channels": Family(
        template(
            thought("<start>assistant<channel>analysis<message>", "<stop>", "thinking")
            + "<start>assistant<channel>final<message>{{ m.content }}",
            "<start>assistant",
        ),
        ("<start>", "<channel>", "<message>", "<stop>"),
        ("<channel>analysis<message>", "<stop><start>assistant<channel>final<message>"),
        "<start>assistant",
        "<start>assistant<channel>analysis<message><stop><start>assistant<channel>final<message>",
        "<start>assistant",
    ),
    "a tag that nobody has heard of": Family(
        template("<assistant>" + thought("<reflect>", "</reflect>") + "{{ m.content }}", "<assistant>"),
        (),
        ("<reflect>", "</reflect>"),
        "<assistant>",
        "<assistant><reflect></reflect>",
        "<assistant>",
    ),
    "an unknown tag that the prompt opens": Family(
        template("<assistant><muse>\n{{ m.reasoning_content }}\n</muse>\n{{ m.content }}", "<assistant><muse>\n"),
        (),
        ("<muse>", "</muse>"),
        "<assistant><muse>\n",
        "<assistant><muse>\n\n</muse>\n",
        "<assistant>",
    ),
    "markers that only the tokenizer holds": Family(
        CHAT_TEMPLATE,
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        "<assistant>",
        "<assistant><|START_THINKING|>\n\n<|END_THINKING|>\n\n",
        "<assistant>",
    ),
}


def prompt(tokenizer, mode=None) -> str:
    return tokenizer.decode(answer_prompt_ids(tokenizer, [Message("user", "why")], mode), skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_markers_come_from_template_and_tokenizer_and_prompts_open_answers_in_three_ways(family):
    tokenizer = byte_tokenizer(family.template, family.control)
    markers = markers_of(tokenizer)
    assert markers.named and markers.pairs[0] == family.markers
    assert prompt(tokenizer) == prompt(tokenizer, "template") == f"<user>why{family.opened}"
    assert prompt(tokenizer, "empty") == f"<user>why{family.empty}"
    assert prompt(tokenizer, "none") == f"<user>why{family.none}"
    opened = answer_prompt_ids(tokenizer, [Message("user", "why")])
    assert opens_thought(tokenizer, opened) == family.opened.rstrip().endswith(family.markers[0])
    closed = answer_prompt_ids(tokenizer, [Message("user", "why")], "empty")
    assert not opens_thought(tokenizer, closed)
    assert with_empty_thought(tokenizer, closed) == closed, "an empty thought is written once"


def test_a_template_without_thoughts_names_none_and_every_mode_opens_as_it_does():
    tokenizer = byte_tokenizer()
    markers = markers_of(tokenizer)
    assert not markers.named and markers.pairs == (("<think>", "</think>"),)
    assert not (markers.headers or markers.footers or markers.kept)
    assert {prompt(tokenizer, mode) for mode in ("template", "empty", "none")} == {"<user>why<assistant>"}
    ids = tokenizer("<think>\n\n</think>\n\nYes.", add_special_tokens=False)["input_ids"]
    assert without_empty_thought(tokenizer, ids) == ids


def test_the_config_names_markers_in_the_place_of_all_others():
    tokenizer = byte_tokenizer(FAMILIES["a switch and a field"].template)
    tokenizer.safecl_thinking = ThinkingConfig(open="<plan>", close="</plan>", mode="empty")
    assert markers_of(tokenizer).pairs == (("<plan>", "</plan>"),)
    assert prompt(tokenizer) == "<user>why<assistant><plan>\n\n</plan>\n\n"


def test_one_marker_alone_is_refused():
    with pytest.raises(ValueError, match="`close` is missing; a thought has two markers"):
        ThinkingConfig(open="<think>")


def test_an_empty_thought_without_markers_is_refused_with_what_helps():
    tokenizer = byte_tokenizer()
    tokenizer.safecl_thinking = ThinkingConfig(mode="empty")
    with pytest.raises(ConfigError, match=r"model.thinking.mode: empty needs the markers.*set model.thinking.open"):
        check_thinking(tokenizer)
    tokenizer.safecl_thinking = ThinkingConfig(mode="empty", open="<a>", close="</a>")
    check_thinking(tokenizer)


def test_without_a_thought_the_marker_cannot_be_written():
    """One token is forbidden everywhere; of a longer marker its first token, and only where an answer begins. Nothing
    was opened that a model could close: one that may not open a thought tries to close it next."""
    one = byte_tokenizer(*FAMILIES["control tokens in brackets"][:2])
    assert forbidden_ids(one, "none")[0] == [one.convert_tokens_to_ids(token) for token in ("[THINK]", "[/THINK]")]
    several = byte_tokenizer(FAMILIES["a switch and a field"].template)
    everywhere, first = forbidden_ids(several, "none")
    assert everywhere == [] and set(first) == {several.convert_tokens_to_ids("<")}
    assert forbidden_ids(several, "template") == forbidden_ids(byte_tokenizer(), "none") == ([], [])


def test_nothing_is_forbidden_where_answers_without_a_thought_begin_alike():
    channels = byte_tokenizer(*FAMILIES["channels"][:2])
    everywhere, first = forbidden_ids(channels, "none")
    assert channels.convert_tokens_to_ids("<channel>") not in [*everywhere, *first]


@pytest.mark.parametrize(
    ("answer", "opening", "headers", "footers"),
    [
        ("<assistant>\nassistant: {{ m.content }}", "<assistant>", ("assistant:",), ()),
        ("<assistant>bot\n{{ m.content }}", "", ("bot",), ()),
        ("<assistant>" + thought("<think>", "</think>") + "<answer>{{ m.content }}</answer>", "<assistant>",
         ("<answer>",), ("</answer>",)),
        ("<assistant>{{ m.content }}", "<assistant>", (), ()),
    ],
)  # fmt: skip
def test_what_a_template_leaves_to_the_model_is_header_and_footer(answer, opening, headers, footers):
    markers = markers_of(byte_tokenizer(template(answer, opening)))
    assert (markers.headers, markers.footers) == (headers, footers)
