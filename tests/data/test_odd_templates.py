"""Odd chat templates: each row is rendered and learned as it says, or is named with what the template does to it."""

from __future__ import annotations

import logging

import pytest

from safecl.config import ConfigError, ModelConfig
from safecl.data import load_tokenizer
from safecl.data.messages import ChatRow, DataError, Message, RowProblem
from safecl.data.templates.masks import tokenize_rows
from tests.data import tokenizers as tk
from tests.data.test_tools import learned

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + OPENS
ANSWER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ANSWER{% else %}" + TURN + "{% endif %}{% endfor %}" + OPENS
)
ROW = ChatRow(
    tuple(
        Message(*turn)
        for turn in (
            ("system", "Be Brief."),
            ("user", "Is it <b>so & so</b>?"),
            ("assistant", 'Say "Yes",\n friend.'),
            ("user", "And then what?"),
            ("assistant", "Nothing More came of it."),
        )
    ),
    "rows.jsonl",
    1,
)
SHORT = ChatRow(ROW.messages[1:3], "rows.jsonl", 2)
BOTH = ['Say "Yes",\n friend.<|im_end|>', "Nothing More came of it.<|im_end|>"]

RIGHT = {
    "macro": "{% macro say(m) %}" + TURN + "{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}" + OPENS,
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        + TURN.replace("m.role +", "m.role +").replace("'<|im_start|>'", "ns.n | string + '<|im_start|>'")
        + "{% endfor %}{% if add_generation_prompt %}{{ (ns.n + 1) | string + '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "strips": PLAIN.replace("m.content", "m.content | trim"),
    "today": "{{ strftime_now('%d %b %Y') + '\n' }}" + PLAIN,
    "a block": "{% block all %}" + PLAIN + "{% endblock %}",
    "loop controls": PLAIN.replace(TURN, "{% if m.role == 'tool' %}{% continue %}{% endif %}" + TURN),
    "a call block": "{% macro wrap() %}{{ caller() }}{% endmacro %}{% call wrap() %}" + PLAIN + "{% endcall %}",
    "carriage returns": PLAIN.replace("\n", "\r\n"),
    "marks around a macro": (
        "{% macro say(m) %}{{ m.content + '<|im_end|>\n' }}{% endmacro %}"
        + ANSWER.replace("ANSWER", "{{ '<|im_start|>assistant\n' }}{% generation %}{{ say(m) }}{% endgeneration %}")
    ),
    "marks in a condition": ANSWER.replace(
        "ANSWER",
        "{{ '<|im_start|>assistant\n' }}{% if m.content %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% endif %}{{ '\n' }}",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_template_that_writes_all_is_learned_as_any_other(name):
    assert learned(RIGHT[name], ROW) == BOTH


CHANGED = {
    "lower case": (PLAIN.replace("m.content", "m.content | lower"), "changes message 1"),
    "title case": (PLAIN.replace("m.content", "m.content | title"), "leaves out message 1"),
    "escapes": (PLAIN.replace("m.content", "m.content | e"), "changes message 1 (user)"),
    "smart quotes": (PLAIN.replace("m.content", "m.content | replace('\"', '”')"), "changes message 2 (assistant)"),
    "as JSON": (PLAIN.replace("m.content", "m.content | tojson"), "changes message 2 (assistant)"),
    "cuts": (PLAIN.replace("m.content", "m.content[:9]"), "changes message 1 (user)"),
    "users in capitals": (
        PLAIN.replace("m.content", "(m.content if m.role != 'user' else 'X')"),
        "leaves out message 1",
    ),
    "twice": (ANSWER.replace("ANSWER", TURN + TURN), "writes message 2 (assistant) more than once"),
    "empty mark": (ANSWER.replace("ANSWER", TURN + "{% generation %}{% endgeneration %}"), "marks nothing"),
    "mark in a comment": (PLAIN + "{# {% generation %} #}", "marks nothing"),
    "needs a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + PLAIN,
        "refuses this row: system first",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_template_that_changes_a_row_is_named_with_what_it_does(name):
    template, says = CHANGED[name]
    problem = tokenize_rows(tk.byte_level(template), [SHORT], 999)[0]
    assert isinstance(problem, RowProblem) and says in str(problem)


LONGER = {
    "last two turns": (
        PLAIN.replace("in messages", "in messages[-2:]"),
        "leaves out message 1 (system); and leaves out",
    ),
    "breaks off": (PLAIN.replace(TURN, "{% if loop.index > 3 %}{% break %}{% endif %}" + TURN), "leaves out message 4"),
    "strictly in turns": (
        PLAIN.replace(
            TURN,
            "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turns!') }}{% endif %}" + TURN,
        ),
        "refuses this row: in turns!",
    ),
}


@pytest.mark.parametrize("name", LONGER)
def test_a_template_that_takes_short_rows_alone_names_the_long_ones(name):
    template, says = LONGER[name]
    good, problem = tokenize_rows(tk.byte_level(template), [SHORT, ROW], 999)
    assert not isinstance(good, RowProblem)
    assert isinstance(problem, RowProblem) and says in str(problem)


@pytest.mark.parametrize(
    "template",
    [
        PLAIN.replace("in messages", "in messages | reverse"),
        PLAIN.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
        PLAIN.replace("m.role", "(m.role | replace('assistant', 'bot'))"),
    ],
    ids=["backwards", "another opening", "another header"],
)
def test_a_template_that_generates_behind_another_text_stops_the_run(template):
    with pytest.raises(DataError, match="does not write before message 2 what it writes when that message is to be"):
        tokenize_rows(tk.byte_level(template), [SHORT], 999)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("   \n", "leaves the assistant's answer out"),
        ("Hello", "leaves the assistant's answer out"),
        ("{{ company.name }}" + PLAIN, "does not work: 'company' is undefined"),
        ("{% for i in range(10 ** 7) %}x{% endfor %}" + PLAIN, "does not work: Range too big"),
        ("{% for m in messages %}{{ m.content }", "does not work: unexpected"),
        ("{% include 'other.jinja' %}" + PLAIN, "does not work"),
        (PLAIN.replace("m.content", "m.content.__class__"), "does not work"),
    ],
)
def test_a_template_that_cannot_work_is_refused_when_it_is_loaded(tmp_path, template, says):
    tk.byte_level().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ConfigError, match="chat template .*" + says):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_template_whose_marks_hold_more_than_answers_is_named(tmp_path, caplog):
    tk.byte_level().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% generation %}" + PLAIN + "{% endgeneration %}")
    with caplog.at_level(logging.WARNING):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert "marks more than answers as generated, and all that is trained" in caplog.text
    ends = ChatRow((Message("user", "Hi"), Message("assistant", "<|im_end|>")), "rows.jsonl", 1)
    (span,) = learned("{% generation %}" + PLAIN + "{% endgeneration %}", ends)
    assert span.endswith("assistant\n<|im_end|><|im_end|>"), "an answer that is a token's text is an answer"


def test_named_templates_and_a_file_beside_them_give_the_one_for_chats(tmp_path):
    other = PLAIN.replace("<|im_start|>' + m.role", "<|im_start|>tools ' + m.role")
    tokenizer = tk.byte_level()
    tokenizer.chat_template = {"default": PLAIN, "tool_use": other}
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).chat_template == PLAIN
    (tmp_path / "mine.jinja").write_text(other)
    chosen = load_tokenizer(ModelConfig(path=str(tmp_path), chat_template=str(tmp_path / "mine.jinja")))
    assert chosen.chat_template == other
