"""Remembers which class of transformers a tokenizer has.

AutoTokenizer reads the model's settings to choose the class, and their class imports the code of models, which takes
longer than everything else that a tokenizer needs. The choice depends on the files of the folder and on the library
alone, so it is kept with their stamps and versions, and the class itself loads the tokenizer after that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from safecl.storage.model_records import ModelRecords, tokenizer_basis

_LIBRARY = "transformers."


def remembering_class(source: str, records: ModelRecords, choose: Callable[[], Any]) -> Any:
    """Return the tokenizer of a folder or hub id: loaded by the class that is remembered, else by `choose`, whose
    class is remembered where transformers defines it."""
    name, basis = f"tokenizer class {source}", tokenizer_basis(source)
    if basis is not None and (known := _class_of(records.find(name, basis))) is not None:
        return known.from_pretrained(source, _from_auto=True)
    tokenizer = choose()
    found = type(tokenizer)
    if basis is not None and _class_of(place := [found.__module__, found.__qualname__]) is found:
        records.keep(name, basis, place)
    return tokenizer


def _class_of(place: Any) -> Any:
    """Return the tokenizer class with this module and name in transformers; None where there is none."""
    if not (isinstance(place, list) and len(place) == 2 and all(isinstance(part, str) for part in place)):
        return None
    module, name = place
    if not module.startswith(_LIBRARY):
        return None
    from transformers import PreTrainedTokenizerBase

    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase) else None
