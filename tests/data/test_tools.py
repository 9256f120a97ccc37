"""Calls of tools, their results and parts of content reach the chat template in the form that it takes, or the row is
named with what the template leaves out."""

from __future__ import annotations

import itertools
import json

import pytest

from safecl.data import DataError, prepare_dataset, read_prompts, read_rows
from safecl.data.messages import RowProblem
from safecl.data.templates.masks import tokenize_rows
from safecl.data.templates.turn_forms import forms_of
from tests.data import tokenizers as tk

OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# As Qwen3: arguments are an object or text, results stand in a user's turn, and the thought of the last answer only.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set call = call.function %}"
    '{{ \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + OPENS
)
# As Llama 3.1: one call, by `tojson`; results are written as JSON strings.
LLAMA3 = (
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "{{ '<|im_start|>assistant\n{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>ipython\n' + m.content | tojson }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)
# As DeepSeek: arguments are text that is joined, and a turn that only calls has no content.
DEEPSEEK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is not defined or m.content is none %}"
    "{% for call in m.tool_calls %}{{ call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)
# As Qwen3-Coder: each argument in a tag.
XML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<function=' + call.function.name + '>' }}"
    "{% for key, value in call.function.arguments | items %}"
    "{{ '<parameter=' + key + '>' + value | string + '</parameter>' }}{% endfor %}{{ '</function>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)
# As templates of models that see: content is a list of parts.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)
# As Magistral: content is text or parts, and a thought is one of these.
THOUGHT_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}{{ '[THINK]' + p.thinking + '[/THINK]' }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)
WRITERS = {"qwen": QWEN, "llama": LLAMA3, "deepseek": DEEPSEEK, "xml": XML}

ASKS, SAYS = {"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": "It snows."}
ARGUMENTS = {"city": 'Os"lo', "days": 3}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"sky": "snow",\n "t": -3}'}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture
def read(tmp_path):
    def read(*rows, **options):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return read_rows(str(tmp_path / "rows.jsonl"), **options)

    return read


def learned(template: str, row) -> list[str]:
    tokenizer = tk.byte_level(template)
    encoded = tokenize_rows(tokenizer, [row], 999)[0]
    assert not isinstance(encoded, RowProblem), encoded
    edges = [i for i in range(1, encoded.num_tokens) if encoded.loss_mask[i] != encoded.loss_mask[i - 1]]
    edges = [0, *edges, encoded.num_tokens]
    spans = [(a, b) for a, b in itertools.pairwise(edges) if encoded.loss_mask[a]]
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in spans]


@pytest.mark.parametrize("name", WRITERS)
def test_calls_are_written_as_the_template_takes_them_and_learned(read, name):
    rows, bad = read({"messages": [ASKS, CALLS, RESULT, SAYS], "tools": TOOLS})
    assert bad.count == 0 and bad.notes == {}
    called, said = learned(WRITERS[name], rows[0])
    written = {
        "qwen": '<tool_call>\n{"name": "weather", "arguments": {"city": "Os\\"lo", "days": 3}}\n</tool_call>',
        "llama": '{"name": "weather", "parameters": {"city": "Os\\"lo", "days": 3}}',
        "deepseek": 'weather\n```json\n{"city": "Os\\"lo", "days": 3}\n```',
        "xml": '<function=weather><parameter=city>Os"lo</parameter><parameter=days>3</parameter></function>',
    }[name]
    assert called == written + "<|im_end|>"
    assert said.endswith("It snows.<|im_end|>")


FORMS = {
    "arguments as text": {**CALL, "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}},
    "flat": {"name": "weather", "arguments": ARGUMENTS},
    "parameters": {"name": "weather", "parameters": json.dumps(ARGUMENTS)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_a_call_gives_the_same_call(read, form):
    for turn in (
        {"role": "assistant", "content": "", "tool_calls": [FORMS[form]]},
        {"role": "assistant", "tool_calls": json.dumps([FORMS[form]])},
        {"from": "gpt", "value": "", "tool_calls": [FORMS[form]]},
    ):
        row = read({"messages": [ASKS, turn]})[0][0]
        call = json.loads(row.messages[1].calls)[0]["function"]
        assert call == {"name": "weather", "arguments": ARGUMENTS}
    legacy = read({"messages": [ASKS, {"role": "assistant", "content": None, "function_call": FORMS["flat"]}]})[0][0]
    assert json.loads(legacy.messages[1].calls)[0]["function"] == FORMS["flat"]


def test_turns_of_sharegpt_from_a_function_call_call_and_observations_are_results(read):
    turns = [
        {"from": "human", "value": "Weather in Oslo?"},
        {"from": "function_call", "value": json.dumps(FORMS["flat"])},
        {"from": "observation", "value": "snow"},
        {"from": "gpt", "value": "It snows."},
    ]
    for name in ("conversations", "messages"):
        rows, bad = read({name: turns})
        assert [m.role for m in rows[0].messages] == ["user", "assistant", "tool", "assistant"], bad.examples
        assert json.loads(rows[0].messages[1].calls)[0]["function"] == FORMS["flat"]
    openai = read({"conversations": [ASKS, SAYS]})[0][0]
    assert [(m.role, m.content) for m in openai.messages] == [(t["role"], t["content"]) for t in (ASKS, SAYS)]
    with pytest.raises(DataError, match=r"messages\[1\].value must be JSON with the `name`"):
        read({"messages": [turns[0], {"from": "function_call", "value": "weather Oslo"}]})


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            tk.CHATML.replace("m['content']", "(m['content'] or '')"),
            "leaves out a call of message 2 (assistant), 'weath",
        ),
        (tk.GEMMA, "refuses this row: alternate"),
        (QWEN.replace("call.arguments", "{}"), "leaves out a call of message 2 (assistant), 'Os\"lo'"),
        (QWEN.replace("m.content + '\n</tool", "m.content[:9] + '\n</tool"), "changes message 3 (tool)"),
    ],
)
def test_a_call_or_a_result_that_the_template_drops_makes_a_bad_row(read, template, reason):
    row = read({"messages": [ASKS, CALLS, RESULT, SAYS]})[0][0]
    problem = tokenize_rows(tk.byte_level(template), [row], 999)[0]
    assert isinstance(problem, RowProblem) and reason in str(problem)


def test_a_template_that_allows_one_call_refuses_a_row_with_two_in_its_own_words(read):
    row = read({"messages": [ASKS, {**CALLS, "tool_calls": [CALL, CALL]}]})[0][0]
    problem = tokenize_rows(tk.byte_level(LLAMA3), [row], 999)[0]
    assert "single tool-calls at once" in str(problem)
    assert learned(QWEN, row)[0].count("<tool_call>") == 2


def test_an_earlier_call_is_found_where_only_the_last_answer_opens_with_a_thought(read):
    row = read({"messages": [ASKS, CALLS, RESULT, SAYS, ASKS, {**CALLS, "reasoning": "look"}]})[0][0]
    first, middle, last = learned(QWEN, row)
    assert (
        first.startswith("<tool_call>") and first.endswith("</tool_call><|im_end|>") and middle == "It snows.<|im_end|>"
    )
    assert last.startswith("<think>\nlook\n</think>") and last.endswith("</tool_call><|im_end|>")


def test_control_tokens_in_calls_and_results_are_text(read):
    call = {"name": "weather<|im_end|>", "arguments": {"city": "<|im_start|>"}}
    row = read({"messages": [ASKS, {**CALLS, "tool_calls": [call]}, {**RESULT, "content": "<|im_end|>"}, SAYS]})[0][0]
    tokenizer = tk.byte_level(QWEN)
    ids = tokenize_rows(tokenizer, [row], 999)[0].ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == len(row.messages)


def test_rows_with_other_calls_are_other_rows(read, tmp_path):
    other = {**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    read(*[{"messages": [ASKS, {**CALLS, "tool_calls": [call]}]} for call in (CALL, other, CALL)])
    options = {"tokenizer": tk.byte_level(QWEN), "max_length": 999, "cache_dir": tmp_path}
    assert len(set(prepare_dataset(str(tmp_path / "rows.jsonl"), **options).row_ids.tolist())) == 3


def test_a_prompt_may_end_with_the_result_of_a_tool(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [ASKS, CALLS, RESULT], "tools": TOOLS}))
    prompt = read_prompts(str(tmp_path / "p.jsonl"))[0]
    assert [m.role for m in prompt.messages] == ["user", "assistant", "tool"] and prompt.text == "Weather in Oslo?"
    assert json.loads(prompt.messages[0].tools) == TOOLS


# ---------------------------------------------------------------------------------------------------------------- parts


def parts(*items: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"type": kind, key: text} for kind, key, text in ((k, {"output_text": "text"}.get(k, k), t) for k, t in items)
    ]


@pytest.mark.parametrize("template", [tk.CHATML, PARTS, THOUGHT_PARTS], ids=["text", "parts", "either"])
def test_parts_of_text_are_joined_and_written_by_templates_of_either_kind(read, template):
    answer = {"role": "assistant", "content": parts(("text", "It "), ("output_text", "snows."))}
    row = read({"messages": [{"role": "user", "content": parts(("text", "Weather?"))}, answer]})[0][0]
    assert learned(template, row) == ["It snows.<|im_end|>"]
    assert forms_of(tk.byte_level(template)).parts == (template is PARTS)


def test_a_thought_in_a_part_goes_to_the_template_in_its_form(read):
    answer = {"role": "assistant", "content": parts(("thinking", "look"), ("text", "It snows."))}
    row = read({"messages": [ASKS, answer]})[0][0]
    assert row.messages[1].thought == "look" and row.messages[1].content == "It snows."
    assert learned(THOUGHT_PARTS, row) == ["[THINK]look[/THINK]It snows.<|im_end|>"]
    assert learned(QWEN, row) == ["<think>\nlook\n</think>\n\nIt snows.<|im_end|>"]
    nested = {"type": "thinking", "thinking": parts(("text", "look"))}  # as Mistral's own data
    assert read({"messages": [ASKS, {**answer, "content": [nested, *parts(("text", "x"))]}]})[0][0].messages[1].thought
    encoded = tokenize_rows(tk.byte_level(tk.CHATML), [row], 99)[0]
    assert any("the thought" in note and "is not used" in note for note in encoded.notes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (parts(("image", "x.png")), "a part of type `image`, which is not text"),
        (parts(("text", "a"), ("input_audio", "x")), "a part of type `input_audio`, which is not text"),
        ([{"type": "tool_use", "name": "f", "input": {}}], "type `tool_use`; write it as `tool_calls` of the turn"),
        ([{"type": "tool_result", "content": "x"}], "type `tool_result`; write it as a message of role `tool`"),
        (parts(("text", "a"), ("thinking", "b")), "a thought behind its text"),
        ([{"type": "text"}], "a part that is not text"),
        ([], "is an empty list"),
    ],
)
def test_a_part_that_no_text_can_stand_for_is_named(read, content, reason):
    with pytest.raises(DataError) as error:
        read({"messages": [ASKS, {"role": "assistant", "content": content}]})
    assert reason in str(error.value)
