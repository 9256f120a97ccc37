"""One date for all that a chat template writes in a run.

Templates ask for today's date by `strftime_now(format)`, as Llama 3.2 and gpt-oss, or take `date_string`, as Llama 3.1.
A run that goes on tomorrow must render the same rows, so the date is a setting: `model.template_date`.
"""

from __future__ import annotations

import datetime
from typing import Any

from safecl.config.model import TEMPLATE_DATE


def set_date(tokenizer: Any, date: datetime.date) -> None:
    """Set the date that the tokenizer's template writes."""
    tokenizer.safecl_date = date


def date_of(tokenizer: Any) -> datetime.date:
    """The date that the tokenizer's template writes."""
    date: datetime.date = getattr(tokenizer, "safecl_date", TEMPLATE_DATE)
    return date


def asks_for_date(template: str) -> bool:
    """Whether a template writes a date of the day."""
    return "strftime_now" in template or "date_string" in template


def fix_clock(tokenizer: Any, template: str) -> dict[str, str]:
    """Stop the clock of a template at the run's date. Returns the variables that it takes."""
    if not asks_for_date(template):
        return {}
    from transformers.utils import chat_template_utils

    date = datetime.datetime.combine(date_of(tokenizer), datetime.time(12))
    # The library hands variables on as plain data, so a function can only be set in the compiled template, which it
    # keeps for this text.
    compiled = chat_template_utils._compile_jinja_template(template)
    compiled.globals["strftime_now"] = date.strftime
    return {"date_string": date.strftime("%d %b %Y")} if "date_string" in template else {}
