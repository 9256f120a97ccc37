"""The model card of a model folder: README.md with the front matter that the hub reads, and the facts of the run.

It has no examples and no paths, and claims no more than was measured. A run with the same config, rows and seed writes
the same card, byte for byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from safecl.config import RunConfig
from safecl.config.secrets import without_secrets
from safecl.evaluation import Evaluation, GateResult
from safecl.evaluation.answers.folders import name_of
from safecl.evaluation.results.tables import measures, moments
from safecl.report.visible import markdown, one_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class TrainedOn:
    """One file of rows that the run was trained on."""

    title: str
    """`task NAME` or `memory`, as Markdown."""
    path: str
    num_rows: int
    fingerprint: str
    """Hash of the file's rows: see safecl.training.identity."""
    note: str = ""


@dataclass(frozen=True)
class Card:
    """The contents of a card.

    digest: XXH3-128 of the base model's weights. average: whether the folder holds the average of the weights.
    measured: whether the evaluations are of the weights in this folder. skipped: a sentence about skipped steps.
    """

    name: str
    config: RunConfig
    digest: str
    data: Sequence[TrainedOn]
    num_steps: int
    num_tokens: int
    versions: dict[str, str]
    evaluations: Sequence[Evaluation]
    gate: GateResult | None
    average: bool = False
    measured: bool = True
    skipped: str | None = None
    folder: str = "model"
    """Name of the folder of the model that was measured: `model`, or `model-failed` where it did not pass the gate."""

    def text(self) -> str:
        """Return the whole file."""
        parts = [self._front_matter(), self._heading(), self._facts(), self._measured(), self._use()]
        return "\n\n".join(parts) + "\n"

    def _front_matter(self) -> str:
        from huggingface_hub import ModelCardData

        model = self.config.model
        licence: dict[str, Any] = {**licence_of(model.path)}
        data = ModelCardData(
            base_model=model.path if _HUB_ID.fullmatch(model.path) and not Path(model.path).is_dir() else None,
            library_name="transformers" if model.lora is None else "peft",
            pipeline_tag="text-generation",
            tags=["safecl", *self.config.methods],
            **licence,
        )
        return f"---\n{data.to_yaml()}\n---"

    def _heading(self) -> str:
        adapter = ", as a LoRA adapter," if self.config.model.lora is not None else ""
        version, methods = self.versions["safecl"], markdown(" + ".join(self.config.methods) or "plain fine-tuning")
        base = model_name(self.config.model.path)
        return f"# {markdown(self.name)}\n\n`{base}`{adapter} fine-tuned with safecl {version}: {methods}."

    def _facts(self) -> str:
        train, model = self.config.train, self.config.model
        rows = [("base model", f"`{model_name(model.path)}`, XXH3-128 of its weights `{self.digest}`")]
        rows += [(data.title, _data(data)) for data in self.data]
        rows += [(f"method `{one_line(name)}`", _settings(settings)) for name, settings in self.config.methods.items()]
        learning = f"learning rate {train.learning_rate:g}, at most {train.max_length:,} tokens a row"
        weights = "the average over the steps (EMA)" if self.average else "those after the last step"
        rows += [
            ("steps", f"{self.num_steps:,}, {self.num_tokens:,} tokens through the model"),
            *([("skipped steps", self.skipped)] if self.skipped is not None else []),
            ("training", f"{learning}, seed {train.seed}"),
            ("weights", f"{weights}, {model.dtype}"),
            ("licence of the base model", self._licence()),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]
        return "## What was done\n\n" + _table([["", ""], *map(list, rows)])

    def _licence(self) -> str:
        found = licence_of(self.config.model.path)
        return markdown(found.get("license", "not known to safecl")) + (", as its own card says" if found else "")

    def _measured(self) -> str:
        heading = "## What was measured\n\n"
        if not self.measured:
            where = f"the run measured the average of the weights, which lies in `../{self.folder}`"
            return f"{heading}Not these weights: {where}."
        if not self.evaluations:
            return f"{heading}Nothing: the run named neither safety prompts nor held-out rows."
        shown = moments(self.evaluations)
        rows = [["", *(markdown(f"{each.when}, step {each.step}") for each in shown)]]
        rows += [[markdown(title), *map(_value, values)] for title, _, values in measures(shown)]
        gate = [self.gate.message.replace("\n  ", "\n- ")] if self.gate else []
        return heading + "\n\n".join([self._prompts(), _table(rows), *gate])

    def _prompts(self) -> str:
        safety = self.config.safety
        if safety is None or not any(each.safety for each in self.evaluations):
            return "Values with 95 % intervals. Safety was not measured: the run named no safety prompts."
        names = [f"`{file_name(path)}`" for path in (safety.prompts, safety.benign_prompts) if path is not None]
        return (
            f"Values with 95 % intervals. Prompts: {' and '.join(names)}. ASR is the share of disallowed prompts for "
            "which the named scorer saw no refusal, which is not yet harm, or a judge saw harm. "
            "Other prompts, and attacks on the model, were not tried."
        )

    def _use(self) -> str:
        package, auto = "transformers", "AutoModelForCausalLM"
        if self.config.model.lora is not None:
            package, auto = "peft", "AutoPeftModelForCausalLM"
        lines = [
            f"from {package} import {auto}",
            "from transformers import AutoTokenizer",
            "",
            'folder = "path/to/this/folder"',
            f"model, tokenizer = {auto}.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)",
        ]
        return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def licence_of(model: str) -> dict[str, str]:
    """Read the licence keys in the card of a local model folder, or of a hub model in the cache; empty without them."""
    from huggingface_hub import ModelCard

    path = _card_of(model)
    if path is None:
        return {}
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}  # no card, or none that can be read
    return {key: str(data[key]) for key in _LICENCE_KEYS if isinstance(data.get(key), str)}


def _card_of(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if Path(model).is_dir():
        return Path(model) / "README.md"
    found = try_to_load_from_cache(model, "README.md") if _HUB_ID.fullmatch(model) else None
    return Path(found) if isinstance(found, str) else None


def file_name(path: str) -> str:
    """Return a hub id as it is, and the last part of a local path: the card does not show where files lie."""
    return one_line(path if _HUB_ID.fullmatch(path) and not Path(path).exists() else Path(path).name)


def model_name(path: str) -> str:
    """Return a hub id as it is, and of a local path the name of the folder, or the run's for a run's `model`."""
    return file_name(name_of(path) if Path(path).is_dir() else path)


def _data(data: TrainedOn) -> str:
    note = f", {data.note}" if data.note else ""
    return f"`{file_name(data.path)}`, {data.num_rows:,} rows{note}; XXH3-128 of the file's rows `{data.fingerprint}`"


def _settings(settings: BaseModel) -> str:
    known = [
        f"{key} {_setting(key, value)}" for key, value in without_secrets(dict(settings)).items() if value is not None
    ]
    return ", ".join(known) or "default settings"


def _setting(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return file_name(value) if key == "fisher" else markdown(str(value))


def _value(value: Any) -> str:
    if value is None:
        return "-"
    shown = f"{value.value:.3f}" if math.isfinite(value.value) else "undecided"
    return f"{shown} [{value.low:.3f}, {value.high:.3f}]"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
