"""The speed of the flat kernels: optimizer step, AdamW, EMA, Fisher accumulation and Fisher penalty.

    python -m benchmarks.kernels.flat                        CPU; DeepSpeed compiles its Adam on first use
    python -m benchmarks.kernels.flat --device cuda          GPU

Roof: a copy of the same size in the same rounds. Rivals: on a CPU the usual and the careful form with DeepSpeedCPUAdam
and torch operations; on a GPU torch's fused AdamW, our kernels one by one, and torch.compile. Error: that of the
written buffers against fp64, relative to the distance moved. The contenders of a case alternate in one process, and
ratios are those of medians; harness.take_turns describes which rounds count on a shared machine. Writes
benchmarks/results/flat-<device>.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import ROOT

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_ext"))
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor

from benchmarks.harness import Contender, machine, print_table, take_turns, write_json
from safecl.kernels import adamw_step_, backends, ema_update_, fisher_accumulate_, fisher_penalty_, native
from safecl.kernels.pages import page_bytes, use_huge_pages

BF16 = torch.bfloat16
HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
DECAY, STRENGTH, STEP = 0.999, 0.7, 10
FUSED = "fused"  # C++ on a CPU, Triton on a GPU
ENGINE = "fused, as the engine calls it"  # clip coefficient on the device, count of values that are not finite, no copy
SMALL_PAGES = "fused, ordinary pages"
ERROR_NUMEL = 1_000_003

# (case, contender, rival, the contender's speed must be at least this many times the rival's)
LIMITS = {
    "cpu": [
        ("step", FUSED, "usual: DeepSpeedCPUAdam + torch", 8.0),
        ("step", FUSED, "careful: in place, one scratch", 1.8),
        ("step", FUSED, "DeepSpeedCPUAdam alone", 1 / 1.6),
        ("ema", FUSED, "usual: mul_, add_", 6.0),
        ("ema", FUSED, "careful: copy_ to scratch, lerp_", 2.0),
        ("fisher", FUSED, "roof: add_", 0.9),
    ],
    "cuda": [
        ("step", FUSED, "separate: our kernels + torch fused AdamW", 1.25),
        ("step", FUSED, "torch.compile", 0.97),
        ("step", ENGINE, "roof: copy", 0.9),
        *((case, FUSED, "roof: copy", 0.9) for case in ("step", "adamw", "ema", "fisher", "penalty")),
    ],
}


@dataclass
class Buffers:
    """One shard's state, allocated once and used by all contenders of a case; in huge pages, as in the engine."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor
    anchor: Tensor
    fisher: Tensor
    anchor32: Tensor  # for the rivals: torch is slow where dtypes differ
    fisher32: Tensor
    out: Tensor
    scratch: Tensor

    @staticmethod
    def random(numel: int, device: torch.device) -> Buffers:
        g = torch.Generator(device).manual_seed(0)
        normal = lambda scale: torch.randn(numel, generator=g, device=device).mul_(scale)  # noqa: E731
        param, low = normal(1.0), torch.empty(numel, dtype=BF16, device=device)
        anchor = normal(0.01).add_(param).bfloat16()
        moments = normal(0.1), normal(0.1).square_().add_(1e-3)
        fisher = normal(1.0).square_().bfloat16()
        ema = normal(0.1).add_(param)
        buffers = Buffers(
            param, normal(1.0), *moments, ema, anchor, fisher, anchor.float(), fisher.float(), low, normal(1.0)
        )
        for tensor in vars(buffers).values():
            use_huge_pages(tensor)
        return buffers


Runs = dict[str, tuple[Callable[[], object], float]]  # name -> (call, bytes that the job must move per element)


def fused_adamw(b: Buffers, **options: Tensor | float) -> Callable[[], object]:
    return lambda: adamw_step_(b.param, b.grad, b.exp_avg, b.exp_avg_sq, step=STEP, **HYPER, **options)


def fused_step(b: Buffers, anchor: Tensor, fisher: Tensor) -> Callable[[], object]:
    penalty = {"anchor": anchor, "fisher": fisher, "strength": STRENGTH}
    return fused_adamw(b, **penalty, ema=b.ema, ema_decay=DECAY, param_out=b.out)


def engine_step(b: Buffers) -> Callable[[], object]:
    """The step as the engine calls it. DeepSpeed makes the bf16 copy itself."""
    device = b.param.device
    scalars = {
        "clip_coef": torch.ones((), device=device),
        "nonfinite": torch.zeros((), dtype=torch.int64, device=device),
    }
    penalty = {"anchor": b.anchor, "fisher": b.fisher, "strength": STRENGTH}
    return fused_adamw(b, **penalty, ema=b.ema, ema_decay=DECAY, **scalars)


def fused_step_then_copy(b: Buffers) -> Callable[[], object]:
    """The step, then the copy in a separate pass, as DeepSpeed does it."""
    penalty = {"anchor": b.anchor, "fisher": b.fisher, "strength": STRENGTH}
    return in_order(fused_adamw(b, **penalty, ema=b.ema, ema_decay=DECAY), lambda: b.out.copy_(b.param))


def fused_step_low(b: Buffers) -> Callable[[], object]:
    low = replace(b, grad=b.grad.bfloat16())
    return fused_step(low, b.anchor, b.fisher)


def fused_step_small_pages(b: Buffers) -> Callable[[], object]:
    """The step on copies of the buffers in ordinary pages."""
    copies = Buffers(**{name: tensor.clone() for name, tensor in vars(b).items()})
    return fused_step(copies, copies.anchor, copies.fisher)


def forced(backend: str, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> None:
        with backends.using(backend):
            run()

    return call


def deepspeed_adam(b: Buffers) -> Callable[[], object]:
    """DeepSpeedCPUAdam on the same buffers, moments included."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    p = torch.nn.Parameter(b.param)
    p.grad = b.grad
    optimizer = DeepSpeedCPUAdam([p], adamw_mode=True, **HYPER)
    optimizer.state[p] = {"step": STEP - 1, "exp_avg": b.exp_avg, "exp_avg_sq": b.exp_avg_sq}
    return optimizer.step


def torch_fused_adam(b: Buffers) -> Callable[[], object]:
    p = torch.nn.Parameter(b.param)
    p.grad = b.grad
    optimizer = torch.optim.AdamW([p], fused=True, **HYPER)
    step = torch.tensor(STEP - 1.0, device=b.param.device)
    optimizer.state[p] = {"step": step, "exp_avg": b.exp_avg, "exp_avg_sq": b.exp_avg_sq}
    return optimizer.step


def autograd_penalty(b: Buffers) -> Callable[[], object]:
    """EWC as it is usually written: a loss term with its backward."""
    leaf = torch.nn.Parameter(b.param)
    leaf.grad = b.grad
    return lambda: (0.5 * STRENGTH * (b.fisher32 * (leaf - b.anchor32).square()).sum()).backward()


def careful_penalty(b: Buffers) -> Callable[[], object]:
    """EWC in place with one reused scratch buffer."""

    def run() -> Tensor:
        torch.sub(b.param, b.anchor32, out=b.scratch)
        b.grad.addcmul_(b.scratch, b.fisher32, value=STRENGTH)
        return 0.5 * STRENGTH * torch.dot(b.scratch.square_(), b.fisher32)

    return run


def in_order(*calls: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        for call in calls:
            call()

    return run


def usual_ema(b: Buffers, source: Tensor) -> Callable[[], object]:
    return lambda: b.ema.mul_(DECAY).add_(source, alpha=1 - DECAY)


def separate_kernels(b: Buffers) -> Callable[[], object]:
    """Our kernels one after the other, with torch's fused AdamW."""
    penalty = lambda: fisher_penalty_(b.grad, b.param, b.anchor, b.fisher, STRENGTH)  # noqa: E731
    average = lambda: ema_update_(b.ema, b.param, DECAY)  # noqa: E731
    return in_order(penalty, torch_fused_adam(b), average, lambda: b.out.copy_(b.param))


def compiled_step(b: Buffers) -> Callable[[], object]:
    """The whole step as compiled torch operations; scalars are tensors, so that a new lr does not recompile."""
    beta1, beta2 = HYPER["betas"]
    scalars = {
        "lr": HYPER["lr"],
        "c1": 1 - beta1**STEP,
        "c2": (1 - beta2**STEP) ** 0.5,
        "strength": STRENGTH,
        "rate": 1 - DECAY,
    }
    scalars = {k: torch.tensor(v, device=b.param.device) for k, v in scalars.items()}

    @torch.compile(dynamic=False)
    def step(p, g, m, v, a, f, e, out, lr, c1, c2, strength, rate):
        distance = p - a.float()
        pull = strength * f.float() * distance
        total = g.float() + pull
        m.copy_(beta1 * m + (1 - beta1) * total)
        v.copy_(beta2 * v + (1 - beta2) * total * total)
        p.copy_(p - (lr * HYPER["weight_decay"] * p + lr / c1 * m / (v.sqrt() / c2 + HYPER["eps"])))
        e.copy_(e + rate * (p - e))
        out.copy_(p)
        return 0.5 * (pull * distance).sum()

    return lambda: step(b.param, b.grad, b.exp_avg, b.exp_avg_sq, b.anchor, b.fisher, b.ema, b.out, **scalars)


def step_runs(b: Buffers, cuda: bool) -> Runs:
    runs: Runs = {
        FUSED: (fused_step(b, b.anchor, b.fisher), 42),
        ENGINE: (engine_step(b), 40),
        "fused, bf16 gradient": (fused_step_low(b), 40),
        "fused, fp32 anchor and Fisher": (fused_step(b, b.anchor32, b.fisher32), 46),
        "fused, then copied by torch": (fused_step_then_copy(b), 42),
    }
    if cuda:
        return runs | {
            "separate: our kernels + torch fused AdamW": (separate_kernels(b), 42),
            "torch.compile": (compiled_step(b), 42),
        }
    adam, copy = deepspeed_adam(b), lambda: b.out.copy_(b.param)
    lerp = lambda: b.ema.lerp_(b.param, 1 - DECAY)  # noqa: E731
    if page_bytes():
        runs[SMALL_PAGES] = (fused_step_small_pages(b), 42)
    return runs | {
        "torch twin": (forced("torch", fused_step(b, b.anchor, b.fisher)), 42),
        "DeepSpeedCPUAdam alone": (adam, 28),
        "usual: DeepSpeedCPUAdam + torch": (in_order(autograd_penalty(b), adam, usual_ema(b, b.param), copy), 46),
        "careful: in place, one scratch": (in_order(careful_penalty(b), adam, lerp, copy), 46),
    }


def adamw_runs(b: Buffers, cuda: bool) -> Runs:
    runs: Runs = {FUSED: (fused_adamw(b), 28), "torch AdamW(fused=True)": (torch_fused_adam(b), 28)}
    return runs if cuda else runs | {"DeepSpeedCPUAdam": (deepspeed_adam(b), 28)}


def ema_runs(b: Buffers, cuda: bool) -> Runs:
    """EMA of bf16 weights (here b.anchor) in fp32."""

    def careful() -> None:
        b.scratch.copy_(b.anchor)
        b.ema.lerp_(b.scratch, 1 - DECAY)

    return {
        FUSED: (lambda: ema_update_(b.ema, b.anchor, DECAY), 10),
        "torch twin": (forced("torch", lambda: ema_update_(b.ema, b.anchor, DECAY)), 10),
        "usual: mul_, add_": (usual_ema(b, b.anchor), 10),
        "usual: lerp_(param.float())": (lambda: b.ema.lerp_(b.anchor.float(), 1 - DECAY), 10),
        "careful: copy_ to scratch, lerp_": (careful, 10),
    }


def fisher_runs(b: Buffers, cuda: bool) -> Runs:
    return {
        FUSED: (lambda: fisher_accumulate_(b.exp_avg_sq, b.grad), 12),
        "roof: add_": (lambda: b.exp_avg_sq.add_(b.grad), 12),  # the same loads and stores, hardly any arithmetic
        "usual: += grad.pow(2)": (lambda: b.exp_avg_sq.add_(b.grad.pow(2)), 12),
        "careful: addcmul_": (lambda: b.exp_avg_sq.addcmul_(b.grad, b.grad), 12),
    }


def penalty_runs(b: Buffers, cuda: bool) -> Runs:
    return {
        FUSED: (lambda: fisher_penalty_(b.grad, b.param, b.anchor, b.fisher, STRENGTH), 16),
        "usual: autograd": (autograd_penalty(b), 20),
        "careful: in place, one scratch": (careful_penalty(b), 20),
    }


CASES = {
    "step": ("AdamW + EWC + EMA + bf16 copy (fp32 gradient, bf16 anchor and Fisher)", step_runs),
    "adamw": ("AdamW, fp32", adamw_runs),
    "ema": ("EMA of bf16 weights in fp32", ema_runs),
    "fisher": ("Fisher accumulation, fp32 gradient", fisher_runs),
    "penalty": ("Fisher penalty, gradient and loss (bf16 anchor and Fisher)", penalty_runs),
}


def exact(case: str, b: Buffers) -> dict[str, Tensor]:
    """Return the contents of the case's buffers after one call, in fp64."""
    p, g, m, v, e, a, f = (t.double() for t in (b.param, b.grad, b.exp_avg, b.exp_avg_sq, b.ema, b.anchor, b.fisher))
    pull = STRENGTH * f * (p - a)
    if case == "ema":
        return {"ema": DECAY * e + (1 - DECAY) * a}
    if case == "fisher":
        return {"exp_avg_sq": v + g * g}
    if case == "penalty":
        return {"grad": g + pull}
    beta1, beta2 = HYPER["betas"]
    g = g + pull if case == "step" else g
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    p = p * (1 - HYPER["lr"] * HYPER["weight_decay"])
    p = p - HYPER["lr"] * (m / (1 - beta1**STEP)) / ((v / (1 - beta2**STEP)).sqrt() + HYPER["eps"])
    found = {"param": p, "exp_avg": m, "exp_avg_sq": v}
    return found | ({"ema": DECAY * e + (1 - DECAY) * p} if case == "step" else {})


def error_of(case: str, name: str, device: torch.device) -> float | None:
    """Return the largest error of the written buffers after one call, relative to the exact distance of each."""
    if "alone" in name or "roof" in name or name == SMALL_PAGES:
        return None  # does less than the case, or the same in other memory
    b = Buffers.random(ERROR_NUMEL, device)
    start = {key: getattr(b, key).double() for key in ("param", "grad", "exp_avg", "exp_avg_sq", "ema")}
    if "bf16 gradient" in name:
        b.grad.copy_(b.grad.bfloat16())  # the exact result of this contender starts from the rounded gradient
    want = exact(case, b)
    CASES[case][1](b, device.type == "cuda")[name][0]()
    moved = {key: (want[key] - start[key]).norm() for key in want}
    return max(float((getattr(b, key).double() - want[key]).norm() / moved[key]) for key in want)


def measure(case: str, b: Buffers, device: torch.device, options: argparse.Namespace) -> dict:
    title, runs = CASES[case]
    contenders = [Contender(name, *pair) for name, pair in runs(b, device.type == "cuda").items()]
    for contender in contenders:
        contender.error = error_of(case, contender.name, device)
    copy = Contender("roof: copy", lambda: b.scratch.copy_(b.ema), 8)
    limits = {"rounds": options.repeats, "seconds": options.seconds, "slack": options.slack}
    kept = take_turns(contenders, copy, device, **limits)
    numel = b.param.numel()
    roof = copy.bytes * numel / copy.median
    rows = {c.name: c.row(numel, roof) for c in (*contenders, copy)}
    print_table(f"{title}: {numel:,} elements, {kept['kept']} of {kept['rounds']} rounds kept", rows)
    return {"title": title, "numel": numel, **kept, "rows": rows}


def ratios(results: dict, device: str) -> list[dict]:
    """Return the speed relative to each rival (for the copy: its bandwidth), and the bound that must hold."""
    found = []
    for case, contender, rival, bound in LIMITS[device]:
        rows = results.get(case, {}).get("rows", {})
        if rival in rows:
            ours = rows[contender]
            ratio = ours["of_copy"] if rival == "roof: copy" else rows[rival]["ms"] / ours["ms"]
            found.append(
                {
                    "case": case,
                    "contender": contender,
                    "rival": rival,
                    "ratio": round(ratio, 3),
                    "at_least": round(bound, 3),
                    "met": ratio >= bound,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--numel", type=lambda text: int(float(text)), help="default 48e6 on a CPU, 875e6 (7 B over 8 ranks) on a GPU"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contender")
    parser.add_argument("--repeats", type=int, default=15, help="undisturbed rounds wanted per case")
    parser.add_argument("--seconds", type=float, default=240.0, help="at most this long per case")
    parser.add_argument(
        "--slack",
        type=float,
        default=1.25,
        help="a round counts if the copies around it took at most this times the best",
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    os.environ["SAFECL_NUM_THREADS"] = str(options.threads)
    numel = options.numel or (48_000_000 if device.type == "cpu" else 875_000_000)
    buffers = Buffers.random(numel, device)
    facts = {"machine": machine(device), "threads": options.threads}
    if device.type == "cpu":
        facts |= {"instruction_set": native.missing() or native.instruction_set(), "huge_page_bytes": page_bytes()}
    out = options.out or ROOT / "benchmarks" / "results" / f"flat-{options.device}.json"
    results: dict[str, dict] = {}
    for case in options.cases:
        results[case] = measure(case, buffers, device, options)
        found = ratios(results, device.type)
        write_json(out, facts | {"ratios": found, "cases": results})  # after every case, so that an abort loses none
    for r in found:
        verdict = "met" if r["met"] else "NOT MET"
        print(f"{r['case']}, {r['contender']}: {r['ratio']:.2f}x {r['rival']} (wanted {r['at_least']:.2f}x): {verdict}")


if __name__ == "__main__":
    main()
