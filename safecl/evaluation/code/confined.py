"""Runs one program in this process, which can do nothing but compute:

    python -I -S -B confined.py FD MIB SECONDS BYTES

The program comes on the standard input, behind a line with a token. What became of it goes to the file descriptor FD,
as one line of JSON: the token where it ran to its end, else the name of the error.

    memory, CPU time, size of files, open files    resource limits (setrlimit)
    everything else                                 a seccomp filter that allows the calls that Python needs to compute
                                                    and to read files. All others fail: sockets, new processes and
                                                    programs, signals to others, opening for writing, and every change
                                                    of files and folders

A seccomp filter needs no rights, is kept for good, and holds for threads too. Only the standard library is imported
here, because the process starts alone. Linux on x86-64 and aarch64; elsewhere the process ends before it runs anything.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

# Call numbers of (x86-64, aarch64), from the kernel's asm/unistd.h; None where the architecture has no such call.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "ppoll": (271, 73), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "getcwd": (79, 17),
    "readlink": (89, None), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "sigaltstack": (131, 132), "arch_prctl": (158, None), "gettid": (186, 178),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "set_robust_list": (273, 99),
    "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "faccessat2": (439, 439),
}  # fmt: skip
OPEN, OPENAT, CLONE, CLONE3, PRLIMIT, IOCTL, TGKILL = (
    (2, None), (257, 56), (56, 220), (435, 435), (302, 261), (16, 29), (234, 131),
)  # fmt: skip
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Place in the pairs above, and the number by which the kernel names the architecture (AUDIT_ARCH)."""

WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE."""
CLONE_THREAD = 0x10000
HARMLESS_IOCTLS = (0x5401, 0x5451)
"""TCGETS and FIOCLEX, which Python calls when it opens a file."""
EPERM, EACCES, ENOTTY, ENOSYS = 1, 13, 25, 38

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE = 0, 4
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]
"""Code, steps to jump over where true and where false, value."""


def argument(place: int) -> int:
    """Return the offset of the lower half of a call's argument, on a little-endian machine."""
    return 16 + 8 * place


def returning(value: int) -> Instruction:
    return (RETURN, 0, 0, value)


def on_call(number: "int | None", *then: Instruction) -> "list[Instruction]":
    """Return instructions that run `then`, which ends with a return, for the call of this number."""
    return [] if number is None else [(EQUAL, 0, len(then), number), *then]


def filter_of(machine: str, pid: int) -> "list[Instruction]":
    """Return the filter's program for an architecture and this process."""
    place, architecture = ARCHITECTURES[machine]
    program: list[Instruction] = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), returning(KILL)]
    program.append((LOAD, 0, 0, NUMBER))
    for numbers in ALLOWED.values():
        program += on_call(numbers[place], returning(ALLOW))
    for numbers, flags in ((OPEN, 1), (OPENAT, 2)):
        refused_or_not = (ANY_BIT, 0, 1, WRITING), returning(FAIL | EACCES), returning(ALLOW)
        program += on_call(numbers[place], (LOAD, 0, 0, argument(flags)), *refused_or_not)
    is_thread = (ANY_BIT, 0, 1, CLONE_THREAD), returning(ALLOW), returning(FAIL | EPERM)
    program += on_call(CLONE[place], (LOAD, 0, 0, argument(0)), *is_thread)
    program += on_call(CLONE3[place], returning(FAIL | ENOSYS))  # its flags cannot be seen; the C library takes clone
    reads_only = (EQUAL, 0, 3, 0), (LOAD, 0, 0, argument(2) + 4), (EQUAL, 0, 1, 0), returning(ALLOW)
    program += on_call(PRLIMIT[place], (LOAD, 0, 0, argument(2)), *reads_only, returning(FAIL | EPERM))
    first, second = HARMLESS_IOCTLS
    harmless = (EQUAL, 1, 0, first), (EQUAL, 0, 1, second), returning(ALLOW), returning(FAIL | ENOTTY)
    program += on_call(IOCTL[place], (LOAD, 0, 0, argument(1)), *harmless)
    of_this_process = (EQUAL, 0, 1, pid), returning(ALLOW), returning(FAIL | EPERM)
    program += on_call(TGKILL[place], (LOAD, 0, 0, argument(0)), *of_this_process)
    return [*program, returning(FAIL | EPERM)]


def set_limits(mib: int, seconds: int, file_bytes: int) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, mib * 2**20),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        # a second more of CPU time lets the kernel say by SIGXCPU that the first limit was reached
        resource.setrlimit(kind, (most, most + 1 if kind == resource.RLIMIT_CPU else most))


def confine() -> None:
    """Install the filter. Raises OSError where the kernel does not take it."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES or sys.byteorder != "little":
        raise OSError(f"no filter of calls for {sys.platform} on {machine}")
    program = filter_of(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0),
    ):
        if library.prctl(arguments[0], *map(ctypes.c_ulong, arguments[1:])) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def main(result: int, mib: int, seconds: int, file_bytes: int) -> None:
    token, _, program = sys.stdin.read().partition("\n")
    try:
        set_limits(mib, seconds, file_bytes)
        confine()
    except (OSError, ValueError) as error:
        os.write(result, json.dumps({"refused": str(error)}).encode())
        return
    try:
        exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
        said = {"done": token}
    except BaseException as error:  # also SystemExit: a program that ends itself has not run to its end
        said = {"error": type(error).__name__}
    os.write(result, json.dumps(said).encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
    os._exit(0)  # threads of the program are not waited for
