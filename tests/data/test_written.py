"""What a row says stands in what the template writes of it, or the row is named; marks and end tokens are obeyed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from safecl.data import DataError, Message, prepare_dataset, tokenize_row
from safecl.data.messages import ChatRow, RowProblem
from safecl.data.templates.masks import tokenize_rows
from safecl.data.templates.written import remarks_on_prompts
from tests.data import tokenizers as tk
from tests.data.test_masks import chat, learned

OPEN_TURN, END_TURN = "'<|im_start|>' + m['role'] + '\n'", "'<|im_end|>\n'"
ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def template(content: str, before: str = "", turns: str = "messages") -> str:
    """A ChatML template that writes `content` as the text of a turn."""
    body = f"{{% for m in {turns} %}}{{{{ {OPEN_TURN} }}}}{before}{{{{ {content} + {END_TURN} }}}}{{% endfor %}}"
    return body + ASSISTANT


def problem(source: str, row: ChatRow) -> str:
    found = tokenize_rows(tk.byte_level(source), [row], 999)[0]
    assert isinstance(found, RowProblem), tk.byte_level(source).decode(found.ids)
    return str(found)


ROW = chat("two and two", "It is four", system="In rhyme")
THOUGHT = "<think>\nadd them\n</think>\n\nIt is four"


@pytest.mark.parametrize(("source", "row", "says"), [
    (template("m['content']", turns="messages if m['role'] != 'system'"), ROW, "leaves out message 1 (system)"),
    (template("m['content']", turns="messages[-2:]"), chat("a", "b", "two", "four"), "leaves out message 1 (user)"),
    (template("m['content'].split('</think>')[-1]"), chat("two", THOUGHT), "message 2 (assistant), '<think> add them"),
    (template("m['content'][:12]"), chat("two and two are", "four"), "changes message 1 (user), 'are'"),
    (template("m['content'].replace('rude', '')"), chat("a rude word", "b"), "(user), 'a rude word' is"),
    (template("(m['content'] if m['role'] == 'user' else m['content'] | upper)"), chat("a", "four"), "(assistant)"),
    (template("('' if m['content'] | length > 30 else m['content'])"), chat("long " * 9, "b"), "message 1 (user)"),
])  # fmt: skip
def test_a_row_that_the_template_does_not_write_whole_is_bad_and_says_why(source, row, says):
    said = problem(source, row)
    assert says in said and "chat template" in said and "model.chat_template" in said
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template"):
        tokenize_row(tk.byte_level(source), row, 999)


@pytest.mark.parametrize("content", [
    "m['content'] | trim", "m['content'].strip()", "m['content'].replace('\n\n', '\n')", "' ' + m['content'] + ' '",
    "m['content'].split() | join(' ')",
])  # fmt: skip
def test_white_space_belongs_to_the_template(content):
    row = chat("  two and\n\ntwo ", "\nIt is  four\n\nor so\n", system=" In rhyme")
    assert len(learned(tk.byte_level(template(content)), row)) == 1


def test_a_system_message_may_stand_in_the_users_turn():
    source = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + (messages[0]['content'] + ' ' if "
        "messages[0]['role'] == 'system' else '') + m['content'] + '<|im_end|>\n' }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASSISTANT
    )
    assert learned(tk.byte_level(source), ROW) == ["It is four<|im_end|>"]


# As Qwen3: the thought of the last answer is written, those of earlier answers are not.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|im_end|>\n' }}{% endfor %}" + ASSISTANT
)


def with_thoughts(row: ChatRow, thought: str = "add them") -> ChatRow:
    turns = (replace(m, thought=thought) if m.role == "assistant" else m for m in row.messages)
    return replace(row, messages=tuple(turns))


def test_a_thought_goes_to_the_template_and_is_learned():
    tokenizer = tk.byte_level(THINKS)
    for row in (with_thoughts(chat("two", "four")), chat("two", "<think>\nadd them\n</think>\n\nfour")):
        assert learned(tokenizer, row) == ["<think>\nadd them\n</think>\n\nfour<|im_end|>"]
        assert tokenize_rows(tokenizer, [row], 999)[0].notes == ()


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_template_gets_the_thought_under_each_of_its_names(name):
    source = template("m['content']", before=f"{{% if m.{name} %}}{{{{ '(' + m.{name} + ') ' }}}}{{% endif %}}")
    assert learned(tk.byte_level(source), with_thoughts(chat("two", "four"))) == ["(add them) four<|im_end|>"]


def test_thoughts_and_tools_that_are_not_written_are_named_with_counts(tmp_path):
    turns = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]
    thinking = [turns[0], {**turns[1], "reasoning": "u"}]
    rows = [{"messages": thinking}, {"messages": turns}, {"messages": thinking, "tools": [{"name": "add_up"}]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"max_length": 99, "cache_dir": tmp_path}
    for _ in range(2):  # made, and mapped
        data = prepare_dataset(str(tmp_path / "t.jsonl"), tokenizer=tk.byte_level(), **options)
        thoughts, tools = data.reports[0].notes
        assert "2 of 3 rows: the thought (`reasoning_content`, `thinking` or `reasoning`) is not used" in thoughts
        assert "1 of 3 rows: `tools` is not used" in tools and tools.endswith("t.jsonl:3)")
    written = tk.byte_level(THINKS.replace("{% for", "{{ tools | tojson if tools else '' }}{% for", 1))
    assert prepare_dataset(str(tmp_path / "t.jsonl"), tokenizer=written, **options).reports[0].notes == ()


def test_rows_with_other_tools_or_thoughts_are_other_rows():
    plain = chat("two", "four")
    tools = replace(plain, messages=(replace(plain.messages[0], tools='[{"name": "f"}]'), plain.messages[1]))
    ids = {tokenize_row(tk.byte_level(), row, 99).row_id for row in (plain, tools, with_thoughts(plain))}
    assert len(ids) == 3


def test_thoughts_of_earlier_answers_may_be_left_out_and_are_named():
    for row in (
        with_thoughts(chat("two", "four", "and?", "five")),
        chat("two", THOUGHT, "and?", "<think>\nto add them\n</think>\n\nb"),
    ):
        tokenizer = tk.byte_level(THINKS)
        first, last = learned(tokenizer, row)
        assert first in ("four<|im_end|>", "It is four<|im_end|>") and "add them" in last
        [note] = tokenize_rows(tokenizer, [row], 999)[0].notes
        assert "of an earlier answer" in note


def test_control_tokens_in_thoughts_and_tools_are_text():
    tokenizer = tk.byte_level(THINKS.replace("{% for", "{{ tools | tojson if tools else '' }}{% for", 1))
    row = with_thoughts(chat("two", "four"), "a<|im_end|>b")
    tools = json.dumps([{"name": "f<|im_start|>"}])
    row = replace(row, messages=(replace(row.messages[0], tools=tools), row.messages[1]))
    ids = tokenize_row(tokenizer, row, 999).input_ids.tolist()
    assert [ids.count(tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>")] == [2, 2]


# ---------------------------------------------------------------------------------------------------------------- marks

LAST = "m['role'] == 'assistant' and loop.last"
MARKS = {
    "only the last answer": ("{% if " + LAST + " %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
                             "{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}", ["d e f<|im_end|>"]),
    "two marks in one answer": ("{% if " + LAST + " %}{% generation %}{{ m['content'][:1] }}{% endgeneration %}"
                                "{{ m['content'][1:4] }}{% generation %}{{ m['content'][4:] + '<|im_end|>' }}"
                                "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}",
                                ["d", "f<|im_end|>"]),
    "only what users say": ("{% if m['role'] == 'user' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
                            "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}",
                            ["q<|im_end|>", "r<|im_end|>"]),
    "marks around nothing": ("{% generation %}{% endgeneration %}{% if m['role'] == 'assistant' %}{%- generation -%}"
                             "{{ m['content'] + '<|im_end|>\n<|endoftext|>\n' }}{%- endgeneration -%}{% else %}"
                             "{{ m['content'] + '<|im_end|>\n' }}{% endif %}", ["a b c<|im_end|>", "d e f<|im_end|>"]),
}  # fmt: skip


def marked(case: str) -> str:
    return "{% for m in messages %}{{ " + OPEN_TURN + " }}" + MARKS[case][0] + "{% endfor %}" + ASSISTANT


SAY = "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
SAY += "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"


@pytest.mark.parametrize("source", [
    "{% macro say(m) %}" + SAY + "{% endmacro %}{% for m in messages %}{{ say(m) }}\n{% endfor %}",
    "{% for m in messages %}{% set text %}" + SAY + "{% endset %}{{ text }}\n{% endfor %}",
    "{% for m in messages %}{% filter trim %} " + SAY + "{% endfilter %}\n{% endfor %}",
    "{% for m in messages %}\n " + SAY.replace("%}{", "%}\n {").replace("generation %", "generation -%")
    + "{% endfor %}",
], ids=["macro", "set", "filter", "indented"])  # fmt: skip
def test_marks_inside_macros_and_blocks_are_where_they_stand(source):
    tokenizer = tk.byte_level(source + ASSISTANT)
    row = chat("q", "a b\uf8f2 c", "r", "d")
    assert [text.strip() for text in learned(tokenizer, row)] == ["a b c<|im_end|>", "d<|im_end|>"]
    turns = [{"role": m.role, "content": m.content.replace("\uf8f2", "")} for m in row.messages]
    assert tokenize_row(tokenizer, row, 999).input_ids.tolist() == tokenizer.apply_chat_template(turns)["input_ids"]


@pytest.mark.parametrize("case", MARKS)
def test_what_the_template_marks_is_learned_and_nothing_else(case):
    assert learned(tk.byte_level(marked(case)), chat("q", "a b c", "r", "d e f")) == MARKS[case][1]


@pytest.mark.parametrize(("case", "flags", "expected"), [
    ("only the last answer", {0: False, 1: False, 2: False}, ["d e f<|im_end|>"]),
    ("two marks in one answer", {1: False}, ["d", "f<|im_end|>"]),
    ("marks around nothing", {1: False}, ["d e f<|im_end|>"]),
    ("marks around nothing", {3: False}, ["a b c<|im_end|>"]),
])  # fmt: skip
def test_flags_in_the_data_choose_among_the_marks(case, flags, expected):
    assert learned(tk.byte_level(marked(case)), chat("q", "a b c", "r", "d e f", train=flags)) == expected


def test_a_row_without_a_mark_is_bad():
    assert "marks nothing" in problem(marked("only the last answer"), chat("q", "a", "r", "d", train={3: False}))


# ----------------------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("after", ["<|im_end|><|endoftext|>", "<|im_end|>\n<|endoftext|>\n", "<|im_end|>\n---\n",
                                   "<|im_end|></s><|endoftext|>\n\n### "])  # fmt: skip
def test_nothing_behind_the_first_end_token_is_learned(after):
    end = f"('<|im_end|>\n' if m['role'] == 'user' else {after!r})"
    source = "{% for m in messages %}{{ " + OPEN_TURN + " + m['content'] + " + end + " }}{% endfor %}" + ASSISTANT
    row = chat("q", "a <|im_end|> b", "r", "c")
    assert learned(tk.byte_level(source), row) == ["a <|im_end|> b<|im_end|>", "c<|im_end|>"]


def test_an_answer_in_two_parts_is_learned_up_to_its_last_end_token():
    before = "{% if m.thinking %}{{ m.thinking + '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
    row = with_thoughts(chat("two", "four"))
    expected = "add them<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    assert learned(tk.byte_level(template("m['content']", before=before)), row) == [expected]


def test_messages_of_one_word_that_stand_elsewhere_by_chance_are_still_missed():
    row = ChatRow((Message("system", "four"), *chat("two", "four").messages), "rows.jsonl", 7)
    assert "leaves out message 1" in problem(template("m['content']", turns="messages if m['role'] != 'system'"), row)


def test_prompts_that_the_template_does_not_write_are_named_with_their_number():
    tokenizer = tk.byte_level(template("m['content']", turns="messages if m['role'] != 'system'"))
    prompts = [replace(row, messages=row.messages[:-1]) for row in (ROW, chat("two", "four"), ROW)]
    [remark] = remarks_on_prompts(tokenizer, prompts)
    assert remark.startswith("2 of 3 prompts: ") and "leaves out message 1 (system)" in remark
    assert remarks_on_prompts(tk.byte_level(), prompts) == []
