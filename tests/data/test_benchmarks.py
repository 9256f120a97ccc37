"""Published safety benchmarks are read by name, in the forms in which they are published."""

from __future__ import annotations

import json

import pytest

from safecl.data import DataError, read_prompts


def read(name, path, **options):
    prompts = read_prompts(f"{name}:{path}", **options)
    return [(prompt.text, prompt.tags.get("category")) for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("advbench", "goal,target\nDo a,Sure a\nDo b,Sure b\n", [("Do a", None), ("Do b", None)]),
        ("advbench", '"Do a, now","Sure, a"\nDo b,Sure b\n', [("Do a, now", None), ("Do b", None)]),
        (
            "harmbench",
            "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
            "Do a,standard,chemical_biological,,,a\nDo b,contextual,cybercrime,context,Given c,b\n",
            [("Do a", "chemical_biological"), ("Given c\n\n---\n\nDo b", "cybercrime")],
        ),
        ("strongreject", "category,source,forbidden_prompt\nFraud,custom,Do a\n", [("Do a", "Fraud")]),
        ("hex-phi", 'Do a\n"Do b, too"\n', [("Do a", None), ("Do b, too", None)]),
        ("or-bench", "prompt,category\nDo a,privacy\n", [("Do a", "privacy")]),
        (
            "xstest",
            "id,type,prompt,label\n1,homonyms,Kill a process,safe\n2,contrast_homonyms,Kill a man,unsafe\n",
            [("Kill a process", "homonyms"), ("Kill a man", "contrast_homonyms")],
        ),
    ],
)
def test_a_benchmark_is_read_in_its_published_form(tmp_path, name, text, expected):
    (tmp_path / "file.csv").write_text(text)
    assert read(name, tmp_path / "file.csv") == expected


def test_directharm4_is_read_from_json_lines(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"instruction": "Do a", "category_id": 3}) + "\n")
    assert read("directharm4", tmp_path / "d.jsonl") == [("Do a", "3")]


def test_the_categories_of_hex_phi_are_its_files_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2):
        (tmp_path / f"category_{number}.csv").write_text(f"Do {number}\n")
    assert read("hex-phi", tmp_path) == [("Do 2", "2"), ("Do 10", "10")]


@pytest.mark.parametrize("label", ["label", "safe", None])
def test_unsafe_contrasts_of_xstest_are_no_benign_prompts_whatever_tells_them(tmp_path, label):
    rows = [("homonyms", "Kill a process", True), ("contrast_homonyms", "Kill a man", False)]
    header = "type,prompt" + (f",{label}" if label else "")
    marks = {"label": ("safe", "unsafe"), "safe": ("true", "false"), None: ("", "")}[label]
    lines = [f"{kind},{text}" + (f",{marks[not safe]}" if label else "") for kind, text, safe in rows]
    (tmp_path / "x.csv").write_text("\n".join([header, *lines]) + "\n")
    assert [text for text, _ in read("xstest", tmp_path / "x.csv", only_safe=True)] == ["Kill a process"]


def test_a_file_of_another_form_is_named_with_its_line(tmp_path):
    (tmp_path / "x.csv").write_text("question\nDo a\n")
    with pytest.raises(DataError, match=r"x\.csv:2.*no column `Behavior`, which this benchmark has; the row has"):
        read("harmbench", tmp_path / "x.csv")
    with pytest.raises(DataError, match="no such file; harmbench: takes a local file"):
        read("harmbench", tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"holds no category_1\.csv"):
        read("hex-phi", tmp_path)


def test_a_name_that_is_no_benchmark_stays_a_path(tmp_path):
    (tmp_path / "mine:prompts.jsonl").write_text('{"prompt": "Do a"}\n')
    assert read_prompts(str(tmp_path / "mine:prompts.jsonl"))[0].text == "Do a"
