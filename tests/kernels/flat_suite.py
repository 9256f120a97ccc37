"""The checks that every back end of the flat family must pass, as plain functions.

Tests run them, and each break on the mutation list must make one of them fail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from safecl.kernels import adamw_step_, ema_update_, fisher_accumulate_, fisher_penalty_, penalized_grad_norm
from safecl.kernels.flat import arguments as flat_arguments
from tests.kernels.flat_oracle import Case, Inputs, make_inputs, oracle_steps, relative_error

F32, BF16 = torch.float32, torch.bfloat16

CASES = {
    "plain": Case(),
    "bf16 gradient": Case(grad=BF16, first_step=100),
    "clipped and unscaled": Case(clip=0.37, scale=1024.0, first_step=5),
    "l2-sp": Case(anchor=F32),
    "ewc fp32": Case(anchor=F32, fisher=F32, first_step=7),
    "ewc bf16": Case(grad=BF16, anchor=BF16, fisher=BF16, strength=1.3),
    "ewc proximal": Case(anchor=BF16, fisher=F32, proximal=True, strength=4.0),
    "ema": Case(ema_decay=0.9),
    "bf16 copy": Case(out=True),
    "segments": Case(anchor=BF16, fisher=BF16, segmented=True),
    "ema by fisher, no penalty": Case(fisher=BF16, ema_decay=0.5, ema_threshold=0.1, ema_decay_above=0.97),
    "everything": Case(BF16, BF16, BF16, 0.9, False, 0.95, out=True, clip=0.5, scale=8.0, segmented=True, first_step=3),
    "everything proximal": Case(
        F32,
        BF16,
        F32,
        0.9,
        True,
        0.95,
        0.2,
        0.6,
        out=True,
        clip=0.5,
        scale=8.0,
        segmented=True,
        first_step=1000,
        betas=(0.8, 0.95),
        eps=1e-3,
    ),
}


class Guarded:
    """A buffer inside a larger one that is NaN around it.

    A stray write changes the NaN; a stray read shows in the result.
    """

    def __init__(self, values: Tensor, lead: int, device: str):
        pad = float("nan")
        self.whole = torch.full((lead + values.numel() + 67,), pad, dtype=values.dtype, device=device)
        self.inner = self.whole[lead : lead + values.numel()]
        self.inner.copy_(values)
        self.before = _bits(self.whole).clone()
        self.span = (lead, lead + values.numel())

    def assert_surroundings_untouched(self) -> None:
        lead, stop = self.span
        now = _bits(self.whole)
        assert torch.equal(now[:lead], self.before[:lead]) and torch.equal(now[stop:], self.before[stop:]), (
            "wrote outside the buffer"
        )

    def assert_untouched(self) -> None:
        assert torch.equal(_bits(self.whole), self.before), "changed a buffer that had to stay bitwise"


def _bits(t: Tensor) -> Tensor:
    return t.view({4: torch.int32, 2: torch.int16, 8: torch.int64}[t.element_size()])


def guard(inputs: Inputs, device: str, lead: int = 3) -> dict[str, Guarded]:
    names = ("param", "exp_avg", "exp_avg_sq", "anchor", "fisher", "ema", "out")
    leads = range(lead, lead + 2 * len(names), 2)  # every buffer differently (and badly) aligned
    return {
        n: Guarded(getattr(inputs, n), k, device)
        for n, k in zip(names, leads, strict=True)
        if getattr(inputs, n) is not None
    }


def arguments(case: Case, inputs: Inputs, buffers: dict[str, Guarded], step: int) -> dict:
    """Keyword arguments of `adamw_step_` beside the four tensors."""
    given = {n: buffers[n].inner for n in ("anchor", "fisher", "ema") if n in buffers}
    out = {"param_out": buffers["out"].inner} if "out" in buffers else {}
    ema = {k: getattr(case, k) for k in ("ema_decay", "ema_threshold", "ema_decay_above")} if "ema" in given else {}
    return dict(
        step=step,
        lr=case.lr,
        betas=case.betas,
        eps=case.eps,
        weight_decay=case.weight_decay,
        strength=case.strength,
        proximal=case.proximal,
        clip_coef=case.clip,
        grad_scale=case.scale,
        segments=inputs.segments,
        **given,
        **out,
        **ema,
    )


def run_case(
    case: Case,
    numel: int,
    device: str = "cpu",
    steps: int = 3,
    wrap: Callable[[str, float], object] | None = None,
    lead: int = 3,
):
    """Step a case; returns (inputs, guarded buffers, losses). `wrap` turns scalar arguments into tensors."""
    inputs = make_inputs(case, numel, steps)
    buffers, losses = guard(inputs, device, lead), []
    for i, grad in enumerate(inputs.grads):
        kwargs = arguments(case, inputs, buffers, case.first_step + i)
        if wrap:
            scalars = (
                "step",
                "lr",
                "weight_decay",
                "strength",
                "clip_coef",
                "grad_scale",
                "ema_decay",
                "ema_threshold",
                "ema_decay_above",
            )
            kwargs |= {k: wrap(k, kwargs[k]) for k in scalars if kwargs.get(k) is not None}
        g = Guarded(grad, 1, device)
        states = [buffers[n].inner for n in ("param", "exp_avg", "exp_avg_sq")]
        losses.append(adamw_step_(states[0], g.inner, *states[1:], **kwargs))
        g.assert_untouched()
    return inputs, buffers, losses


def check_step(case: Case, numel: int, device: str = "cpu", wrap=None) -> None:
    """States, copy and loss agree with the fp64 oracle relative to the distance moved.

    Nothing outside the buffers changes.
    """
    inputs, buffers, losses = run_case(case, numel, device, wrap=wrap)
    want, want_losses = oracle_steps(case, inputs)
    for name, expected in want.items():
        error = relative_error(buffers[name].inner, expected, getattr(inputs, name))
        bound = 1e-5 if numel > 8 else 1e-3  # a single element may move little; fp32 of p itself is the floor
        assert error <= bound, f"{name} is off by {error:.1e} of the distance it moved"
        assert error > 0 or numel <= 8, f"{name} equals fp64 exactly: the oracle is not independent"
    if case.out:
        assert torch.equal(_bits(buffers["out"].inner), _bits(buffers["param"].inner.bfloat16())), (
            "param_out is not bf16(param)"
        )
    for guarded in buffers.values():
        guarded.assert_surroundings_untouched()
    for name in ("anchor", "fisher"):
        if name in buffers:
            buffers[name].assert_untouched()
    _check_losses(case, losses, want_losses, 2e-6 if numel > 8 else 1e-3)


def _check_losses(case: Case, losses: list, want: list[float], bound: float) -> None:
    for got, expected in zip(losses, want, strict=True):
        if case.anchor is None:
            assert got is None
        else:
            assert got.shape == () and got.dtype == F32
            assert abs(float(got) - expected) <= bound * abs(expected), f"penalty {float(got)} is not {expected}"


def check_found_inf(device: str = "cpu", wrap=lambda x: x) -> None:
    """A found infinity leaves every buffer bitwise, even with NaN in the gradient; without one the step is the same."""
    case = CASES["everything"]
    inputs = make_inputs(case, 1000, steps=1)
    inputs.grads[0][3] = float("inf")
    buffers = guard(inputs, device)
    grad = Guarded(inputs.grads[0], 1, device)
    states = [buffers[n].inner for n in ("param", "exp_avg", "exp_avg_sq")]
    call = arguments(case, inputs, buffers, 3)
    loss = adamw_step_(states[0], grad.inner, *states[1:], **call, found_inf=wrap(1.0))
    assert float(loss) > 0
    for guarded in buffers.values():
        guarded.assert_untouched()
    adamw_step_(states[0], grad.inner, *states[1:], **call, found_inf=wrap(0.0))
    assert not torch.equal(_bits(buffers["ema"].whole), buffers["ema"].before)


def check_nonfinite_count(numel: int, device: str = "cpu") -> None:
    """The count is that of the elements whose new state is not finite, wherever NaN or infinity came from, and is added
    to what was there. Values so large that their sum overflows are finite."""
    for name in ("plain", "everything", "everything proximal"):
        for kind in ("grad", "param", "exp_avg", "exp_avg_sq", "anchor", "fisher", "ema", "none"):
            for value in (float("nan"), float("inf")):
                _check_nonfinite_count(CASES[name], kind, value, numel, device)


def _check_nonfinite_count(case: Case, kind: str, value: float, numel: int, device: str) -> None:
    inputs = make_inputs(case, numel, steps=1)
    places = [0, numel // 2, numel - 1]
    target = inputs.grads[0] if kind == "grad" else getattr(inputs, kind, None)
    if target is None:  # finite, but the sum of two overflows
        inputs.param[places] = 3e38
    else:
        target[places] = value
    buffers = guard(inputs, device)
    states = {n: buffers[n].inner for n in ("param", "exp_avg", "exp_avg_sq")}
    count, grad = torch.full((), 5, dtype=torch.int64, device=device), Guarded(inputs.grads[0], 1, device)
    call = arguments(case, inputs, buffers, 3)
    adamw_step_(states["param"], grad.inner, states["exp_avg"], states["exp_avg_sq"], **call, nonfinite=count)
    if "ema" in buffers:
        states["ema"] = buffers["ema"].inner
    want = sum(torch.stack([t.isfinite() for t in states.values()]).all(0).logical_not())
    assert int(count) - 5 == int(want), f"{kind} {value}: counted {int(count) - 5}, there are {int(want)}"
    if kind in ("grad", "param", "exp_avg", "exp_avg_sq"):
        assert int(want) == len(set(places)), kind


def check_ema(param_dtype: torch.dtype, numel: int, device: str = "cpu", wrap=lambda x: x) -> None:
    g = torch.Generator().manual_seed(numel)
    start, param = torch.randn(numel, generator=g), torch.randn(numel, generator=g).to(param_dtype)
    ema, source = Guarded(start, 5, device), Guarded(param, 3, device)
    assert ema_update_(ema.inner, source.inner, wrap(0.9)) is ema.inner
    want = 0.9 * start.double() + 0.1 * param.double()
    error = relative_error(ema.inner, want, start)
    assert error <= 1e-6, f"ema is off by {error:.1e} of the distance it moved"
    ema.assert_surroundings_untouched()
    source.assert_untouched()


def check_fisher_masked_ema(device: str = "cpu") -> None:
    """Above the threshold one decay, below, at it and where Fisher is NaN the other; thresholds of 0 and beyond the
    largest are no edge."""
    fisher = torch.tensor([0.0, 0.25, 0.5, 1.0, float("nan")], device=device)
    for threshold, above in ((0.0, [1, 2, 3]), (0.25, [2, 3]), (0.5, [3]), (3e38, [])):
        p, g, m, v, ema = (torch.zeros(5, device=device) for _ in range(5))
        p += 1.0
        average = dict(ema=ema, ema_decay=0.75, ema_threshold=threshold, ema_decay_above=0.25)
        adamw_step_(p, g, m, v, step=1, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, fisher=fisher, **average)
        assert ema.tolist() == [0.75 if i in above else 0.25 for i in range(5)], f"threshold {threshold}"


def check_ema_drift(device: str = "cpu", steps: int = 1000, numel: int = 257) -> None:
    """After many updates from bf16 weights that keep moving, the fp32 average is the fp64 average, to 1e-5 of the
    distance it moved."""
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(numel, generator=g)
    ema = weights.clone().to(device)
    exact = weights.double()
    for _ in range(steps):
        weights += 1e-3 * torch.randn(numel, generator=g) + 1e-3
        low = weights.bfloat16()
        ema_update_(ema, low.to(device), 0.999)
        exact = 0.999 * exact + (1 - 0.999) * low.double()
    error = relative_error(ema, exact, torch.randn(numel, generator=torch.Generator().manual_seed(3)))
    assert error <= 1e-5, f"after {steps} updates the average is off by {error:.1e} of the distance it moved"


def check_fisher(grad_dtype: torch.dtype, numel: int, device: str = "cpu", wrap=lambda x: x) -> None:
    g = torch.Generator().manual_seed(numel)
    start, grad = torch.rand(numel, generator=g), torch.randn(numel, generator=g).to(grad_dtype)
    fisher, source = Guarded(start, 5, device), Guarded(grad, 3, device)
    fisher_accumulate_(fisher.inner, source.inner, wrap(1.7))
    error = relative_error(fisher.inner, start.double() + 1.7 * grad.double().pow(2), start)
    assert error <= 1e-6, f"fisher is off by {error:.1e} of the distance it moved"
    fisher.assert_surroundings_untouched()
    source.assert_untouched()


def check_penalty(dtypes: tuple, numel: int, device: str = "cpu", wrap=lambda x: x) -> None:
    """dtypes of grad, param, anchor, fisher (None: no Fisher)."""
    g = torch.Generator().manual_seed(numel)
    shape = lambda dtype: None if dtype is None else torch.randn(numel, generator=g).to(dtype)  # noqa: E731
    grad, param, anchor, fisher = (shape(d) for d in dtypes)
    fisher = None if fisher is None else fisher.abs()
    leaf = param.double().requires_grad_()
    weight = 1.0 if fisher is None else fisher.double()
    exact = 0.65 * (weight * (leaf - anchor.double()).square()).sum()
    exact.backward()
    target, reads = Guarded(grad, 3, device), [Guarded(t, 5, device) for t in (param, anchor)]
    f = None if fisher is None else Guarded(fisher, 7, device).inner
    loss = fisher_penalty_(target.inner, *(r.inner for r in reads), f, wrap(1.3))
    bound = 1e-6 if dtypes[0] == F32 else 8e-3 if numel > 8 else 0.1  # one rounding of the result to bf16
    error = relative_error(target.inner, grad.double() + leaf.grad, grad)
    assert error <= bound, f"gradient is off by {error:.1e} of the distance it moved"
    assert loss.shape == () and abs(float(loss) - exact.item()) <= 2e-6 * exact.item()
    target.assert_surroundings_untouched()
    for r in reads:
        r.assert_untouched()


def check_total_clipping(numel: int, device: str = "cpu") -> None:
    """Clipping gradient and penalty together: the norm in one pass, then the step with the coefficient on both."""
    case = replace(CASES["ewc bf16"], segmented=True, grad=F32, scale=4.0)
    inputs = make_inputs(case, numel, steps=1)
    b = guard(inputs, device)
    grad = inputs.grads[0].to(device)
    tensors = (grad, b["param"].inner, b["anchor"].inner, b["fisher"].inner)
    square, penalty = penalized_grad_norm(*tensors, case.strength, grad_scale=4.0, segments=inputs.segments)
    offsets, strengths, _ = inputs.segments
    spread = torch.repeat_interleave(torch.tensor(strengths, dtype=torch.float64), torch.tensor(offsets).diff())
    pull = spread * inputs.fisher.double() * (inputs.param.double() - inputs.anchor.double())
    total = inputs.grads[0].double() / 4.0 + pull
    assert abs(float(square) - float(total.square().sum())) <= 2e-6 * float(total.square().sum())
    want = 0.5 * float((pull * (inputs.param.double() - inputs.anchor.double())).sum())
    assert abs(float(penalty) - want) <= 2e-6 * abs(want)
    clip = 0.5
    table = (offsets, [clip * s for s in strengths], inputs.segments[2])
    call = arguments(case, inputs, b, 1) | {"segments": table, "clip_coef": clip}
    adamw_step_(b["param"].inner, grad, b["exp_avg"].inner, b["exp_avg_sq"].inner, **call)
    assert relative_error(b["exp_avg"].inner, (1 - case.betas[0]) * clip * total) <= 1e-6


def check_split_invariance(numel: int, cut: int, device: str = "cpu") -> None:
    """Stepping two parts of a buffer, segments cut likewise, gives bitwise the whole; so do EMA and Fisher."""
    for name in ("everything", "everything proximal"):
        case = CASES[name]
        inputs, whole, _ = run_case(case, numel, device, steps=1)
        parts = guard(inputs, device, lead=4)
        table = flat_arguments.check_segments(inputs.segments, numel, torch.device(device))
        grad = inputs.grads[0].to(device)
        for part in (slice(0, cut), slice(cut, numel)):
            call = arguments(case, inputs, parts, case.first_step)
            call |= {k: call[k][part] for k in ("anchor", "fisher", "ema", "param_out") if k in call}
            call["segments"] = table.slice(part.start, part.stop)
            adamw_step_(
                parts["param"].inner[part],
                grad[part],
                *(parts[n].inner[part] for n in ("exp_avg", "exp_avg_sq")),
                **call,
            )
        for key, guarded in whole.items():
            assert torch.equal(_bits(guarded.inner), _bits(parts[key].inner)), f"{key} depends on how the buffer is cut"


def check_repeatability(numel: int, device: str = "cpu") -> None:
    """The same call gives the same bits, loss included."""
    results = [run_case(CASES["everything"], numel, device, steps=2) for _ in range(3)]
    for _, buffers, losses in results[1:]:
        assert [float(x) for x in losses] == [float(x) for x in results[0][2]]
        for name, guarded in buffers.items():
            assert torch.equal(_bits(guarded.inner), _bits(results[0][1][name].inner))


def check_stochastic_rounding(device: str = "cpu", numel: int = 4096, draws: int = 64) -> None:
    """A bf16 EMA stays on the two neighbours of the exact value, averages to it over draws and elements, and repeats
    with its seed."""
    exact = 1.0 + 0.1 * (2.0 - 1.0) * 0.01  # from 1 towards 1.01 at rate 0.1: 13 % of a bf16 step
    target, sums = torch.full((numel,), 1.01, device=device), torch.zeros(numel, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    firsts = []
    for draw in range(draws):
        ema = Guarded(torch.ones(numel, dtype=BF16), 3, device)
        ema_update_(ema.inner, target, 0.9, generator=generator)
        assert set(ema.inner.float().unique().tolist()) <= {1.0, 1.0078125}
        ema.assert_surroundings_untouched()
        sums += ema.inner.double().cpu()
        firsts += [ema.inner.clone()] if draw < 2 else []
    mean = float(sums.mean() / draws)
    deviation = 0.0078125 * (0.128 * 0.872 / (numel * draws)) ** 0.5
    assert abs(mean - exact) <= 5 * deviation, f"mean {mean} is not {exact}: biased rounding"
    per_element = sums / draws
    assert float(per_element.std()) <= 1.2 * 0.0078125 * (0.128 * 0.872 / draws) ** 0.5, (
        "elements keep their rounding from draw to draw"
    )
    assert not torch.equal(*firsts), "two draws from one generator are equal"
    again = torch.ones(numel, dtype=BF16, device=device)
    ema_update_(again, target, 0.9, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again, firsts[0]), "the same seed rounds differently"


def check_stochastic_specials(device: str = "cpu") -> None:
    """Infinity and NaN pass through stochastic rounding; values that bf16 holds are never changed."""
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.5, -0.0, 3.0e38, -2.0], device=device)
    ema = torch.zeros(7, dtype=BF16, device=device)
    ema_update_(ema, values.bfloat16(), 0.0, generator=torch.Generator().manual_seed(1))
    want = values.bfloat16()
    assert torch.equal(ema.isnan(), want.isnan()) and torch.equal(ema.nan_to_num(), want.nan_to_num())


def check_nan_is_not_hidden(device: str = "cpu") -> None:
    """A NaN gradient reaches exactly its own element, also in the bf16 copy and the EMA."""
    case = CASES["everything"]
    inputs = make_inputs(case, 300, steps=1)
    b = guard(inputs, device)
    grad = inputs.grads[0].clone()
    grad[77] = float("nan")
    call = arguments(case, inputs, b, 3)
    adamw_step_(b["param"].inner, grad.to(device), b["exp_avg"].inner, b["exp_avg_sq"].inner, **call)
    for name in ("param", "exp_avg", "exp_avg_sq", "ema", "out"):
        assert b[name].inner.isnan().nonzero().flatten().tolist() == [77], name


def check_proximal_is_stable(device: str = "cpu") -> None:
    """Whatever strength x lr, the proximal step ends between start and anchor; the strongest ends on the anchor, a tiny
    one is exact."""
    for strength, lr in ((1e-9, 1e-3), (1.0, 1e-3), (1e12, 1e-3), (3e38, 1e-3), (3e38, 10.0)):
        case = Case(anchor=F32, fisher=F32, proximal=True, strength=strength, lr=lr, weight_decay=0.0)
        inputs = make_inputs(case, 513, steps=1)
        inputs.grads[0].zero_()
        want, _ = oracle_steps(case, inputs)
        b = guard(inputs, device)
        adamw_step_(
            b["param"].inner,
            inputs.grads[0].to(device),
            b["exp_avg"].inner,
            b["exp_avg_sq"].inner,
            **arguments(case, inputs, b, 1),
        )
        got = b["param"].inner
        assert relative_error(got, want["param"]) <= 2e-7, f"strength {strength}"
        if strength == 1.0:
            assert (
                relative_error(got, want["param"], inputs.param) <= 1e-3
            )  # moved by 1e-4 of |p|; fp32 of p itself is the floor


@contextmanager
def scalars_stay_on_device():
    """Treat CPU scalar tensors as device scalars, so that the path without a host read runs without a device."""
    original = flat_arguments.stays_on_device
    flat_arguments.stays_on_device = lambda value: isinstance(value, Tensor)
    try:
        yield
    finally:
        flat_arguments.stays_on_device = original


def as_tensor(_: str, value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def check_device_scalars() -> None:
    """Every scalar as a tensor that the host never reads, for all kernels; CPU tensors stand in for the device's."""
    with scalars_stay_on_device():
        for name in ("everything", "everything proximal", "plain"):
            check_step(CASES[name], 1023, wrap=as_tensor)
        check_found_inf(wrap=torch.tensor)
        check_ema(BF16, 129, wrap=torch.tensor)
        check_fisher(BF16, 129, wrap=torch.tensor)
        check_penalty((F32, F32, BF16, BF16), 129, wrap=torch.tensor)
        check_total_clipping(1000)


def check_partial_sums(device: str = "cpu") -> None:
    """The Triton kernels' second stage adds more partial sums than it has lanes, in fp64."""
    from safecl.kernels.flat import triton_kernels

    partial = torch.rand(2 * triton_kernels.LANES + 77, generator=torch.Generator().manual_seed(0)).to(device)
    want = 0.5 * float(partial.double().sum())
    assert abs(float(triton_kernels._sum(partial, 0.5, torch.float64)) - want) <= 1e-12 * want


def quick_checks(
    sizes: tuple[int, ...], device: str = "cpu", triton: bool = False
) -> list[tuple[str, Callable[[], None]]]:
    """The whole list at small sizes: what the interpreter, the mutations and the GPU run."""
    checks = [
        (f"step {name}, {n} elements", lambda c=case, n=n: check_step(c, n, device))
        for name, case in CASES.items()
        for n in sizes
    ]
    checks += [(f"ema from {d}, {n}", lambda d=d, n=n: check_ema(d, n, device)) for d in (F32, BF16) for n in sizes]
    checks += [
        (f"fisher from {d}, {n}", lambda d=d, n=n: check_fisher(d, n, device)) for d in (F32, BF16) for n in sizes
    ]
    penalties = ((F32, F32, F32, F32), (F32, F32, BF16, BF16), (BF16, BF16, BF16, BF16), (F32, F32, F32, None))
    checks += [(f"penalty {d}, {n}", lambda d=d, n=n: check_penalty(d, n, device)) for d in penalties for n in sizes]
    checks += [
        ("found_inf", lambda: check_found_inf(device)),
        ("nonfinite", lambda: check_nonfinite_count(max(sizes), device)),
        ("total clipping", lambda: check_total_clipping(max(sizes), device)),
        ("split", lambda: check_split_invariance(max(sizes), max(sizes) // 3, device)),
        ("repeat", lambda: check_repeatability(max(sizes), device)),
        ("stochastic rounding", lambda: check_stochastic_rounding(device)),
        ("stochastic specials", lambda: check_stochastic_specials(device)),
        ("nan", lambda: check_nan_is_not_hidden(device)),
        ("ema by fisher", lambda: check_fisher_masked_ema(device)),
        ("proximal", lambda: check_proximal_is_stable(device)),
    ]
    checks += [("partial sums", lambda: check_partial_sums(device))] if triton else []
    return checks


def mutation_checks(backend: str) -> list[tuple[str, Callable[[], None]]]:
    """The checks that must notice a break of the kernels in a back end."""
    checks = quick_checks((7, 5000 if backend == "triton" else 40_001), triton=backend == "triton")
    return checks + ([] if backend == "cpp" else [("device scalars", check_device_scalars)])
