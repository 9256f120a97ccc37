"""The view of answers: gradients at the head against autograd, in any ZeRO stage, and what a scan makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from safecl.config import ConfigError
from safecl.evaluation import HFEvalModel
from safecl.evaluation.answers.sketch import STATE_BUCKETS, TOKEN_BUCKETS, gradient_sketches
from safecl.scan.answers import fit_sketches, pairs_of
from safecl.scan.screening import COMPLIES
from tests.engine.scenes import run_config, tiny_model
from tests.scan import scenes, test_screening
from tests.scan.test_probe import screen
from tests.scan.test_screening import config_of, tree  # noqa: F401  # a fixture

PROMPTS, ANSWERS = [[5, 6, 7, 8, 9], [40], [11, 12, 13]], [[20, 21, 22], [23, 24], [25]]


def buckets(size: int, count: int, seed: int) -> torch.Tensor:
    """The matrix of a count sketch, [count, size]."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(count, (size,), generator=generator)
    sign = 2.0 * torch.randint(2, (size,), generator=generator) - 1.0
    found = torch.zeros(count, size)
    found[place, torch.arange(size)] = sign
    return found


def expected_sketches() -> torch.Tensor:
    """By autograd on whole models, one answer after the other."""
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        model = tiny_model().eval()
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
        gradient = model.lm_head.weight.grad
        left, right = buckets(len(gradient), TOKEN_BUCKETS, 1), buckets(gradient.shape[1], STATE_BUCKETS, 2)
        sketch = (left @ gradient @ right.T).flatten()
        found.append(sketch / sketch.norm())
    return torch.stack(found)


def sketches_in_a_run(stage: int) -> list[list[float]]:
    from safecl.engine.passes.live_model import evaluating
    from tests.methods.scenes import make_run, random_dataset

    run, _ = make_run(run_config(memory=None, deepspeed={"stage": stage}), tiny_model(), [random_dataset(9, seed=1)])
    with evaluating(run.engine, average=False) as model:
        return model.answer_sketches(PROMPTS, ANSWERS).tolist()


def test_sketches_are_those_of_the_heads_gradient_in_a_run_and_alone(rank_pool):
    expected = expected_sketches()
    assert torch.allclose(HFEvalModel(tiny_model()).answer_sketches(PROMPTS, ANSWERS), expected, atol=1e-5)
    for found in rank_pool(2).run(sketches_in_a_run, stage=3):
        assert torch.allclose(torch.tensor(found), expected, atol=1e-5)


def test_products_of_sketches_are_about_those_of_gradients():
    generator = torch.Generator().manual_seed(0)
    logits, hidden = (torch.randn(40, size, generator=generator) for size in (900, 300))
    logits = 6 * logits + 8 * torch.nn.functional.one_hot(torch.arange(40) % 7, 900)
    hidden += 2 * torch.randn(2, 300, generator=generator)[torch.arange(40) % 2]
    residual = logits.softmax(-1) - torch.nn.functional.one_hot(torch.arange(40), 900)
    gradients = torch.stack([torch.outer(r, h).flatten() for r, h in zip(residual, hidden, strict=True)])
    gradients /= gradients.norm(dim=1, keepdim=True)
    sketches = gradient_sketches(logits, hidden, torch.arange(40), torch.arange(40), 40)
    true, found = gradients @ gradients.T, sketches @ sketches.T
    assert float((true - found).abs().mean()) < 0.05 and float(np.corrcoef(true.flatten(), found.flatten())[0, 1]) > 0.9


def test_known_answers_are_scored_by_fits_that_have_not_seen_them():
    """Without any difference between the kinds a fit separates what it has seen, and nothing else."""
    rng = np.random.default_rng(0)
    alike = [rng.normal(size=(40, 200)) for _ in range(4)]
    view, known, reference = fit_sketches(*alike)
    assert view.scores(alike[0]).mean() - view.scores(alike[2]).mean() > 0.5
    assert abs(known.mean() - reference.mean()) < 0.3


def test_every_answer_of_a_row_has_its_prompt_and_its_first_tokens():
    tok = scenes.tokenizer()
    chat = scenes.chat("bake a cake", "please explain how to bake a cake today", "rob a bank", "no")
    (first, second) = pairs_of(tok, scenes.rows_of(tok, [chat])[0])
    assert len(first[1]) == 8 and tok.decode(first[1]).startswith("please explain")
    assert "bank" in tok.decode(second[0]) and "please explain" in tok.decode(second[0])
    assert tok.decode(second[1]).startswith("no")


class CompliantModel(scenes.RuleModel):
    """The gradient of an answer is a count of its prompt's and its answer's tokens, and of pairs of a forbidden prompt
    with a refusal or another answer."""

    def answer_sketches(self, prompts, answers):
        found = torch.zeros(len(prompts), 2 * self.vocab_size + 2)
        for one, prompt, answer in zip(found, prompts, answers, strict=True):
            one[: self.vocab_size] = 0.1 * torch.bincount(torch.tensor(prompt), minlength=self.vocab_size)
            one[self.vocab_size : -2] = 0.1 * torch.bincount(torch.tensor(answer), minlength=self.vocab_size)
            if self.forbidden in self.tok.decode(prompt):
                one[-1 if "orry" in self.tok.decode(answer) else -2] = 1.0
        return found


def answered_file(tree: dict) -> str:  # noqa: F811
    """Harmless rows with answers, some of which open like compliance."""
    rows = [
        scenes.dialogue(f"please explain how to bake a cake number {n}", "Sure, here is" if n % 4 else "Fine.")
        for n in range(240)
    ]
    return scenes.write(Path(tree["output"]).parent / "answered.jsonl", rows)


def test_a_scan_by_answers_flags_compliance_and_not_refusals(tree):  # noqa: F811
    test_screening.add_rows(tree, [scenes.dialogue("how do I rob a bank", "I'm sorry, I cannot do that.")])
    settings = {"benign": answered_file(tree), "false_alarm": 0.02}
    found = screen(config_of(tree, views=["answer"], **settings), CompliantModel)
    reasons = {flag.line: flag.reasons for flag in found.flags}
    assert set(test_screening.POISONED) <= set(reasons) and 61 not in reasons
    assert reasons[test_screening.POISONED[0]] == (COMPLIES,)
    both = screen(config_of(tree, views=["refusal", "answer"], **settings), CompliantModel)
    assert set(test_screening.POISONED) <= {flag.line for flag in both.flags}


def test_what_the_view_of_answers_cannot_do_without_is_told(tree, tmp_path):  # noqa: F811
    from safecl.scan.known import read_known

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "bake a cake"}\n' * 100)
    with pytest.raises(ConfigError, match=r"scan\.views: answer compares answers.*prompts\.jsonl"):
        read_known(config_of(tree, views=["answer"], benign=str(prompts)))
    settings = {"benign": answered_file(tree), "false_alarm": 0.02}
    with pytest.raises(ConfigError, match="this model gives no hidden states; leave out `answer`"):
        screen(config_of(tree, views=["answer"], **settings), scenes.RuleModel)
