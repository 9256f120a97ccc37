"""The arms and tasks of run.py: an arm adds overrides of safecl's command line to plain fine-tuning.

The arms of single methods have the methods' defaults, but for the weights of replay, which the arm's title gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.retention import real_data
from benchmarks.retention.real_data import sst2_fields

REPORTED, TUNING, OTHERS = 0, 1, (2, 3)
"""Seeds. A setting is chosen by the tuning seed, which has prompts and test rows of its own. The presets and the four
best methods have further seeds, with the prompts and rows of the reported one."""
POISON = (10, 0)
"""Percentages of poisoned rows."""
NUM_BEST, LIMIT_POINTS = 4, 0.03
"""The best methods have the lowest ASR among those whose accuracy is so near to plain fine-tuning's."""
NUM_ROWS, NUM_TEST_ROWS = 1500, 200
TRAIN = {
    "max_steps": 60,
    "tokens_per_batch": 600,
    "tokens_per_microbatch": 2048,
    "max_length": 128,
    "learning_rate": 1e-4,
}
LONG_ROWS = 256
"""Tokens of the longest rows of GSM8K and CodeAlpaca."""
MEMORY = {"replay_ratio": 0.25, "max_tokens": 128, "teacher": {"k": 64}}
FIELDS = sst2_fields(real_data.SHORT_PROMPT)


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune; `overrides` are those that `safecl train` gets in addition to a plain config."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    memory: bool = True


QUARTER = ("memory.balance_by=kind", "memory.shares={refusal: 0.25}")
ROWS, CAPPED, SCAN = "train.loss_mean=rows", "train.loss_mean=capped", "scan.action=drop"
KL2 = ("methods.der.alpha=2", "methods.der.beta=0")
KL8 = ("methods.der.alpha=8", "methods.der.beta=0")

PLAIN = Arm("plain", "plain fine-tuning", memory=False)
BALANCED = Arm("balanced", "preset `balanced`", ("methods=balanced",))
STRICT = Arm("strict", "preset `strict`", ("methods=strict",))
STEERED = Arm(
    "strict-controller",
    "preset `strict` with the controller",
    (
        *STRICT.overrides,
        "safety.controller={every: 4, prompts: 20, replay: [0.5, 2], distillation: [0.5, 2]}",
        "safety.probe={every: 1000, compliance: null, tokens: 3}",
    ),
)
"""It looks at the tuning prompts, and is measured on others."""
NO_DATA = Arm("no-data", "preset `no-data`", ("methods=no-data",), memory=False)
SCANNED = [
    Arm("scan-balanced", "preset `balanced` and scan", (SCAN, *BALANCED.overrides)),
    Arm("scan-strict", "preset `strict` and scan", (SCAN, *STRICT.overrides)),
]
CANDIDATES = [
    Arm("kl8-rows-quarter", "DER, KL 8, mean over rows, a quarter of refusals", (*KL8, ROWS, *QUARTER)),
    Arm("kl2-rows-quarter", "DER, KL 2, mean over rows, a quarter of refusals", (*KL2, ROWS, *QUARTER)),
    Arm("kl8-capped-quarter", "DER, KL 8, long rows capped, a quarter of refusals", (*KL8, CAPPED, *QUARTER)),
    Arm("kl8-quarter", "DER, KL 8, mean over tokens, a quarter of refusals", (*KL8, *QUARTER)),
    Arm("kl2-rows", "DER, KL 2, mean over rows", (*KL2, ROWS)),
    Arm("kl8-rows", "DER, KL 8, mean over rows", (*KL8, ROWS)),
    Arm("kl2-quarter", "DER, KL 2, mean over tokens, a quarter of refusals", (*KL2, *QUARTER)),
    Arm(
        "scan-kl2-rows-quarter", "scan, DER, KL 2, mean over rows, a quarter of refusals", (SCAN, *KL2, ROWS, *QUARTER)
    ),
    Arm("scan-kl2-quarter", "scan, DER, KL 2, mean over tokens, a quarter of refusals", (SCAN, *KL2, *QUARTER)),
]


CONTROLS = [
    Arm(
        f"plain-{rate}-{tokens}",
        f"plain fine-tuning, learning rate {rate}, {tokens} tokens a step",
        (f"train.learning_rate={rate}", f"train.tokens_per_batch={tokens}", f"train.max_steps={36_000 // tokens}"),
        memory=False,
    )
    for rate in ("2e-5", "5e-5", "1e-4")
    for tokens in (300, 600, 1200)
    if (rate, tokens) != ("1e-4", 600)
]
"""Plain fine-tuning with other learning rates and batches, and as many rows: the control of "Rethinking Safety in LLM
Fine-tuning" (Kim et al. 2025, arXiv 2508.12531). How a step is accumulated from
micro-batches does not change it here."""
AGEM = Arm("agem", "A-GEM", ("methods.agem={}",))
METHODS = [
    Arm("der", "DER, KL 2", KL2),
    Arm("er", "ER", ("methods.er={}",)),
    Arm("derpp", "DER++, KL 2, CE 1", ("methods.derpp.alpha=2", "methods.derpp.beta=1")),
    Arm("lisa", "Lisa", ("methods.lisa={}",)),
    Arm("spag", "SPAG", ("methods.spag={}",)),
    Arm("sbr", "SBR", ("methods.sbr={}",)),
    Arm("lwf", "LwF", ("methods.lwf={}",), memory=False),
    Arm("ewc", "EWC", ("methods.ewc={}",)),
    Arm("ema", "EMA", ("methods.ema={}",), memory=False),
    AGEM,
]
LATER = [arm for arm in METHODS if arm.name in ("spag", "sbr", "agem")]
EARLY = [arm for arm in METHODS if arm not in LATER]
MAIN = [STRICT, PLAIN, BALANCED, NO_DATA, *EARLY]
"""The arms of every task and setting that come before all others: the presets and the main methods."""


@dataclass(frozen=True)
class Task:
    """A user's task. metric: that of the held-out rows."""

    name: str
    title: str
    metric: str = "answer_nll"

    def rows(self, folder: Path) -> dict:
        """Return the task of a config, with its training rows."""
        return {key: value for key, value in self._whole(folder).items() if key != "eval"} | {"max_rows": NUM_ROWS}

    def test(self, folder: Path, seed: int) -> dict:
        """Return the held-out rows: the test set is reported. SST-2's dev set chooses settings."""
        if self.name == "sst2":
            return sst2_test(seed)
        whole = self._whole(folder)
        return {"fields": whole.get("fields")} | whole["eval"] | {"max_rows": NUM_TEST_ROWS}

    @property
    def train(self) -> dict:
        return TRAIN if self.name == "sst2" else TRAIN | {"max_length": LONG_ROWS}

    def _whole(self, folder: Path) -> dict:
        if self.name == "sst2":
            return sst2_task()
        return real_data.gsm8k_task() if self.name == "gsm8k" else real_data.code_task(folder)


SST2 = Task("sst2", "SST-2", "label_accuracy")
GSM8K, CODE = Task("gsm8k", "GSM8K"), Task("code", "CodeAlpaca")
TASKS = (SST2, GSM8K, CODE)


@dataclass(frozen=True)
class Run:
    """One arm in one setting: the percentage of poisoned rows, the seed, and the task."""

    arm: Arm
    poison: int
    seed: int
    task: Task = SST2

    @property
    def name(self) -> str:
        return f"{self.task.name}-p{self.poison}-s{self.seed}/{self.arm.name}"

    @property
    def prompts(self) -> tuple[str, str]:
        """The files of disallowed and benign prompts that it is measured with."""
        return measured_files(self.seed)

    def config(self, folder: Path) -> dict:
        from safecl.config import apply_overrides

        prompts, benign = measured_files(TUNING) if self.arm is STEERED else self.prompts
        config = {
            "model": {"path": str(folder / "aligned"), "gradient_checkpointing": False},
            "tasks": [self.task.rows(folder)],
            "train": self.task.train | {"seed": self.seed},
            "deepspeed": {"stage": 0},
            # The trained model is measured apart; here the prompts are only compared with the training rows.
            "safety": {"prompts": str(folder / prompts), "benign_prompts": str(folder / benign), "every": "never"},
            "checkpoint": {"every": "never"},
            "output": str(folder / self.name),
        }
        if self.arm.memory:
            config["memory"] = {"source": str(folder / "memory.jsonl"), **MEMORY}
        if self.poison:
            config["poison"] = {"ratio": self.poison / 100, "source": str(folder / "poison.jsonl"), "seed": self.seed}
        return apply_overrides(config, list(self.arm.overrides))


def measured_files(seed: int) -> tuple[str, str]:
    part = "-tuning" if seed == TUNING else ""
    return f"prompts{part}.jsonl", f"benign{part}.jsonl"


def sst2_task() -> dict:
    path = real_data.data_folder() / "sst2_train.jsonl"
    return {"name": "sst2", "train": str(path), "fields": FIELDS, "max_rows": NUM_ROWS}


def sst2_test(seed: int) -> dict:
    """Return the held-out rows: the test set is reported, the dev set chooses settings."""
    path = real_data.data_folder() / ("sst2_dev.jsonl" if seed == TUNING else "sst2_test.jsonl")
    return {"path": str(path), "fields": FIELDS, "metric": "label_accuracy", "max_rows": NUM_TEST_ROWS}


def _runs() -> Iterator[Run]:
    """Yield the runs, the most telling ones first. Those of the best methods with further seeds are known when all
    methods are measured (readings.py)."""
    yield Run(STRICT, 10, REPORTED)
    yield Run(PLAIN, 10, REPORTED)
    yield from (Run(arm, 10, TUNING) for arm in CANDIDATES[:3])
    yield Run(BALANCED, 10, REPORTED)
    yield from (Run(arm, 0, REPORTED) for arm in (STRICT, PLAIN, BALANCED))
    yield from (Run(STEERED, poison, seed) for seed in (REPORTED, *OTHERS) for poison in POISON)
    yield from (Run(arm, poison, REPORTED) for poison in POISON for arm in (*EARLY, NO_DATA))
    yield from (Run(arm, poison, REPORTED, GSM8K) for arm in MAIN for poison in POISON)
    yield from (Run(arm, 10, REPORTED) for arm in SCANNED)
    yield from (Run(arm, poison, REPORTED) for poison in POISON for arm in LATER)
    yield from (Run(arm, 10, seed) for seed in OTHERS for arm in (STRICT, BALANCED, NO_DATA))
    yield from (Run(arm, 0, REPORTED) for arm in CONTROLS)
    yield from (Run(arm, 10, TUNING) for arm in CANDIDATES[3:])
    yield from (Run(arm, 0, REPORTED) for arm in SCANNED)
    yield from (Run(arm, 0, seed) for seed in OTHERS for arm in (STRICT, BALANCED, NO_DATA))
    yield from (Run(arm, poison, REPORTED, GSM8K) for arm in LATER for poison in POISON)
    yield from (Run(arm, poison, REPORTED, CODE) for arm in (*MAIN, *LATER) for poison in POISON)
    yield Run(PLAIN, 10, TUNING)


RUNS = list(_runs())
FEWER_RUNS = [
    *(Run(arm, poison, REPORTED) for arm in (*MAIN, *LATER) for poison in POISON),
    *(Run(arm, poison, REPORTED, GSM8K) for arm in (*MAIN, *LATER) for poison in POISON),
    *(Run(arm, poison, seed) for seed in OTHERS for poison in POISON for arm in (STRICT, BALANCED, NO_DATA)),
]
"""The runs of a second model. All its settings were chosen on the first one."""
