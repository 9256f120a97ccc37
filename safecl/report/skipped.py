"""The steps that a run skipped, in words."""

from __future__ import annotations


def skipped_sentence(steps: int, skipped: int, at_the_end: int) -> str | None:
    """Return a sentence about the skipped steps; None where no step was skipped.

    steps: all steps of the run. skipped: those whose gradient was not finite, which left the weights as they were.
    at_the_end: how many of these were the last ones, in a row.
    """
    if not skipped:
        return None
    told = f"{skipped:,} of {steps:,} steps {'was' if skipped == 1 else 'were'} skipped: no finite gradient"
    if not at_the_end:
        return f"{told}. Later steps were applied."
    last = "The last step was one of them" if at_the_end == 1 else f"The last {at_the_end:,} steps were among them"
    return f"{told}. {last}: the weights have not changed since step {steps - at_the_end:,}."
