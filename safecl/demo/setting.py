"""The two demonstrations: a model of random weights, and a pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safecl.demo.arms import ARMS, PRETRAINED_ARMS, Arm
from safecl.demo.materials import Materials, write_materials
from safecl.demo.progress import ALIGN, Lengths, Made

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """The model and the arms of a demonstration, and the words that it shows them with."""

    name: str
    """Of its default folder."""
    introduction: str
    """First lines on the terminal; `{arms}` is filled in."""
    model: str
    """What the page says of the model, as the subject of a sentence."""
    arms: Sequence[Arm]
    num_ranks: int
    lengths: Lengths
    write: Callable[[Path, int, Sequence[Arm], Say, Made], Materials]
    """Writes data, model and configs into a folder, for a seed."""


def _write_random(folder: Path, seed: int, arms: Sequence[Arm], say: Say, made: Made) -> Materials:
    say("data, tokenizer and a random model")
    return write_materials(folder, seed=seed, arms=arms)


def _write_pretrained(folder: Path, seed: int, arms: Sequence[Arm], say: Say, made: Made) -> Materials:
    from safecl.demo.pretrained.materials import write_pretrained_materials

    return write_pretrained_materials(folder, seed=seed, arms=arms, say=say, made=made)


RANDOM = Setting(
    name="demo",
    introduction="A Llama of about 1 M random parameters learns to refuse; then it is fine-tuned on a user's harmless "
    "task (sentiment of a sentence) in {arms} ways. 2 ranks, ZeRO-2, CPU.\n",
    model="A Llama of about 1 M parameters",
    arms=ARMS,
    num_ranks=2,
    lengths=Lengths(materials=5.0, start=2.0, measure=2.0, train=6.0, of_runs={ALIGN: 3.0}),
    write=_write_random,
)
PRETRAINED = Setting(
    name="demo-real",
    introduction="SmolLM2-135M-Instruct learns to refuse; then it is fine-tuned on a user's harmless task (sentiment "
    "of a sentence) in {arms} ways, on the CPU. Ctrl-C stops it, and the same command goes on.\n",
    model="SmolLM2-135M-Instruct, a pretrained model,",
    arms=PRETRAINED_ARMS,
    num_ranks=1,  # two would spend more time on 540 MB of gradients a step than on the step
    lengths=Lengths(
        materials=90.0, start=10.0, measure=40.0, train=120.0, of_runs={ALIGN: 1.3}, unmeasured=frozenset({ALIGN})
    ),
    write=_write_pretrained,
)
