"""The work of the ranks in the distributed tests; importable, so that spawned processes find it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from safecl.config import EvalConfig, SafetyConfig
from safecl.evaluation import HFEvalModel, evaluate, generate_greedy, log_likelihoods
from tests.evaluation.models import ask, byte_tokenizer, random_prompts, tiny_model
from tests.evaluation.test_task import QUESTIONS, byte_model, rows_of


class CollectiveModel(HFEvalModel):
    """Every forward pass is a collective, as under ZeRO-3: a rank that calls less often leaves the others waiting."""

    def __init__(self, model):
        super().__init__(model)
        self.calls = 0

    def logits(self, *arguments, **options):
        self.calls += 1
        if self.world_size > 1:
            totals = torch.tensor([self.calls])
            dist.all_reduce(totals)
            assert int(totals) == self.calls * self.world_size, "the ranks are not at the same forward pass"
        return super().logits(*arguments, **options)


def generate_unequal(num_prompts: list[int], batch_size: int) -> dict:
    """Each rank generates from its own prompts, of which there are `num_prompts[rank]`."""
    model = CollectiveModel(tiny_model(seed=7))
    prompts = random_prompts(num_prompts[model.rank], seed=model.rank)
    answers = generate_greedy(
        model, prompts, max_new_tokens=9, eos_ids=list(range(3, 20)), pad_id=0, batch_size=batch_size
    )
    return {"calls": model.calls, "answers": answers}


def score_unequal(num_rows: list[int]) -> dict:
    model = CollectiveModel(tiny_model(seed=7))
    rows = [(ids, [True] * len(ids)) for ids in random_prompts(num_rows[model.rank], seed=model.rank, shortest=2)]
    scored = log_likelihoods(model, rows, pad_id=0, logits_bytes=4 * 97 * 20)
    return {"calls": model.calls, "num_tokens": [row.num_tokens for row in scored]}


def measure_everything(num_prompts: int) -> dict:
    tokenizer = byte_tokenizer()
    model = CollectiveModel(byte_model(tokenizer).float())
    questions = [f"{'please ' * (number % 3)}say {number}" for number in range(num_prompts)]
    answers = ["good", "bad", "so so"]
    rows = rows_of((question, answers[number % 3]) for number, question in enumerate(QUESTIONS))
    numbers = rows_of((question, f"#### {number}") for number, question in enumerate(QUESTIONS[:3]))
    settings = [
        EvalConfig(path="e", metric=metric, max_new_tokens=6)
        for metric in ("label_accuracy", "exact_match", "answer_nll", "gsm8k")
    ]
    tasks = [(config.metric, config, numbers if config.metric == "gsm8k" else rows) for config in settings]
    safety = SafetyConfig(prompts="p", max_new_tokens=7, batch_size=2)
    found = evaluate(
        model, tokenizer, when="now", safety=safety, prompts=ask(*questions), benign=ask("a", "b c"), tasks=tasks
    )
    outputs = {"safety": found.safety.outputs} | {name: task.outputs for name, task in found.tasks.items()}
    return {"calls": model.calls, "results": found.to_dict(), "outputs": outputs}


def refuse_on_one_rank() -> str:
    """Rank 1 has a prompt without tokens; both must stop."""
    model = CollectiveModel(tiny_model())
    try:
        generate_greedy(
            model, [[5]] if model.rank == 0 else [[]], max_new_tokens=3, eos_ids=[2], pad_id=0, batch_size=2
        )
    except ValueError as error:
        return str(error)
    return "went on"
