"""Time and peak memory of the fused distillation head, forward and backward.

    python -m benchmarks.kernels.head                    CPU, fp32: H 1024, V 32000, 4096 tokens
    python -m benchmarks.kernels.head --device cuda      GPU, bf16: four model shapes, 1024 to 16384 tokens

Roof: the matrix products alone. Rivals: the naive torch loss; on a GPU also TRL and Liger (pip install
-e ".[bench]"), which are skipped if they cannot be imported or run out of memory. Error: that of the hidden states'
gradient on 256 tokens, relative to fp64. TFLOP/s count 8 M H V with an online teacher and 6 without, for every
contender. Peak memory is on top of inputs and returned gradients. The contenders alternate in one process
(harness.take_turns). Writes benchmarks/results/head-<device>.json, on a GPU after every objective.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import ROOT
from benchmarks.harness import Contender, machine, take_turns, write_json
from safecl.kernels import DenseTeacher, TopKTeacher, linear_distill_loss, linear_topk

SHAPES = {
    "llama-2-7b": (4096, 32000),
    "llama-3-8b": (4096, 128256),
    "qwen-2.5-7b": (3584, 152064),
    "gemma-2-2b": (2304, 256000),
}
K = 64
PEAK_LIMIT = 1 / 8  # of the naive loss, on a CPU
ERROR_TOKENS = 256
DRIFT = 0.02  # of the teacher's hidden states: a student near its teacher

# (objective, contender, rival, the contender's speed must be at least this many times the rival's)
CPU_LIMITS = [("KL + CE", "safecl", "naive torch", 1.0)]
GPU_LIMITS = [
    ("KL + CE", "safecl", "bare products", 1 / 1.2),
    ("KL", "safecl", "trl", 1.4),
    ("KL", "safecl", "liger fused linear JSD", 2.0),
    ("KL + CE", "safecl", "liger chunked JSD with CE", 2.0),
    ("top-k + CE", "safecl", "bare products", 1 / 1.2),
    ("KL + CE", "safecl", "naive torch", 1 / 1.1),
]


@dataclass
class Problem:
    """One shape: student and teacher hidden states [M, H], heads [V, H], labels [M]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    stored: TopKTeacher | None = None

    @staticmethod
    def random(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
        g = torch.Generator(device).manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
        hidden = normal(tokens, width)
        weight = normal(vocab, width).mul_(4 / width**0.5).to(dtype)  # logits of standard deviation 4
        teacher = (hidden + DRIFT * normal(tokens, width)).to(dtype)
        labels = torch.randint(0, vocab, (tokens,), generator=g, device=device)
        return Problem(
            hidden.to(dtype).requires_grad_(), weight.requires_grad_(), teacher, weight.detach().clone(), labels
        )

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    def flop(self, products: int) -> float:
        return float(products) * self.tokens * self.weight.numel()

    def dense(self) -> DenseTeacher:
        return DenseTeacher(self.teacher_hidden, self.teacher_weight)

    def top_k(self) -> TopKTeacher:
        if self.stored is None:
            self.stored = linear_topk(self.teacher_hidden, self.teacher_weight, K)
        return self.stored

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


Loss = Callable[[Problem], Tensor]


def ours(teacher: str | None, ce: bool, **options) -> Loss:
    def loss(p: Problem) -> Tensor:
        found = {"dense": p.dense, "topk": p.top_k, None: lambda: None}[teacher]()
        labels = p.labels if ce else None
        return linear_distill_loss(
            p.hidden,
            p.weight,
            labels=labels,
            ce_weights=1 / p.tokens,
            teacher=found,
            kd_weights=1 / p.tokens,
            **options,
        ).loss

    return loss


def naive(kd: str, ce: bool) -> Loss:
    """The loss with [tokens, vocab] in memory and log_softmax in fp32."""

    def loss(p: Problem) -> Tensor:
        z = F.linear(p.hidden, p.weight)
        total = F.cross_entropy(z.float(), p.labels) if ce else z.new_zeros(())
        with torch.no_grad():
            log_q = torch.log_softmax(F.linear(p.teacher_hidden, p.teacher_weight).float(), -1)
        log_p = torch.log_softmax(z.float(), -1)
        if kd == "kl":
            return total + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
        log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        halves = [F.kl_div(log_m, side, log_target=True, reduction="batchmean") for side in (log_p, log_q)]
        return total + 0.5 * (halves[0] + halves[1])

    return loss


def bare_products(p: Problem, products: int) -> Callable[[], object]:
    """The matrix products alone, over all tokens at once: 8 = student, teacher, dX, dW; 6 = without the teacher."""
    dlogits = torch.empty(p.tokens, p.weight.shape[0], dtype=p.weight.dtype, device=p.weight.device).normal_()

    def run() -> None:
        with torch.no_grad():
            torch.mm(p.hidden, p.weight.t())
            if products == 8:
                torch.mm(p.teacher_hidden, p.teacher_weight.t())
            torch.mm(dlogits, p.weight)
            torch.mm(dlogits.t(), p.hidden)

    return run


def trl_divergence(beta: float) -> Loss:
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    return lambda p: function.apply(p.hidden, p.weight, None, p.teacher_hidden, p.teacher_weight, None, beta)[0].mean()


def liger_fused_jsd(beta: float) -> Loss:
    module = importlib.import_module("liger_kernel.transformers").LigerFusedLinearJSD(
        jsd_beta=beta, accum_dtype=torch.float32
    )
    return lambda p: module(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, None)


def liger_chunked_jsd(beta: float, ce: bool) -> Loss:
    module = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5 if ce else 0.0, weight_soft_loss=0.5 if ce else 1.0, beta=beta
    )
    scale = 2.0 if ce else 1.0
    return lambda p: scale * module(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.labels)


# objective -> (products of the algorithm, contenders by name); each is made on first use, because rivals may be missing
OBJECTIVES: dict[str, tuple[int, dict[str, Callable[[], Loss]]]] = {
    "KL + CE": (
        8,
        {
            "safecl": lambda: ours("dense", True),
            "naive torch": lambda: naive("kl", True),
            "liger chunked JSD with CE": lambda: liger_chunked_jsd(0.0, True),
        },
    ),
    "KL": (
        8,
        {
            "safecl": lambda: ours("dense", False),
            "naive torch": lambda: naive("kl", False),
            "trl": lambda: trl_divergence(0.0),
            "liger fused linear JSD": lambda: liger_fused_jsd(0.0),
        },
    ),
    "JSD": (
        8,
        {
            "safecl": lambda: ours("dense", False, divergence="jsd"),
            "naive torch": lambda: naive("jsd", False),
            "trl": lambda: trl_divergence(0.5),
            "liger fused linear JSD": lambda: liger_fused_jsd(0.5),
        },
    ),
    "top-k + CE": (6, {"safecl": lambda: ours("topk", True)}),
    "DER on the top-k": (6, {"safecl": lambda: ours("topk", False, divergence="mse")}),
}


def contenders(objective: str, p: Problem) -> tuple[list[Contender], dict[str, str]]:
    """Return (contenders, the reasons why others are skipped)."""
    products, makers = OBJECTIVES[objective]
    found, skipped = [Contender("bare products", bare_products(p, products), 0)], {}
    for name, make in makers.items():
        try:
            loss = make()
        except Exception as error:
            skipped[name] = f"cannot be imported: {error}"
            print(f"skipped: {name} {skipped[name]}")
            continue
        try:
            found.append(Contender(name, _step(loss, p), 0, hidden_error(objective, loss, p)))
        except torch.OutOfMemoryError:
            skipped[name] = "out of memory"
            print(f"skipped: {name} is out of memory")
            p.forget_gradients()
            torch.cuda.empty_cache()
    return found, skipped


def _step(loss: Loss, p: Problem) -> Callable[[], object]:
    def run() -> None:
        p.forget_gradients()
        loss(p).backward()

    return run


def hidden_error(objective: str, loss: Loss, p: Problem) -> float | None:
    """Return the error of the first tokens' dX, which does not depend on other tokens; None without an fp64 oracle."""
    if objective not in ("KL + CE", "KL", "JSD"):
        return None
    few = slice(0, ERROR_TOKENS)
    if p.hidden.device.type == "cpu":  # the whole problem takes long on a CPU
        p = replace(
            p,
            hidden=p.hidden.detach()[few].requires_grad_(),
            teacher_hidden=p.teacher_hidden[few],
            labels=p.labels[few],
            stored=None,
        )
    p.forget_gradients()
    loss(p).backward()
    got = p.hidden.grad[few].double()
    exact = Problem(
        p.hidden.detach()[few].double().requires_grad_(),
        p.weight.detach().double(),
        p.teacher_hidden[few].double(),
        p.teacher_weight.double(),
        p.labels[few],
    )
    _exact_loss(objective, exact).backward()
    want = exact.hidden.grad * (exact.tokens / p.tokens)
    p.forget_gradients()
    return float((got - want).norm() / want.norm())


def _exact_loss(objective: str, p: Problem) -> Tensor:
    z, y = p.hidden @ p.weight.T, p.teacher_hidden @ p.teacher_weight.T
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    if objective == "JSD":
        m = 0.5 * (log_p.exp() + log_q.exp())
        return 0.5 * ((log_p.exp() * (log_p - m.log())).sum() + (log_q.exp() * (log_q - m.log())).sum()) / p.tokens
    total = F.cross_entropy(z, p.labels) if "CE" in objective else 0.0
    return total + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def measure(objective: str, p: Problem, device: torch.device, options) -> dict:
    """Measure times, TFLOP/s, peaks and errors of one objective on one shape."""
    found, skipped = contenders(objective, p)
    block = torch.empty(2**26, dtype=torch.uint8, device=device)
    probe = Contender("copy", lambda: block.clone(), 0)
    turns = take_turns(found, probe, device, rounds=options.repeats, seconds=options.seconds, slack=options.slack)
    roof = found[0].median
    rows = {}
    for contender in found:
        rows[contender.name] = {
            "ms": round(1e3 * contender.median, 3),
            "ms_all": [round(1e3 * t, 3) for t in contender.seconds],
            "tflop_per_s": round(p.flop(OBJECTIVES[objective][0]) / contender.median / 1e12, 4),
            "of_bare_products": round(contender.median / roof, 3),
            "error": contender.error,
        }
        if device.type == "cuda" and contender is not found[0]:
            rows[contender.name]["peak_mb"] = cuda_peak(contender.run, p)
    return {"rows": rows, "skipped": skipped, "turns": turns}


def cuda_peak(run: Callable[[], object], p: Problem) -> float:
    """Return the peak in MB on top of inputs and returned gradients."""
    p.forget_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    kept = sum(t.grad.numel() * t.grad.element_size() for t in (p.hidden, p.weight))
    return round((torch.cuda.max_memory_allocated() - before - kept) / 2**20, 1)


def cpu_peak(objective: str, name: str, shape: tuple[int, int, int]) -> float:
    """Return the peak of resident MB on top of inputs and returned gradients, measured in a separate process."""
    command = [sys.executable, "-m", __spec__.name, "--peak", json.dumps([objective, name, *shape])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def _peak_of(objective: str, name: str, tokens: int, width: int, vocab: int) -> float:
    loss = OBJECTIVES[objective][1][name]()
    _step(loss, Problem.random(8, 64, 128, torch.float32, torch.device("cpu")))()  # loads code
    p = Problem.random(tokens, width, vocab, torch.float32, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    _step(loss, p)()
    kept = sum(t.grad.numel() * 4 for t in (p.hidden, p.weight))
    return (_status("VmHWM") - before - kept) / 2**20


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def limits(results: dict, table: list[tuple]) -> list[dict]:
    found = []
    for objective, name, rival, bound in table:
        rows = results.get(objective, {}).get("rows", {})
        if name in rows and rival in rows:
            ratio = rows[rival]["ms"] / rows[name]["ms"]
            found.append(
                {
                    "objective": objective,
                    "rival": rival,
                    "ratio": round(ratio, 3),
                    "at_least": round(bound, 3),
                    "met": ratio >= bound,
                }
            )
            verdict = "met" if ratio >= bound else "NOT MET"
            print(f"{objective}: {ratio:.2f}x the speed of {rival} (wanted {bound:.2f}x): {verdict}")
    return found


def on_cpu(options) -> dict:
    tokens, width, vocab = options.tokens[0] if options.tokens else 4096, 1024, 32000
    if options.toy:
        tokens, width, vocab = 64, 32, 1000
    p = Problem.random(tokens, width, vocab, torch.float32, torch.device("cpu"))
    results = {}
    for objective in options.objectives or ["KL + CE"]:
        results[objective] = measure(objective, p, torch.device("cpu"), options)
        for name, row in results[objective]["rows"].items():
            if name != "bare products" and not options.toy:
                row["peak_mb"] = round(cpu_peak(objective, name, (tokens, width, vocab)), 1)
        show(f"{objective}, {tokens} tokens, H {width}, V {vocab}, fp32", results[objective])
    peaks = {
        name: row["peak_mb"] for name, row in results.get("KL + CE", {}).get("rows", {}).items() if "peak_mb" in row
    }
    report = {"shape": [tokens, width, vocab], "objectives": results, "limits": limits(results, CPU_LIMITS)}
    if len(peaks) > 1:
        report["peak_ratio"] = round(peaks["safecl"] / peaks["naive torch"], 4)
        verdict = "met" if report["peak_ratio"] <= PEAK_LIMIT else "NOT MET"
        print(f"peak memory: {report['peak_ratio']:.3f} of naive torch (wanted {PEAK_LIMIT}): {verdict}")
    return report


def on_gpu(options, write: Callable[[dict], None]) -> dict:
    """Measure shapes and numbers of tokens. write: called with what is known after every objective, so that an abort
    loses none."""
    device, report = torch.device("cuda"), {}
    for shape in options.shapes or SHAPES:
        width, vocab = SHAPES[shape]
        for tokens in options.tokens or (1024, 4096, 8192, 16384):
            p = Problem.random(tokens, width, vocab, torch.bfloat16, device)
            results = {}
            for objective in options.objectives or OBJECTIVES:
                results[objective] = measure(objective, p, device, options)
                show(f"{shape}: {objective}, {tokens} tokens, H {width}, V {vocab}, bf16", results[objective])
                write(report | {f"{shape}/{tokens}": {"objectives": results}})
            report[f"{shape}/{tokens}"] = {"objectives": results, "limits": limits(results, GPU_LIMITS)}
            del p
            torch.cuda.empty_cache()
    return report


def show(title: str, result: dict) -> None:
    print(f"\n{title}\n{'':28s} {'ms':>10s} {'TFLOP/s':>9s} {'x products':>10s} {'peak MB':>9s} {'error':>9s}")
    for name, row in result["rows"].items():
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        peak = row.get("peak_mb", "")
        rates = f"{row['ms']:10.2f} {row['tflop_per_s']:9.3f} {row['of_bare_products']:10.2f}"
        print(f"{name:28s} {rates} {peak:>9} {error:>9s}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contender")
    parser.add_argument("--repeats", type=int, default=7, help="undisturbed rounds wanted per case")
    parser.add_argument("--seconds", type=float, default=300.0, help="at most this long per case")
    parser.add_argument(
        "--slack",
        type=float,
        default=1.25,
        help="a round counts if the copies around it took at most this times the best",
    )
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), help="GPU only")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--objectives", nargs="*", choices=list(OBJECTIVES))
    parser.add_argument("--toy", action="store_true", help="so small that only the code is tried (CPU)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(_peak_of(*json.loads(options.peak)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("skipped: no CUDA device here, the GPU sections need one")
    facts = {"machine": machine(torch.device(options.device)), "threads": options.threads}
    out = options.out or ROOT / "benchmarks" / "results" / f"head-{options.device}.json"

    def write(measured: dict) -> None:
        write_json(out, facts | measured)

    write(on_cpu(options) if options.device == "cpu" else on_gpu(options, write))


if __name__ == "__main__":
    main()
