"""Keeps secrets out of what a run writes: its config, its identity, its card and report, and the file of an error.

A setting is a secret where its key says so (`token`, `api_key`, `password`, ...). A text is one where it looks like a
key of a well-known service, or stands in a variable of the environment whose name says so.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "(hidden)"

_KEY = re.compile(
    r"(?:.*[_.-])?(?:secret|password|passwd|passphrase|credentials?|authorization|apikey|(?:api|access|private)_key"
    r"|(?:api|access|auth|hf|hub|bearer|wandb)_token)|token"
)
_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}"
    r"|xox[abp]-[A-Za-z0-9-]{10,}|glpat-[\w-]{20,})|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
)
_VARIABLE = re.compile(r"(?:.*_)?(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_KEY|ACCESS_KEY|PRIVATE_KEY)(?:_.*)?")
_SHORTEST = 8


def without_secrets(tree: Any) -> Any:
    """Return a tree of dicts and lists in which secrets read `(hidden)`."""
    if isinstance(tree, dict):
        return {key: HIDDEN if _is_secret(key, value) else without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    return _VALUE.sub(HIDDEN, tree) if isinstance(tree, str) else tree


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _KEY.fullmatch(str(key).lower()) is not None


def hide_secrets(text: str) -> str:
    """Replace what looks like a secret in a text, and the secrets of the environment, by `(hidden)`."""
    known = {value for name, value in os.environ.items() if _VARIABLE.fullmatch(name) and len(value) >= _SHORTEST}
    for value in sorted(known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _VALUE.sub(HIDDEN, text)
