"""Bad input is a ValueError that names the argument, and nothing is written."""

from __future__ import annotations

import math

import pytest
import torch

from safecl.kernels import adamw_step_, ema_update_, fisher_accumulate_, fisher_penalty_, penalized_grad_norm

N = 12
CALL = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def buffers() -> dict[str, torch.Tensor]:
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "anchor", "fisher", "ema")
    made = {name: torch.rand(N) for name in names}
    return made | {"param_out": torch.zeros(N, dtype=torch.bfloat16)}


def step(tensors: dict, **changes) -> None:
    given = tensors | {k: v for k, v in changes.items() if k in tensors}
    scalars = CALL | {"strength": 0.5, "ema_decay": 0.9} | {k: v for k, v in changes.items() if k not in tensors}
    adamw_step_(**given, **scalars)


BAD_STEPS = {
    "param half": ({"param": torch.rand(N).half()}, "param must be float32, not float16"),
    "grad half": ({"grad": torch.rand(N).half()}, "grad must be float32 or bfloat16"),
    "bf16 moment": ({"exp_avg": torch.rand(N).bfloat16()}, "exp_avg must be float32"),
    "bf16 ema": ({"ema": torch.rand(N).bfloat16()}, "ema must be float32"),
    "fp32 param_out": ({"param_out": torch.rand(N)}, "param_out must be bfloat16"),
    "not a tensor": ({"exp_avg_sq": [0.0] * N}, "exp_avg_sq must be a tensor"),
    "short grad": ({"grad": torch.rand(N - 1)}, "grad has 11 elements but param has 12"),
    "long anchor": ({"anchor": torch.rand(N + 1)}, "anchor has 13 elements"),
    "strided fisher": ({"fisher": torch.rand(2 * N)[::2]}, "fisher must be contiguous"),
    "meta device": ({"fisher": torch.rand(N, device="meta")}, "fisher is on meta but param is on cpu"),
    "fisher alone": ({"anchor": None}, "fisher needs an anchor"),
    "ema alone": ({"ema_decay": None}, "ema and ema_decay belong together"),
    "decay above one": ({"ema_decay": 1.5}, r"ema_decay must be finite and in \[0, 1\]"),
    "negative decay": ({"ema_decay": -0.1}, "ema_decay"),
    "negative threshold": ({"ema_threshold": -1.0, "ema_decay_above": 0.5}, "ema_threshold must be finite and >= 0"),
    "threshold alone": ({"ema_threshold": 0.5}, "ema_threshold and ema_decay_above belong together"),
    "decay above alone": ({"ema_decay_above": 0.5}, "ema_threshold and ema_decay_above belong together"),
    "threshold without ema": (
        {"ema": None, "ema_decay": None, "ema_threshold": 0.5, "ema_decay_above": 0.5},
        "ema_threshold needs an ema",
    ),
    "threshold without fisher": (
        {"fisher": None, "ema_threshold": 0.5, "ema_decay_above": 0.5},
        "ema_threshold needs a fisher",
    ),
    "nan decay above": (
        {"ema_threshold": 0.5, "ema_decay_above": math.nan},
        r"ema_decay_above must be finite and in \[0, 1\]",
    ),
    "nan strength": ({"strength": math.nan}, "strength must be finite and >= 0, not nan"),
    "negative strength": ({"strength": -1.0}, "strength"),
    "negative lr": ({"lr": -1e-3}, "lr must be"),
    "nan lr tensor": ({"lr": torch.tensor(math.nan)}, "lr must be"),
    "lr of two": ({"lr": torch.zeros(2)}, "lr must be a number or a tensor of one element"),
    "text lr": ({"lr": "fast"}, "lr must be a number"),
    "step zero": ({"step": 0}, "step must be finite and >= 1"),
    "beta of one": ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
    "one beta": ({"betas": (0.9,)}, "betas must be a pair"),
    "negative eps": ({"eps": -1e-8}, "eps"),
    "negative weight decay": ({"weight_decay": -0.1}, "weight_decay"),
    "infinite clip": ({"clip_coef": math.inf}, "clip_coef"),
    "zero scale": ({"grad_scale": 0.0}, "grad_scale must be > 0"),
    "found_inf of two": ({"found_inf": torch.zeros(2)}, "found_inf"),
    "nonfinite of two": ({"nonfinite": torch.zeros(2, dtype=torch.int64)}, "nonfinite"),
    "nonfinite in fp32": ({"nonfinite": torch.zeros(())}, "nonfinite must be int64"),
    "nonfinite as a number": ({"nonfinite": 0}, "nonfinite must be a tensor"),
    "segments of two": ({"segments": ([0, N], None)}, "segments must be three"),
    "segments that stop early": ({"segments": ([0, 5], [1.0], None)}, "segments offsets must ascend from 0 to 12"),
    "segments that descend": ({"segments": ([0, 8, 4, N], [1.0] * 3, None)}, "segments offsets must ascend"),
    "segments of wrong width": (
        {"segments": ([0, 4, N], [1.0], None)},
        "segments strength has 1 entries but the offsets make 2",
    ),
    "negative segment": ({"segments": ([0, N], None, [-1.0])}, "segments weight_decay must be finite"),
    "nan segment": ({"segments": ([0, N], [math.nan], None)}, "segments strength must be finite"),
    "text segments": ({"segments": (["a", "b"], None, None)}, "segments offsets"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_a_bad_step_argument_is_named_and_nothing_is_written(name):
    changes, message = BAD_STEPS[name]
    tensors = buffers()
    before = {k: t.clone() for k, t in tensors.items()}
    with pytest.raises(ValueError, match=message):
        step(tensors, **changes)
    assert all(torch.equal(t, before[k]) for k, t in tensors.items())


@pytest.mark.parametrize("written", ["param", "exp_avg", "exp_avg_sq", "ema"])
@pytest.mark.parametrize("other", ["grad", "anchor", "fisher", "ema", "exp_avg_sq"])
def test_overlapping_buffers_are_refused_by_name(written, other):
    if written == other:
        return
    tensors, both = buffers(), torch.rand(2 * N)
    tensors |= {written: both[:N], other: both[N - 1 : 2 * N - 1]}
    with pytest.raises(ValueError, match=f"({written} and {other}|{other} and {written}) overlap"):
        step(tensors)


def test_reads_may_share_memory():
    tensors = buffers()
    step(tensors, anchor=tensors["fisher"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_update_(torch.rand(4), torch.rand(5), 0.9), "ema has 4 elements but param has 5"),
        (lambda: ema_update_(torch.rand(4), torch.rand(4).double(), 0.9), "param must be float32 or bfloat16"),
        (lambda: ema_update_(torch.rand(4), torch.rand(4), -0.5), "decay must be"),
        (lambda: ema_update_(torch.rand(4), torch.rand(4), math.nan), "decay must be"),
        (lambda: fisher_accumulate_(torch.rand(4).bfloat16(), torch.rand(4)), "fisher must be float32"),
        (lambda: fisher_accumulate_(torch.rand(4), torch.rand(4), -1.0), "weight must be"),
        (lambda: fisher_accumulate_(torch.rand(4), torch.arange(4)), "grad must be"),
        (lambda: fisher_penalty_(torch.rand(4), torch.rand(4), torch.rand(3), None, 1.0), "anchor has 3 elements"),
        (
            lambda: fisher_penalty_(torch.rand(4), torch.rand(4), torch.rand(4), torch.rand(4), math.nan),
            "strength must be",
        ),
        (lambda: penalized_grad_norm(torch.rand(4), grad_scale=0), "grad_scale"),
        (lambda: penalized_grad_norm(torch.rand(4), None, torch.rand(4)), "param must be a tensor"),
    ],
)
def test_a_bad_argument_of_a_single_kernel_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_update_of_a_buffer_from_itself_is_refused():
    x = torch.rand(4)
    with pytest.raises(ValueError, match="overlap"):
        ema_update_(x, x, 0.9)
    with pytest.raises(ValueError, match="overlap"):
        fisher_accumulate_(x, x)
    with pytest.raises(ValueError, match="overlap"):
        fisher_penalty_(x, x, torch.rand(4), None, 1.0)
