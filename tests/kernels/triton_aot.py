"""Ahead-of-time compilation of Triton kernels for absent GPUs, with the resources that the assembler reports."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """The resources and the code of a compiled kernel.

    registers: per thread. stack, local: bytes per thread, which are 0 exactly when nothing is spilled. memory_accesses:
    loads, stores and barriers in the order of the machine code, e.g. "LDG.E.128", "BAR.SYNC".
    """

    registers: int
    stack: int
    local: int
    ptx: str
    memory_accesses: tuple[str, ...]


def compile_kernel(
    kernel, arguments: dict[str, object], arch: int, multiples_of_16: tuple[str, ...] = (), **options
) -> Compiled:
    """Compile `kernel` for sm_<arch>.

    arguments: a type such as "*fp32" for each run-time argument; any other value is a constexpr. Pointers are declared
    16-byte aligned, as the launcher finds them for torch's allocations; so are the integers in `multiples_of_16`.
    """
    names = [p.name for p in kernel.params]
    runtime = {n: a for n, a in arguments.items() if isinstance(a, str)}
    signature = {n: runtime.get(n, "constexpr") for n in names}
    constexprs = {(i,): arguments[n] for i, n in enumerate(names) if n not in runtime}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in multiples_of_16
    }
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    accesses = tuple(re.findall(r"\b((?:LDG|STG|BAR)\.[A-Z0-9_.]+)", code))
    return Compiled(numbers["REG"], numbers["STACK"], numbers["LOCAL"], built.asm["ptx"], accesses)
