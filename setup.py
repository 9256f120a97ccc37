"""Build the C++ kernels (`csrc/`) into safecl/kernels/libsafecl.so. All other settings are in pyproject.toml.

The library needs only g++, neither torch nor Python headers; CXX names another compiler. Without a compiler the install
succeeds, and the torch twins are used.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES = ("flat.cpp", "ties.cpp", "instruction_set.cpp", "parallel.cpp", "thread_pool.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ldl", "-fvisibility=hidden", "-Wl,--exclude-libs,ALL")
# Without fused multiply-adds every instruction set gives the same bits.
FLAGS += ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# Torch may have loaded an older libstdc++, which must not serve our library. Not all systems have the archives.
STATIC = ("-static-libstdc++", "-static-libgcc")


def source_hash() -> str:
    """Return the hash of the sources by the loader's function, taken from its file because the package needs torch."""
    spec = importlib.util.spec_from_file_location("native", ROOT / "safecl" / "kernels" / "native.py")
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native.source_hash(CSRC)


def compile_library(target: Path, flags: tuple[str, ...] = FLAGS) -> str:
    """Compile to `target`; return the reason of a failure, or ""."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler} is not on the PATH)"
    target.parent.mkdir(parents=True, exist_ok=True)
    # The new file is renamed into place, so that a running process keeps the file that it has mapped.
    fresh = target.with_suffix(f".{os.getpid()}.tmp")
    inputs = [f'-DSAFECL_SOURCE_HASH="{source_hash()}"', *(str(CSRC / s) for s in SOURCES), "-o", str(fresh)]
    for extra in (STATIC, ()):
        done = subprocess.run([compiler, *inputs, *flags, *extra], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            fresh.replace(target)
            return ""
    return f"{compiler} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}"


class BuildLibrary(build_ext):
    """Compiles the one library with one compiler call; a failure prints one line and never aborts the install."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], "libsafecl.so")

    def build_extension(self, ext: Extension) -> None:
        failure = compile_library(Path(self.get_ext_fullpath(ext.name)))
        if failure:
            print(f"safecl: C++ kernels not built: {failure}; CPU tensors will use the slower torch kernels.")


class PlatformWheel(bdist_wheel):
    """A wheel whose name has the platform only, because the library serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("safecl.kernels.libsafecl", sources=[f"csrc/{s}" for s in SOURCES], optional=True)],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    )
