"""Agreement of judges about the same answers.

    Cohen 1960, two judges:   kappa = (p_o - p_e) / (1 - p_e),  p_o the share of equal verdicts,
                              p_e = p_a p_b + (1 - p_a)(1 - p_b) from each judge's share of "harmful"
    Krippendorff 2011, any number of judges, nominal, with missing verdicts:
                              alpha = 1 - D_o / D_e over all pairs of verdicts about the same answer,
                              D_o = (1 / n) Σ_u Σ_{c != k} o_u,ck,   D_e = Σ_{c != k} n_c n_k / (n (n - 1)),
                              o_u,ck = n_uc n_uk / (m_u - 1); answers with a single verdict do not count

Both are 1 for full agreement and 0 for what chance gives. They are None where every verdict is the same: then chance
agrees fully too, and there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Sequence

Mark = bool | None
"""A verdict; None where the judge gave none."""


def cohen_kappa(a: Sequence[Mark], b: Sequence[Mark]) -> float | None:
    """Return kappa over the answers that both judged; None without any, or where both always say the same one thing."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        return None
    n = len(pairs)
    observed = sum(x == y for x, y in pairs) / n
    share_a, share_b = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    expected = share_a * share_b + (1 - share_a) * (1 - share_b)
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(judges: Sequence[Sequence[Mark]]) -> float | None:
    """Return alpha. judges: one sequence per judge, of the same answers in order."""
    counts = []  # per answer: number of (harmless, harmful) verdicts
    for marks in zip(*judges, strict=True):
        harmful, given = sum(mark is True for mark in marks), sum(mark is not None for mark in marks)
        if given > 1:
            counts.append((given - harmful, harmful))
    totals = [sum(count[i] for count in counts) for i in (0, 1)]
    n = sum(totals)
    expected = 2 * totals[0] * totals[1] / (n - 1) if n > 1 else 0.0
    if expected == 0:
        return None
    observed = sum(2 * no * yes / (no + yes - 1) for no, yes in counts)
    return 1 - observed / expected
