from __future__ import annotations

import pytest
import torch

from safecl.kernels import backends, native
from tests.kernels import flat_suite as suite

F32, BF16 = suite.F32, suite.BF16
SIZES = (0, 1, 7, 127, 129, 1023, 70001)
PENALTY_DTYPES = [
    (F32, F32, F32, F32),
    (F32, F32, BF16, F32),
    (F32, F32, BF16, BF16),
    (BF16, BF16, BF16, BF16),
    (BF16, F32, F32, None),
]


@pytest.fixture(params=["torch", "cpp"], autouse=True)
def backend(request):
    if request.param == "cpp" and native.missing():
        pytest.skip(native.missing())
    with backends.using(request.param):
        yield request.param


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", suite.CASES)
def test_the_fused_step_is_adamw_with_penalty_and_ema(name, numel):
    suite.check_step(suite.CASES[name], numel)


def test_device_scalars_give_the_same_step_without_being_read(backend):
    if backend == "cpp":
        pytest.skip("scalars of CPU buffers are always read")
    suite.check_device_scalars()


def test_host_scalar_tensors_equal_numbers_bitwise():
    case = suite.CASES["everything"]
    _, numbers, _ = suite.run_case(case, 1023)
    _, tensors, _ = suite.run_case(case, 1023, wrap=suite.as_tensor)
    assert all(torch.equal(numbers[n].inner, tensors[n].inner) for n in numbers)


def test_the_pass_counts_what_it_writes_that_is_not_finite():
    suite.check_nonfinite_count(40_001)


def test_found_inf_leaves_every_state_bitwise():
    suite.check_found_inf()
    suite.check_found_inf(wrap=torch.tensor)
    suite.check_found_inf(wrap=lambda x: torch.tensor([x]))


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ema_moves_towards_the_weights_at_the_decay(dtype, numel):
    suite.check_ema(dtype, numel)


def test_each_element_of_a_fisher_masked_average_has_the_decay_of_its_fisher():
    suite.check_fisher_masked_ema()


def test_a_thousand_ema_updates_do_not_drift():
    suite.check_ema_drift()


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fisher_accumulates_weighted_squares(dtype, numel):
    suite.check_fisher(dtype, numel)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtypes", PENALTY_DTYPES)
def test_the_penalty_gradient_is_the_derivative_of_the_penalty(dtypes, numel):
    suite.check_penalty(dtypes, numel)


@pytest.mark.parametrize("numel", [1, 1000, 70001])
def test_total_clipping_scales_gradient_and_penalty_alike(numel):
    suite.check_total_clipping(numel)


@pytest.mark.parametrize("cut", [1, 64, 33333, 65536])
def test_two_halves_equal_the_whole_bitwise(cut):
    suite.check_split_invariance(70001, cut)


def test_results_repeat_bitwise():
    suite.check_repeatability(200_001)


def test_stochastic_rounding_is_unbiased_and_seeded():
    suite.check_stochastic_rounding()
    suite.check_stochastic_specials()


def test_a_bf16_ema_without_a_generator_is_refused():
    ema = torch.zeros(4, dtype=BF16)
    with pytest.raises(ValueError, match=r"ema .*generator"):
        suite.ema_update_(ema, torch.ones(4), 0.9)


def test_nan_stays_where_it_is_and_is_not_hidden():
    suite.check_nan_is_not_hidden()


def test_the_proximal_step_is_stable_for_any_strength_and_learning_rate():
    suite.check_proximal_is_stable()


def test_p_on_the_anchor_has_no_penalty_at_all():
    p = torch.randn(1000).bfloat16().float()
    grad = torch.zeros(1000)
    loss = suite.fisher_penalty_(grad, p, p.bfloat16(), torch.rand(1000), 1e6)
    assert float(loss) == 0.0 and not grad.any()


def test_any_shape_is_one_flat_buffer():
    ema, param = torch.zeros(3, 5, 7), torch.ones(105)
    suite.ema_update_(ema, param, 0.5)
    assert torch.equal(ema, torch.full((3, 5, 7), 0.5))


def test_a_saved_tensor_that_a_kernel_wrote_is_noticed_by_autograd():
    ema, x = torch.ones(4), torch.ones(4, requires_grad=True)
    y = (x * ema).sum()
    suite.ema_update_(ema, torch.zeros(4), 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_parameters_that_require_grad_are_stepped_like_any_tensor():
    p = torch.nn.Parameter(torch.ones(5))
    m, v = torch.zeros(5), torch.zeros(5)
    suite.adamw_step_(p, torch.ones(5), m, v, step=1, lr=0.5, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    assert torch.allclose(p, torch.full((5,), 0.5)) and p.grad_fn is None
