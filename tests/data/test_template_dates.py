"""A template that asks for today's date gets the date of the config, whenever it is rendered."""

from __future__ import annotations

import datetime

import pytest

from safecl.config import ModelConfig
from safecl.data import Message, load_tokenizer, prepare_dataset, prompt_ids
from safecl.data.prepare import tokenizer_key
from tests.data import tokenizers as tk

ANSWER = tk.CHATML
DATED = {
    "clock": "{{ strftime_now('%d %b %Y') }} " + ANSWER,
    "variable": "{% if not date_string is defined %}{% set date_string = '1 May' %}{% endif %}{{ date_string }} "
    + ANSWER,
    "both": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }} " + ANSWER,
    "a format of its own": "{% set day = '%d' %}{{ strftime_now(day + ' %b %Y') }} " + ANSWER,
    "marked": "{{ strftime_now('%d %b %Y') }} " + tk.CHATML_MARKED,
}  # fmt: skip


@pytest.mark.parametrize("case", DATED)
def test_prompts_and_rows_have_the_date_of_the_config(tmp_path, case):
    tk.byte_level(DATED[case]).save_pretrained(tmp_path / "m")
    (tmp_path / "t.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    keys = set()
    for date, shown in ((None, "26 Jul 2024"), ("2031-02-03", "03 Feb 2031")):
        settings = {} if date is None else {"template_date": date}
        tokenizer = load_tokenizer(ModelConfig.model_validate({"path": str(tmp_path / "m"), **settings}))
        rows = prepare_dataset(str(tmp_path / "t.jsonl"), tokenizer=tokenizer, max_length=99, cache_dir=tmp_path)
        for ids in (rows.row(0).input_ids, prompt_ids(tokenizer, [Message("user", "q")])):
            assert tokenizer.decode(ids).startswith(shown + " ")
        keys.add(tokenizer_key(tokenizer))
    assert len(keys) == 2, "prepared rows of one date must not serve another"


def test_the_date_does_not_matter_to_other_templates():
    one, other = tk.byte_level(), tk.byte_level()
    other.safecl_date = datetime.date(2031, 2, 3)
    assert tokenizer_key(one) == tokenizer_key(other)
