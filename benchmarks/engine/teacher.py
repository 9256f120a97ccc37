"""Memory and time of the streamed teacher, and the error of its outputs.

    python -m benchmarks.engine.teacher                 CPU: private memory of a process, for a model of 400 MB
    python -m benchmarks.engine.teacher --device cuda   GPU: device memory and seconds of a pass, for a 7B model in bf16

CPU: each arm runs in a separate process, because a process never forgets its peak. Private memory is that of anonymous
pages (RssAnon), sampled every millisecond; the pages of the reference store are shared and not counted. Bound: the two
largest layers, one slice of the head, and the activations, which are the memory of the same pass with the weights read
in place. Rival: the model in transformers, with all weights on the device. Error: that of the outputs against the
rival's.
GPU: rival and roof are the same pass with resident weights; both arms alternate in one process. Error: that of the
streamed outputs against the resident ones.
Writes benchmarks/results/teacher-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.harness import machine, write_json

RESULTS = ROOT / "benchmarks" / "results"
TOPK_EVERY, K = 4, 64
ARMS = ("streamed", "in place", "plain")


# ------------------------------------------------------------------------------------------------------------------ CPU


class PeakOfPrivateMemory:
    """The largest number of bytes in anonymous pages while the block runs, above that at its start."""

    def __enter__(self) -> PeakOfPrivateMemory:
        self.start = self.peak = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, private_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def above(self) -> int:
        return self.peak - self.start


def private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def model_on_disk(folder: Path, toy: bool) -> None:
    """Save a random Llama of about 400 MB in fp32, or a tiny one."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOY_VOCAB if toy else 32000,
        hidden_size=40 if toy else 640,
        intermediate_size=1728,
        num_hidden_layers=2 if toy else 14,
        num_attention_heads=10,
        num_key_value_heads=10,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


TOY_VOCAB = 1000


def cpu_batches(num: int = 4, rows: int = 4, length: int = 256, vocab: int = 32000):
    from safecl.engine.passes.step_rows import Question
    from safecl.engine.teachers.questions import TeacherBatch

    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(0, rows * length, TOPK_EVERY)
    return [
        TeacherBatch(
            torch.randint(3, vocab, (rows, length), generator=generator), torch.arange(length).expand(rows, -1),
            [(Question("topk", k=K), positions)],
        )
        for _ in range(num)
    ]  # fmt: skip


def cpu_arm(arm: str, folder: str, toy: bool) -> dict:
    """Return the peak of one arm, and the start of its outputs for comparison."""
    batches = cpu_batches(1, 1, 64, TOY_VOCAB) if toy else cpu_batches()
    if arm == "plain":
        return _plain_arm(folder, batches)
    from safecl.engine.model.structure import empty_model
    from safecl.engine.reference.store import ReferenceStore
    from safecl.engine.teachers.streamed import StreamedTeacher
    from safecl.engine.teachers.weight_stream import unit_bytes

    empty = empty_model(folder, torch.float32)
    with ReferenceStore.open(folder, dtype=torch.float32, model=empty) as store:
        with PeakOfPrivateMemory() as memory:
            teacher = StreamedTeacher(empty, store, torch.device("cpu"), arm)
            said = teacher.answer(batches)
        sizes = sorted(map(unit_bytes, teacher.stream.units[: len(teacher.layers)]))
        slice_bytes = max(map(unit_bytes, teacher.stream.units[len(teacher.layers) :]))
        found = dict(layers_bytes=sum(sizes[-2:]), slice_bytes=slice_bytes, store_bytes=store.nbytes, where=store.where)
        return found | dict(peak_bytes=memory.above, log_probs=said[0][0].log_probs[:8, :4].tolist())


@torch.no_grad()
def _plain_arm(folder: str, batches) -> dict:
    import transformers

    from safecl.kernels import linear_topk

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with PeakOfPrivateMemory() as memory:
        said = []
        for batch in batches:
            inputs = dict(
                input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False
            )
            hidden = model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
            said.append(linear_topk(hidden[batch.asked[0][1]], model.lm_head.weight, K))
    # The private part of the loaded weights depends on how the file was read; a teacher on a device holds them all.
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return dict(peak_bytes=weights + memory.above, weights_bytes=weights, log_probs=said[0].log_probs[:8, :4].tolist())


def measure_cpu(toy: bool) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        model_on_disk(Path(folder), toy)
        arms = {}
        for arm in ARMS:
            command = [sys.executable, "-m", __spec__.name, "--arm", arm, "--folder", folder, *["--toy"] * toy]
            arms[arm] = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
    outputs = {arm: torch.tensor(found.pop("log_probs"), dtype=torch.float64) for arm, found in arms.items()}
    streamed = arms["streamed"]
    bound = streamed["layers_bytes"] + streamed["slice_bytes"] + arms["in place"]["peak_bytes"]
    errors = {arm: float((said - outputs["plain"]).norm() / outputs["plain"].norm()) for arm, said in outputs.items()}
    tokens = sum(batch.input_ids.numel() for batch in cpu_batches())
    return dict(
        tokens=tokens,
        arms=arms,
        bound_bytes=bound,
        peak_of_bound=round(streamed["peak_bytes"] / bound, 3),
        error_to_plain=errors,
    )


def show_cpu(found: dict) -> None:
    print(f"{found['tokens']:,} tokens, top-{K} of every {TOPK_EVERY}th; private memory above the start, MB")
    for arm, values in found["arms"].items():
        error = found["error_to_plain"][arm]
        print(f"{arm:10s} {values['peak_bytes'] / 1e6:8.1f} MB   error to plain {error:.1e}")
    print(f"bound      {found['bound_bytes'] / 1e6:8.1f} MB   streamed / bound {found['peak_of_bound']:.3f}")


# ------------------------------------------------------------------------------------------------------------------ GPU


class PinnedWeights:
    """Weights of a model in pinned host memory, filled with copies of one block of normal random numbers."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        block = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).to(dtype)
        self.weights = {name: self._filled(p.shape, block) for name, p in model.named_parameters()}

    @staticmethod
    def _filled(shape: torch.Size, block: torch.Tensor) -> torch.Tensor:
        from safecl.kernels import page_locked

        flat = page_locked.empty((shape.numel(),), block.dtype)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])
        return flat.view(shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self.weights[name]


def measure_gpu(tokens: list[int], layers: int, repeats: int) -> dict:
    """Measure alternating passes with streamed and with resident weights: seconds and device memory."""
    import transformers

    from safecl.engine.model.structure import parameters_on_meta
    from safecl.engine.teachers.break_even import measure
    from safecl.engine.teachers.streamed import StreamedTeacher

    device = torch.device("cuda", 0)
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip

    def empty():
        with parameters_on_meta():
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    weights = PinnedWeights(empty(), torch.bfloat16)
    rates = measure(device, torch.bfloat16)
    teachers, held = {}, {}
    for arm in ("streamed", "resident"):
        before = torch.cuda.memory_allocated(device)
        teachers[arm] = StreamedTeacher(empty(), weights, device, arm)
        held[arm] = torch.cuda.memory_allocated(device) - before
    rows = [dict(tokens=count, **_in_turns(teachers, count, repeats, device)) for count in tokens]
    return dict(
        layers=layers,
        weights_bytes=sum(w.numel() * w.element_size() for w in weights.weights.values()),
        held_bytes=held,
        break_even_tokens=rates.break_even(2),
        rates=rates.what,
        passes=rows,
    )


def _in_turns(teachers: dict, tokens: int, repeats: int, device: torch.device) -> dict:
    from safecl.engine.passes.step_rows import Question
    from safecl.engine.teachers.questions import TeacherBatch

    length, per_batch = 2048, 8192
    batches = [
        TeacherBatch(
            torch.randint(3, 32000, (min(per_batch, tokens - start) // length, length)),
            torch.arange(length).expand(min(per_batch, tokens - start) // length, -1),
            [(Question("topk", k=K), torch.arange(0, min(per_batch, tokens - start), TOPK_EVERY))],
        )
        for start in range(0, tokens, per_batch)
    ]
    seconds, peaks, said = {arm: [] for arm in teachers}, {}, {}
    for turn in range(repeats + 1):
        for arm, teacher in teachers.items():
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            start, began = torch.cuda.memory_allocated(device), time.perf_counter()
            said[arm] = teacher.answer(batches)[0][0].log_probs.float()
            torch.cuda.synchronize(device)
            if turn:
                seconds[arm].append(time.perf_counter() - began)
            peaks[arm] = torch.cuda.max_memory_allocated(device) - start
    medians = {arm: sorted(found)[len(found) // 2] for arm, found in seconds.items()}
    error = float((said["streamed"] - said["resident"]).norm() / said["resident"].norm())
    return dict(
        ms={arm: round(1e3 * value, 2) for arm, value in medians.items()},
        streamed_over_resident=round(medians["streamed"] / medians["resident"], 4),
        activations_bytes=peaks,
        error=error,
    )


def show_gpu(found: dict) -> None:
    print(f"{found['weights_bytes'] / 1e9:.1f} GB of weights, on the device {found['held_bytes']}")
    print(f"break-even {found['break_even_tokens']:,} tokens ({found['rates']})")
    for row in found["passes"]:
        ratio = f"streamed / resident {row['streamed_over_resident']:.3f}"
        print(f"{row['tokens']:8,} tokens   {row['ms']} ms   {ratio}   error {row['error']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536], help="of a pass (GPU)"
    )
    parser.add_argument("--layers", type=int, default=32, help="of the 7B model (GPU)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--toy", action="store_true", help="so small that only the code is tried (CPU)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm is not None:
        print(json.dumps(cpu_arm(given.arm, given.folder, given.toy)))
        return
    if given.device == "cuda":
        found = measure_gpu(given.tokens, given.layers, given.repeats)
        show_gpu(found)
    else:
        found = measure_cpu(given.toy)
        show_cpu(found)
    write_json(given.out or RESULTS / f"teacher-{given.device}.json", machine(torch.device(given.device)) | found)


if __name__ == "__main__":
    main()
