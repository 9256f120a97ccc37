"""Safety scorers, utility metrics, intervals and the gate. Names are imported on first use, so that scoring and
checking text needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safecl.evaluation.answers.generate import generate_greedy as generate_greedy
    from safecl.evaluation.answers.likelihood import log_likelihoods as log_likelihoods
    from safecl.evaluation.answers.model import EvalModel as EvalModel
    from safecl.evaluation.answers.model import HFEvalModel as HFEvalModel
    from safecl.evaluation.contamination import check_disjoint as check_disjoint
    from safecl.evaluation.contamination import find_overlaps as find_overlaps
    from safecl.evaluation.gates.gate import check_gate_is_decidable as check_gate_is_decidable
    from safecl.evaluation.gates.gate import gate as gate
    from safecl.evaluation.gates.gate import judge_gate as judge_gate
    from safecl.evaluation.measure import evaluate as evaluate
    from safecl.evaluation.records import write_outputs as write_outputs
    from safecl.evaluation.results.checks import GateCheck as GateCheck
    from safecl.evaluation.results.checks import GateResult as GateResult
    from safecl.evaluation.results.moment import Evaluation as Evaluation
    from safecl.evaluation.results.safety import SafetyResult as SafetyResult
    from safecl.evaluation.results.summary import summarise as summarise
    from safecl.evaluation.results.tables import results_table as results_table
    from safecl.evaluation.results.task import TaskResult as TaskResult
    from safecl.evaluation.safety import evaluate_safety as evaluate_safety
    from safecl.evaluation.scoring.judges import load_scorer as load_scorer
    from safecl.evaluation.scoring.judges import rate_of_verdicts as rate_of_verdicts
    from safecl.evaluation.scoring.keywords import SCORERS as SCORERS
    from safecl.evaluation.standalone import evaluate_folder as evaluate_folder
    from safecl.evaluation.standalone import evaluate_target as evaluate_target
    from safecl.evaluation.statistics.intervals import Mean as Mean
    from safecl.evaluation.statistics.intervals import Rate as Rate
    from safecl.evaluation.statistics.intervals import smallest_passing_size as smallest_passing_size
    from safecl.evaluation.statistics.intervals import wilson as wilson
    from safecl.evaluation.task import evaluate_task as evaluate_task

_HOMES = {
    "EvalModel": "answers.model",
    "Evaluation": "results.moment",
    "GateCheck": "results.checks",
    "GateResult": "results.checks",
    "HFEvalModel": "answers.model",
    "Mean": "statistics.intervals",
    "Rate": "statistics.intervals",
    "SCORERS": "scoring.keywords",
    "SafetyResult": "results.safety",
    "TaskResult": "results.task",
    "check_disjoint": "contamination",
    "check_gate_is_decidable": "gates.gate",
    "evaluate": "measure",
    "evaluate_folder": "standalone",
    "evaluate_safety": "safety",
    "evaluate_target": "standalone",
    "evaluate_task": "task",
    "find_overlaps": "contamination",
    "gate": "gates.gate",
    "generate_greedy": "answers.generate",
    "judge_gate": "gates.gate",
    "load_scorer": "scoring.judges",
    "log_likelihoods": "answers.likelihood",
    "rate_of_verdicts": "scoring.judges",
    "results_table": "results.tables",
    "smallest_passing_size": "statistics.intervals",
    "summarise": "results.summary",
    "wilson": "statistics.intervals",
    "write_outputs": "records",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safecl.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"safecl.evaluation.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
