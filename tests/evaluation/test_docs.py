"""The Python examples of docs/evaluation.md work."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safecl.evaluation import load_scorer

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
JUDGE, VERDICTS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def test_a_judge_of_the_form_that_is_shown_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "my_package_of_judges").mkdir()
    body = JUDGE.replace("    ...\n", "    return [float('yes' in answer) for answer in answers]\n")
    (tmp_path / "my_package_of_judges" / "judge.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    judge = load_scorer("my_package_of_judges.judge")
    assert [bool(verdict) for verdict in judge(["a", "b"], ["yes", "no"])] == [True, False]


def test_verdicts_in_both_forms_that_are_shown_give_the_rate(tmp_path, monkeypatch, capsys):
    (outputs, verdicts) = re.findall(r'"(\S+\.jsonl)"', VERDICTS)
    (tmp_path / outputs).parent.mkdir()
    records = [{"id": f"disallowed-{i}", "set": "disallowed", "prompt": "p", "answer": "a"} for i in range(2)]
    (tmp_path / outputs).write_text("\n".join(map(json.dumps, records)))
    shown = re.findall(r'`(\{"id": [^`]*\})`', PAGE)
    assert len(shown) == 2
    lines = [re.sub(r'"id": [^,]*', f'"id": "disallowed-{i}"', line) for i, line in enumerate(shown)]
    (tmp_path / verdicts).write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    exec(compile(VERDICTS, "docs/evaluation.md", "exec"), {})
    assert "value=1.0" in capsys.readouterr().out
