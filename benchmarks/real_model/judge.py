"""A local judge of the answers that benchmarks/real_model/run.py has kept: `--judge`, after the runs, at any time.

Verdicts lie beside the answers, in <run>/measured/judges.json; answers that a judge has judged are not judged again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.config.judges import JudgeConfig

JUDGE = "judge:"
"""What the names of judges begin with in judges.json."""


def judge_of(text: str) -> JudgeConfig:
    """Return the judge that is named by the folder of a classifier, a recipe, its settings in YAML, or a YAML file."""
    from safecl.commands.judging.judge import judge_config
    from safecl.config.judges import JudgeConfig

    config = Path(text) / "config.json"
    if not config.exists():
        return judge_config(text)
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [""]
    if "SequenceClassification" not in architectures[0]:
        sys.exit(
            f"{text}: not a classifier. Name a guard with its form: --judge '{{recipe: llama-guard-3, model: {text}}}'"
        )
    return JudgeConfig(kind="classifier", model=text)


def judge_all(places: Iterable[Path], judge: JudgeConfig) -> None:
    """Judge the answers of these measurements, those that are there and that it has not judged."""
    from safecl.commands.judging.judge import moments_of
    from safecl.engine.artifacts.base_model import model_hash
    from safecl.evaluation.judges.after_run import judge_run
    from safecl.report.folder import read_run

    for place in places:
        if (place / "results.json").exists() and f"{JUDGE}{judge.title}" not in rates_of(place):
            judge_run(place, [judge], moments_of(read_run(place), every_moment=False), hash_of=model_hash)
            print(f"judged {place}", flush=True)


def rates_of(place: Path) -> dict[str, Any]:
    """Return the attack success rate by each judge that has judged a measurement."""
    path = place / "judges.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["moments"][-1]["asr"] if path.exists() else {}
    return found
