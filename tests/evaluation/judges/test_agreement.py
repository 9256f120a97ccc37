"""Agreement of judges against published examples, and what a panel says."""

from __future__ import annotations

import pytest

from safecl.evaluation.judges.panel import panel_of
from safecl.evaluation.statistics.agreement import cohen_kappa, krippendorff_alpha


def test_cohens_kappa_is_that_of_a_published_table():
    """Grants, two readers: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o = 0.7, p_e = 0.5, kappa = 0.4."""
    a = [True] * 25 + [False] * 25
    b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(a, a) == 1.0 and cohen_kappa(a, [not x for x in a]) == pytest.approx(-1.0)
    assert cohen_kappa([True, None], [True, True]) is None and cohen_kappa([None], [True]) is None


def test_krippendorffs_alpha_is_that_of_his_binary_example():
    """Krippendorff 2011, example B, 10 units, two observers: alpha = 0.095."""
    a = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([[bool(x) for x in a], [bool(x) for x in b]]) == pytest.approx(0.095, abs=5e-4)


def test_alpha_counts_pairs_and_leaves_out_what_a_single_judge_has_judged():
    """By its definition over all pairs of verdicts, with fractions."""
    judges = [[True, False, True, None, True], [True, True, None, False, None], [False, False, True, None, None]]
    units = [[m for m in marks if m is not None] for marks in zip(*judges, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    values = [v for unit in units for v in unit]
    n = len(values)
    observed = (
        sum(
            (x != y) / (len(unit) - 1)
            for unit in units
            for i, x in enumerate(unit)
            for j, y in enumerate(unit)
            if i != j
        )
        / n
    )
    expected = sum(x != y for i, x in enumerate(values) for j, y in enumerate(values) if i != j) / (n * (n - 1))
    assert krippendorff_alpha(judges) == pytest.approx(1 - observed / expected)
    assert krippendorff_alpha([[True, True], [True, True]]) is None


def test_a_panel_lists_the_answers_on_which_its_judges_differ():
    marks = {"a": [True, False, None], "b": [True, True, False], "c": [True, False, None]}
    found = panel_of(marks, ["x", "y", "z"])
    assert found["disagreements"] == ["y"] and list(found["cohen_kappa"]) == ["a and b", "a and c", "b and c"]
    assert panel_of({"a": [True]}, ["x"]) is None
