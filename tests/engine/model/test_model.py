"""The wrapped model: the fused head gives the model's own losses for every family, and falls back where a head is more
than linear."""

from __future__ import annotations

import pytest
import torch

from safecl.config import ConfigError, ModelConfig
from safecl.engine.model.checks import check_head, check_packing
from safecl.engine.model.language_model import LanguageModel
from safecl.engine.model.settings import choose_attention
from safecl.engine.reference import loading
from tests.engine import scenes
from tests.engine.passes import oracle

FAMILIES = ["llama", "mistral", "qwen", "gemma"]


def loss_inputs(rows, packed: bool = True) -> dict:
    """Arguments of LanguageModel.losses for rows, each target weighing 1 / number of targets."""
    from safecl.data import collate

    batch = collate(rows, packed=packed, pad_id=0)
    positions = (batch.targets != -100).nonzero().flatten()
    weights = torch.full((len(positions),), 1.0 / len(positions))
    return dict(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        positions=positions,
        targets=batch.targets[positions],
        ce_weights=weights,
    )


def gradient_vector(module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_head_gives_the_loss_and_gradient_of_the_plain_model(family, tied, packed):
    data = scenes.random_dataset(5, seed=4)
    rows = data.rows(range(5))
    wrapped = LanguageModel(scenes.tiny_model(tied, family=family))
    assert check_head(wrapped)
    loss = wrapped(task="loss", **loss_inputs(rows, packed))["loss"]
    loss.backward()
    plain = scenes.tiny_model(tied, family=family)
    expected = torch.cat([oracle.row_nll(plain, row) for row in rows]).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = gradient_vector(wrapped), gradient_vector(plain)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_by_a_name_that_is_not_known_is_found_where_logits_are_too_small_to_show_it(monkeypatch, dtype):
    """Logits near 1 under a cap of 30 differ by less than a bf16 number's last digit."""
    wrapped = LanguageModel(scenes.tiny_model(dtype=dtype))
    inner = wrapped.model.forward

    def capped(**inputs):
        output = inner(**inputs)
        output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output

    assert check_head(wrapped)
    monkeypatch.setattr(wrapped.model, "forward", capped)
    assert not check_head(wrapped)


class ScaledHead(torch.nn.Module):
    """A head that is more than a matrix: what LoRA on lm_head or an unusual architecture looks like."""

    def __init__(self, head):
        super().__init__()
        self.inner, self.weight = head, head.weight
        self.bias = None

    def forward(self, hidden):
        return 1.7 * self.inner(hidden)


def with_scaled_head():
    wrapped = LanguageModel(scenes.tiny_model())
    wrapped.model.lm_head = ScaledHead(wrapped.model.lm_head)
    return wrapped


def test_a_head_that_is_more_than_linear_is_found_and_the_models_own_logits_are_used():
    rows = scenes.random_dataset(5, seed=4).rows(range(5))
    wrapped = with_scaled_head()
    assert not check_head(wrapped)
    loss = wrapped(task="loss", **loss_inputs(rows))["loss"]
    expected = torch.cat([oracle.row_nll(wrapped.model, row) for row in rows]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, wrapped.model.lm_head.weight)[0]
    wanted = torch.autograd.grad(expected, wrapped.model.lm_head.weight)[0]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("divergence", ["forward_kl", "mse"])
def test_own_logits_and_fused_head_agree_on_distillation(divergence):
    rows = scenes.random_dataset(4, seed=5).rows(range(4))
    results = []
    for fused in (True, False):
        wrapped = LanguageModel(scenes.tiny_model(family="gemma"))
        wrapped.fused = fused
        inputs = loss_inputs(rows)
        with torch.no_grad():
            stored = wrapped(
                task="topk", k=6, temperature=1.0, **{k: inputs[k] for k in ("input_ids", "position_ids", "positions")}
            )
        count = len(inputs["positions"])
        teacher = stored | dict(
            rows=torch.arange(count),
            kd_weights=torch.full((count,), 0.3 / count),
            divergence=divergence,
            temperature=1.0,
        )
        for p in wrapped.parameters():
            p.data *= 1.1  # away from the teacher
        output = wrapped(task="loss", distillations=[teacher], **inputs)
        output["loss"].backward()
        results.append((output["loss"].item(), output["kd0"], gradient_vector(wrapped), stored["log_tail"]))
    (fused_loss, fused_kd, fused_grad, fused_tail), (loss, kd, grad, tail) = results
    assert loss == pytest.approx(fused_loss, rel=1e-5)
    assert fused_kd.min() > 0 and torch.allclose(kd, fused_kd, rtol=1e-4, atol=1e-7)
    assert (grad - fused_grad).norm() <= 1e-4 * fused_grad.norm()
    assert torch.allclose(tail, fused_tail, rtol=1e-4)


def test_packed_documents_that_see_each_other_are_refused(monkeypatch):
    wrapped = LanguageModel(scenes.tiny_model())
    check_packing(wrapped)
    forward = type(wrapped.model).forward

    def leaking(self, *arguments, position_ids=None, **options):
        return forward(self, *arguments, position_ids=torch.arange(position_ids.shape[-1])[None], **options)

    monkeypatch.setattr(type(wrapped.model), "forward", leaking)
    with pytest.raises(ConfigError, match="packed documents see each other"):
        check_packing(wrapped)


def test_models_that_are_not_supported_are_refused_by_name(tmp_path):
    import transformers

    transformers.MixtralConfig(num_local_experts=4).save_pretrained(tmp_path / "moe")
    with pytest.raises(ConfigError, match="mixture of experts"):
        loading.load_model(ModelConfig(path=str(tmp_path / "moe")))
    with pytest.raises(ConfigError, match=r"model\.path"):
        loading.load_model(ModelConfig(path=str(tmp_path / "nothing")))


def test_attention_is_chosen_by_what_is_there_and_says_why():
    assert choose_attention("auto") == ("sdpa", "no GPU") or torch.cuda.is_available()
    assert choose_attention("eager")[0] == "eager"
