"""The distance of a tuned model from the aligned one, for run.py.

kl                 KL from the aligned model on the user's clean training rows, nats per answer token
chat_perplexity    perplexity of the answers of chat rows that no model was trained on: does it still speak?
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_model import data as files
from benchmarks.real_model.arms import Task
from safecl.evaluation.answers.divergence import ScoredRow, TopOutputs

NUM_ROWS = 40


def measure_distance(folder: Path, model: Path, task: Task, path: Path) -> None:
    """Write the two means with their intervals to a JSON file, unless it is there."""
    if path.exists():
        return
    from safecl.config import EvalConfig, ModelConfig
    from safecl.data import load_tokenizer
    from safecl.evaluation.answers.divergence import divergence
    from safecl.evaluation.answers.model import HFEvalModel
    from safecl.evaluation.questions import read_held_out
    from safecl.evaluation.task import evaluate_task

    loaded, tokenizer = HFEvalModel.load(model), load_tokenizer(ModelConfig(path=str(model)))
    chat = EvalConfig(path=str(files.chat_rows(folder)), metric="answer_nll")
    found = evaluate_task(loaded, tokenizer, chat, read_held_out(None, chat, None))
    kl = divergence(loaded, _rows(folder, task), _aligned_outputs(folder, task))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kl": kl.to_dict(), "chat_perplexity": found.details["perplexity"].to_dict()}))


@functools.cache
def _aligned_outputs(folder: Path, task: Task) -> Sequence[TopOutputs]:
    from safecl.evaluation.answers.divergence import top_outputs
    from safecl.evaluation.answers.model import HFEvalModel

    return top_outputs(HFEvalModel.load(folder / "aligned"), _rows(folder, task))


@functools.cache
def _rows(folder: Path, task: Task) -> Sequence[ScoredRow]:
    """Return some of the user's clean training rows, as tokens."""
    from safecl.config import EvalConfig, ModelConfig
    from safecl.data import load_tokenizer, tokenize_row
    from safecl.evaluation.questions import read_held_out

    whole: dict[str, Any] = task.rows(folder)
    settings = {"path": whole["train"], "fields": whole.get("fields"), "metric": "answer_nll", "max_rows": NUM_ROWS}
    rows = read_held_out(None, EvalConfig.model_validate(settings), None)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder / "aligned")))
    encoded = [tokenize_row(tokenizer, row, task.train["max_length"]) for row in rows]
    return [ScoredRow(row.input_ids, row.loss_mask) for row in encoded if row.loss_mask.any()]
