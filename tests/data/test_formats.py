"""Every format that people bring gives the same messages, whether it is named or detected."""

from __future__ import annotations

import json

import pytest

from safecl.config import FieldMap
from safecl.data import DataError, read_prompts, read_rows
from safecl.data.messages import RowProblem
from safecl.data.reading.formats import detect
from safecl.data.reading.readers import fill, suggest_fields
from safecl.data.reading.rows import spread

QA = [("user", "Hi"), ("assistant", "Hello")]
SYSTEM = [("system", "Be brief."), *QA]
HISTORY = [("user", "a"), ("assistant", "b"), *QA]
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}

GOOD = {
    "messages": ("messages", {"messages": [USER, ANSWER]}, QA),
    "messages with parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        QA,
    ),
    "messages as JSON text": (
        "messages",
        {"messages": json.dumps([USER, ANSWER])},
        QA,
    ),
    "developer": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        SYSTEM,
    ),
    "empty system": (
        "messages",
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
        QA,
    ),
    "prompt, completion": ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, QA),
    "prompt, answer": ("prompt_completion", {"prompt": "Hi", "answer": "Hello"}, QA),
    "prompt, response, system": (
        "prompt_completion",
        {"prompt": "Hi", "response": "Hello", "system": "Be brief."},
        SYSTEM,
    ),
    "prompt, completion as messages": (
        "prompt_completion",
        {"prompt": [USER], "completion": [ANSWER]},
        QA,
    ),
    "alpaca": ("alpaca", {"instruction": "Hi", "output": "Hello"}, QA),
    "alpaca, empty input": ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, QA),
    "alpaca, input": (
        "alpaca",
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        [("user", "Add\n\n1, 2"), ("assistant", "3")],
    ),
    "alpaca, system, history": (
        "alpaca",
        {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be brief.", "history": [["a", "b"]]},
        [SYSTEM[0], *HISTORY],
    ),
    "dolly": (
        "alpaca",
        {"instruction": "Add", "context": "1, 2", "response": "3"},
        [("user", "Add\n\n1, 2"), ("assistant", "3")],
    ),
    "sharegpt": ("sharegpt", {"conversations": [HUMAN, GPT]}, QA),
    "sharegpt, system": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "Hi"},
                {"from": "chatgpt", "value": "Hello"},
            ]
        },
        SYSTEM,
    ),
    "sharegpt, system column": (
        "sharegpt",
        {"system": "Be brief.", "conversations": [HUMAN, GPT]},
        SYSTEM,
    ),
    "text": ("text", {"text": "Once upon a time"}, [("text", "Once upon a time")]),
}


def write(tmp_path, rows, name="rows.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(tmp_path / name)


def pairs(row) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in row.messages]


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("named", [True, False], ids=["named", "detected"])
def test_a_format_gives_its_messages(tmp_path, case, named):
    format, row, expected = GOOD[case]
    rows, bad = read_rows(write(tmp_path, [row]), format=format if named else "auto")
    assert [pairs(r) for r in rows] == [expected] and bad.count == 0
    assert detect(row) == format


def test_every_answer_of_a_conversation_is_trained_and_flags_say_otherwise(tmp_path):
    turns = [
        ("user", "a", {}),
        ("assistant", "b", {"train": False}),
        ("user", "c", {"train": True}),
        ("assistant", "d", {"weight": 0}),
    ]
    turns += [
        ("user", "e", {}),
        ("assistant", "f", {"weight": 1}),
        ("user", "g", {"unmask": True}),
        ("assistant", "h", {}),
    ]
    rows, _ = read_rows(write(tmp_path, [{"messages": [{"role": r, "content": c, **flags} for r, c, flags in turns]}]))
    assert [m.content for m in rows[0].messages if m.is_trained] == ["c", "f", "g", "h"]


def test_unmask_trains_all_turns_of_a_row_but_the_system_message(tmp_path):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    rows, _ = read_rows(write(tmp_path, [{"messages": messages, "unmask": True}]))
    assert [m.is_trained for m in rows[0].messages] == [False, True, True]


def test_earlier_answers_inside_a_prompt_are_context(tmp_path):
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows, _ = read_rows(write(tmp_path, [{"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}]))
    assert [m.content for m in rows[0].messages if m.is_trained] == ["d"]


def test_the_format_of_most_rows_is_the_files_format(tmp_path):
    rows, bad = read_rows(
        write(tmp_path, [{"text": "stray"}, *[{"prompt": "Hi", "completion": "Hello"}] * 3]), max_bad_rows=1
    )
    assert len(rows) == 3 and bad.count == 1 and "rows.jsonl:1: no `prompt`" in bad.examples[0]


# --------------------------------------------------------------------------------------------------------------- fields

SST2 = {
    "prompt": "Review: {sentence}\nSentiment:",
    "completion": "{label}",
    "values": {"label": {"0": "negative", "1": "positive"}},
}


def test_templates_map_any_columns(tmp_path):
    path = write(tmp_path, [{"sentence": "so {good}", "label": 1}, {"sentence": "bad", "label": 0.0}])
    rows, _ = read_rows(path, fields=SST2)
    assert pairs(rows[0]) == [("user", "Review: so {good}\nSentiment:"), ("assistant", "positive")]
    assert pairs(rows[1])[1] == ("assistant", "negative")
    assert (
        read_rows(path, format="fields", fields=FieldMap.model_validate({**SST2, "system": "Judge."}))[0][0]
        .messages[0]
        .content
        == "Judge."
    )


def test_template_braces_are_doubled_and_truth_values_are_written_as_in_json():
    assert fill('{{"q": "{q}"}} {flag}', {"q": "a{b}c", "flag": True}) == '{"q": "a{b}c"} true'
    assert fill("{Review Text}", {"Review Text": 3}) == "3"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {**SST2, "prompt": "{sentense}"},
            r"fields\.prompt names the column `sentense`.*`sentence`, `label`; did you mean `sentence`\?",
        ),
        ({**SST2, "completion": "{zzz}"}, r"fields\.completion names the column `zzz`.*\{\{ and \}\}"),
        ({**SST2, "system": "{0}"}, r"fields\.system names the column `0`"),
        ({**SST2, "values": {"labels": {}}}, r"fields\.values names the column `labels`.*did you mean `label`\?"),
        ({**SST2, "completion": "positive"}, "completion names no column"),
        ({**SST2, "prompt": "{sentence.__class__}"}, "names the column `sentence.__class__`"),
    ],
)
def test_a_template_that_names_no_column_of_the_file_is_told_before_any_row_is(tmp_path, fields, says):
    with pytest.raises(DataError, match=says):
        read_rows(write(tmp_path, [{"sentence": "good", "label": 1}]), fields=fields)


@pytest.mark.parametrize(
    "row",
    [{"sentence": "x", "label": 2}, {"sentence": "x"}, {"sentence": None, "label": 1}, {"sentence": {}, "label": 1}],
)
def test_one_row_that_does_not_fit_the_templates_is_a_bad_row(tmp_path, row):
    rows, bad = read_rows(write(tmp_path, [{"sentence": "good", "label": 1}, row]), fields=SST2, max_bad_rows=1)
    assert len(rows) == 1 and bad.count == 1 and ":2: " in bad.examples[0]


def test_unknown_columns_get_the_templates_that_would_fit(tmp_path):
    with pytest.raises(
        DataError, match=r'`question`, `answer` are none.*fields: \{prompt: "\{question\}", completion: "\{answer\}"\}'
    ):
        read_rows(write(tmp_path, [{"question": "q", "answer": "a"}]))
    assert suggest_fields(["idx", "sentence", "label"]) == 'fields: {prompt: "{sentence}", completion: "{label}"}'
    for columns in (["prompt", "chosen", "rejected"], ["prompt", "rejected_response", "chosen", "label"]):
        assert suggest_fields(columns) == 'fields: {prompt: "{prompt}", completion: "{chosen}"}'
    with pytest.raises(DataError, match="needs templates"):
        read_rows(write(tmp_path, [{"a": "b"}]), format="fields")


def test_a_named_format_that_does_not_fit_says_which_columns_there_are(tmp_path):
    with pytest.raises(DataError, match=r"no `messages`; the row has `prompt`, `completion`"):
        read_rows(write(tmp_path, [{"prompt": "a", "completion": "b"}]), format="messages")


def test_fill_raises_for_a_row_without_the_column():
    with pytest.raises(RowProblem, match="no `b`; the row has `a`"):
        fill("{b}", {"a": 1})


# ----------------------------------------------------------------------------------------------------- rows and prompts


def test_max_rows_are_taken_evenly_from_the_good_rows(tmp_path):
    path = write(tmp_path, [{"text": f"row {i}"} for i in range(10)] + [{"text": ""}])
    rows, bad = read_rows(path, max_rows=4, max_bad_rows=0.5)
    assert [r.line for r in rows] == [1, 3, 6, 8] and bad.seen == 11
    assert (
        spread(3, 10).tolist() == [0, 1, 2]
        and spread(10, 10).tolist() == list(range(10))
        and len(set(spread(997, 200))) == 200
    )


def test_tags_are_the_short_columns_beside_the_text(tmp_path):
    row = {"prompt": "p", "completion": "c", "id": 7, "safe": True, "long": "x" * 100, "list": [1], "none": None}
    assert read_rows(write(tmp_path, [row]))[0][0].tags == {"id": "7", "safe": "true"}
    assert read_rows(write(tmp_path, [{"sentence": "private", "label": 1, "id": "a"}]), fields=SST2)[0][0].tags == {
        "id": "a"
    }


PROMPTS = {
    "prompt": {"prompt": "Hi"},
    "goal": {"goal": "Hi", "target": "Sure"},
    "instruction": {"instruction": "Hi"},
    "alpaca row": {"instruction": "Hi", "input": "", "output": "Hello"},
    "question": {"question": "Hi"},
    "text": {"text": "Hi"},
    "messages": {"messages": [USER, ANSWER]},
    "messages without an answer": {"messages": [USER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "prompt and answer": {"prompt": "Hi", "completion": "Hello"},
    "prompt as messages": {"prompt": [USER], "completion": "Hello"},
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_read_from_prompt_columns_and_from_rows(tmp_path, case):
    prompts = read_prompts(write(tmp_path, [PROMPTS[case]]))
    assert [(p.text, p.line, [m.role for m in p.messages]) for p in prompts] == [("Hi", 1, ["user"])]


def test_prompts_keep_earlier_turns_and_the_system_message(tmp_path):
    messages = [
        {"role": role, "content": text}
        for role, text in [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    ]
    assert [m.content for m in read_prompts(write(tmp_path, [{"messages": messages}]))[0].messages] == [
        "s",
        "a",
        "b",
        "c",
    ]
    assert [
        m.content
        for m in read_prompts(write(tmp_path, [{"instruction": "i", "input": "j", "system": "s"}]))[0].messages
    ] == [
        "s",
        "i\n\nj",
    ]


def test_unsafe_contrasts_are_left_out_where_only_safe_prompts_are_asked_for(tmp_path):
    path = write(tmp_path, [{"prompt": "a", "safe": True}, {"prompt": "b", "safe": False}, {"prompt": "c"}])
    assert [p.text for p in read_prompts(path)] == ["a", "b", "c"]
    assert [p.text for p in read_prompts(path, only_safe=True)] == ["a", "c"]
    with pytest.raises(DataError, match="none is left"):
        read_prompts(write(tmp_path, [{"prompt": "b", "safe": False}]), only_safe=True)


def test_prompts_are_taken_evenly(tmp_path):
    path = write(tmp_path, [{"prompt": str(i)} for i in range(9)])
    assert [p.text for p in read_prompts(path, 3)] == ["0", "3", "6"]


def test_rows_that_ask_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no column `prompt`.*the row has `sentence`"):
        read_prompts(write(tmp_path, [{"sentence": "x"}]))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*is empty"):
        read_prompts(write(tmp_path, [{"prompt": "x"}, {"prompt": " "}]))


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(
    ("name", "fields", "num_good", "num_bad"),
    [
        ("sst2_dev.jsonl", SST2, 6735, 0),
        ("gsm8k_test.jsonl", {"prompt": "{question}", "completion": "{answer}"}, 1319, 0),
        ("code_alpaca_2k.json", None, 2015, 2),
        ("alpaca_demo.json", None, 999, 0),
        ("safety_refusals.json", None, 2483, 0),
        ("dolly_safety_adjacent.jsonl", None, 387, 0),
    ],
)
def test_real_files_are_read(real_data, name, fields, num_good, num_bad):
    rows, bad = read_rows(str(real_data / name), fields=fields)
    assert (len(rows), bad.count) == (num_good, num_bad)


def test_real_prompt_files_are_read(real_data):
    assert len(read_prompts(str(real_data / "advbench_goals.jsonl"))) == 400
    safe = read_prompts(str(real_data / "xstest_prompts.jsonl"), only_safe=True)
    assert 0 < len(safe) < 300 and all(p.tags["safe"] == "true" for p in safe)
