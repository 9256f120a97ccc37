"""What stands in a row beside its turns is used, or named with counts; answers that are not wanted are left out."""

from __future__ import annotations

import json

import pytest

from safecl.data import DataError, read_prompts, read_rows

ASKS, SAYS = {"role": "user", "content": "Name a colour"}, {"role": "assistant", "content": "Green"}
HUMAN, GPT = {"from": "human", "value": "Name a colour"}, {"from": "gpt", "value": "Green"}
TOOLS = [{"type": "function", "function": {"name": "mix_colours"}}]


@pytest.fixture
def read(tmp_path):
    """Write rows into a file and read them back."""

    def read(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_rows(str(path), **options)

    return read


def turns(row) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in row.messages]


@pytest.mark.parametrize("row", [
    {"messages": [ASKS, SAYS]},
    {"conversations": [HUMAN, GPT]},
    {"prompt": "Name a colour", "completion": "Green"},
    {"prompt": [ASKS], "completion": [SAYS]},
    {"instruction": "Name a colour", "output": "Green"},
])  # fmt: skip
def test_the_system_column_is_used_in_every_format(read, row):
    rows, bad = read({"system": "Answer in rhyme", **row})
    assert turns(rows[0])[0] == ("system", "Answer in rhyme") and not bad.told()


def test_history_comes_before_a_prompt_and_is_not_trained(read):
    for history in ([["Hi", "Good day"]], json.dumps([["Hi", "Good day"]])):
        row = read({"prompt": "Name a colour", "history": history, "response": "Green"})[0][0]
        assert turns(row)[:2] == [("user", "Hi"), ("assistant", "Good day")]
        assert [m.is_trained for m in row.messages] == [False, False, False, True]


@pytest.mark.parametrize(("row", "named"), [
    ({"system": "Answer in rhyme", "messages": [{"role": "system", "content": "Be brief"}, ASKS, SAYS]}, "`system`"),
    ({"prompt": "Translate", "input": "two", "response": "zwei"}, "`input`"),
    ({"prompt": "Translate", "context": "two", "response": "zwei"}, "`context`"),
    ({"prompt": "Translate", "context": "zwei", "response": "zwei"}, "`context`"),
    ({"prompt": "Translate", "answer": "zwei", "response": "deux"}, "`response`"),
    ({"instruction": "Translate", "input": "a", "context": "two", "output": "zwei"}, "`context`"),
    ({"messages": [ASKS, SAYS], "thinking": "It should be calm"}, "`thinking`"),
    ({"messages": [ASKS, SAYS], "notes": "a long remark " * 9}, "`notes`"),
    ({"messages": [ASKS, {**SAYS, "name": "Painter"}]}, "`name` of a turn"),
])  # fmt: skip
def test_what_is_not_used_is_named_with_counts(read, row, named):
    _, bad = read(row, {"messages": [ASKS, SAYS]} if "messages" in row else {**row, named.strip("`"): ""}, row)
    assert [line.split(": ", 1)[1] for line in bad.told()] == [
        f"2 of 3 rows: {named} is not used (first: {bad.path}:1)"
    ]


def test_columns_whose_text_stands_in_the_turns_and_tags_are_not_named(read):
    row = {"prompt": "Name a colour", "messages": [ASKS, SAYS], "id": 7, "category": "art", "tools": None, "input": ""}
    assert read(row)[1].told() == []


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_is_read_from_its_turn_or_from_a_column_beside_the_answer(read, name):
    beside = {"prompt": "Name a colour", "completion": "Green", name: "It should be calm"}
    alpaca = {"instruction": "Name a colour", "output": "Green", name: "It should be calm"}
    for row in (beside, alpaca, {"messages": [ASKS, {**SAYS, name: "It should be calm"}]}):
        rows, bad = read(row)
        assert rows[0].messages[-1].thought == "It should be calm" and not bad.told()


def test_a_thought_that_the_answer_holds_already_is_not_given_twice(read):
    answer = {"role": "assistant", "content": "<think>\ncalm\n</think>\n\nGreen", "reasoning_content": "calm"}
    assert read({"messages": [ASKS, answer]})[0][0].messages[-1].thought is None


def test_tools_are_read_as_a_list_and_as_text(read):
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert json.loads(read({"messages": [ASKS, SAYS], "tools": tools})[0][0].messages[0].tools) == TOOLS
    with pytest.raises(DataError, match="`tools` must be a list of objects"):
        read({"messages": [ASKS, SAYS], "tools": "mix_colours"})


@pytest.mark.parametrize("wrong", [False, "false", "False"])
def test_answers_marked_as_not_wanted_are_left_out_and_counted(read, wrong):
    pair = {"prompt": "Name a colour", "completion": "Green"}
    rows, bad = read({**pair, "label": True}, {**pair, "label": wrong}, {**pair, "kto_tag": wrong}, max_bad_rows=0.01)
    assert len(rows) == 1 and bad.count == 0
    assert "2 of 3 rows: left out" in bad.told()[0] and "`label: false`" in bad.told()[0] and ":2)" in bad.told()[0]


def test_a_file_without_wanted_answers_is_refused(read):
    with pytest.raises(DataError, match="marks its answer as not wanted"):
        read({"messages": [ASKS, SAYS], "label": False})


def test_a_label_of_zero_may_be_a_class_and_is_asked_about(read):
    row = {"prompt": "Slow and dull", "completion": "negative", "label": 0}
    with pytest.raises(DataError, match="write false if the answer is not wanted"):
        read(row)
    fields = {"prompt": "{prompt}", "completion": "{completion}"}
    assert len(read(row, fields=fields)[0]) == len(read({"text": "Slow", "label": False})[0]) == 1


ASKED, ANSWERED = json.dumps([ASKS]), json.dumps([SAYS])


@pytest.mark.parametrize(("prompt", "completion"), [
    (ASKED, ANSWERED), (ASKED, "Green"), ("Name a colour", ANSWERED), (str([ASKS]), str([SAYS])),
    (json.dumps(ASKS), json.dumps(SAYS, indent=1)), ([ASKS], ANSWERED),
])  # fmt: skip
def test_messages_as_text_in_a_cell_are_read_as_messages(read, prompt, completion):
    rows, bad = read({"prompt": prompt, "completion": completion})
    assert turns(rows[0]) == [("user", "Name a colour"), ("assistant", "Green")] and not bad.told()


@pytest.mark.parametrize("row", [
    {"prompt": "[{'role': 'user', 'content': 'a'}\n {'role': 'user'}]", "completion": "b"},  # as numpy prints a list
    {"instruction": ASKED, "output": "Green"},
    {"instruction": "Name a colour", "output": ANSWERED},
    {"text": ASKED},
])  # fmt: skip
def test_messages_as_text_where_they_cannot_be_read_are_bad_rows(read, row):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: `\w+` (looks like|holds) a list of messages"):
        read(row)


def test_messages_as_text_in_a_template_are_a_bad_row(read):
    with pytest.raises(DataError, match="`q` holds a list of messages"):
        read({"q": ASKED, "a": "Green"}, fields={"prompt": "{q}", "completion": "{a}"})


@pytest.mark.parametrize("text", ["[]", "[1, 2]", '{"role": "admin"} is what?', "[{'role'", '{"content": 3}'])
def test_other_text_in_brackets_stays_text(read, text):
    assert turns(read({"prompt": text, "completion": text})[0][0]) == [("user", text), ("assistant", text)]


def test_nan_is_no_value(read):
    rows, bad = read(
        {"instruction": "Add", "input": float("nan"), "output": "4"},
        {"instruction": "Add", "output": float("nan")},
        max_bad_rows=1,
    )
    assert turns(rows[0]) == [("user", "Add"), ("assistant", "4")] and "`output` is null" in bad.examples[0]
    with pytest.raises(DataError, match="must be text or a number, not null"):
        read({"q": "a", "a": float("nan")}, fields={"prompt": "{q}", "completion": "{a}"})


@pytest.mark.parametrize("row", [
    {"prompt": ASKED}, {"prompt": [ASKS]}, {"messages": [ASKS]}, {"prompt": "Name a colour"},
    {"conversations": [HUMAN]}, {"prompt": ASKED, "completion": ANSWERED},
])  # fmt: skip
def test_prompts_are_read_the_same_way(tmp_path, row):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({**row, "system": "Be brief", "tools": TOOLS}))
    messages = read_prompts(str(path))[0].messages
    assert [(m.role, m.content) for m in messages] == [("system", "Be brief"), ("user", "Name a colour")]
    assert json.loads(messages[0].tools) == TOOLS
