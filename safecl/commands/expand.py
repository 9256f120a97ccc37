"""`safecl expand`: adds decoder blocks to a model that add nothing yet, for `block_expansion` to train."""

from __future__ import annotations

import json
from pathlib import Path

from safecl.terminal import Terminal


def expand_model(path: str, out: Path, blocks: int, as_json: bool) -> None:
    """Write the expanded model, and print the numbers of its new blocks. Raises ConfigError."""
    from safecl.engine.model.expansion import expand_folder

    added = expand_folder(path, out, blocks)
    if as_json:
        print(json.dumps({"model": str(out), "blocks": added}))
        return
    Terminal().print(f"{out}: {blocks} new blocks, which change nothing yet; blocks: {added}")
