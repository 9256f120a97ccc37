"""A slow link between two hosts: a tunnel whose packets arrive late. (The kernel's own tool for that, netem, is often
missing.)

    with slow_link(20.0, ("namespace-a", "10.78.0.1"), ("namespace-b", "10.78.0.2")):
        ...

Each end is a process in the namespace of its host (`python slow_link.py MILLISECONDS ADDRESS PIPE`), which owns the
interface `slow0`.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

INTERFACE = "slow0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MOST_BYTES = 65536


@contextlib.contextmanager
def slow_link(milliseconds: float, *ends: tuple[str, str]) -> Iterator[None]:
    """Join two hosts, given as (namespace, address), by a link that takes so long in each direction."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    processes = []
    for (namespace, address), pipe in zip(ends, (one, other), strict=True):
        end = [sys.executable, __file__, str(milliseconds), address, str(pipe.fileno())]
        inside = ["ip", "netns", "exec", namespace, *end]
        processes.append(subprocess.Popen(inside, pass_fds=[pipe.fileno()]))
        pipe.close()
    try:
        for namespace, _ in ends:
            _wait_for_the_interface(namespace)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_for_the_interface(namespace: str, seconds: float = 120.0) -> None:
    shown, deadline = ["ip", "-n", namespace, "-br", "link", "show", INTERFACE, "up"], time.monotonic() + seconds
    while not subprocess.run(shown, capture_output=True, text=True, check=False).stdout:
        if time.monotonic() > deadline:
            raise OSError(f"no interface {INTERFACE} in {namespace} within {seconds:.0f} s")
        time.sleep(0.1)


def open_tunnel(address: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI))
    subprocess.run(["ip", "addr", "add", f"{address}/24", "dev", INTERFACE], check=True)
    subprocess.run(["ip", "link", "set", INTERFACE, "mtu", "9000", "up"], check=True)
    return handle


def pump(tunnel: int, pipe: socket.socket, seconds: float) -> None:
    """Send what enters the tunnel to the other end, when its time has come; and let out what arrives from there, until
    either is closed.

    Nothing here may wait for the other end to read: it may be waiting for this one.
    """
    pipe.setblocking(False)
    late: collections.deque[tuple[float, bytes]] = collections.deque()
    with contextlib.suppress(ConnectionError):
        while True:
            wait = max(0.0, late[0][0] - time.monotonic()) if late else None
            full = [pipe] if wait == 0.0 else []
            ready, free, _ = select.select([tunnel, pipe], full, [], None if full else wait)
            if tunnel in ready:
                if not (packet := os.read(tunnel, _MOST_BYTES)):
                    return
                late.append((time.monotonic() + seconds, packet))
            if pipe in ready:
                if not (packet := pipe.recv(_MOST_BYTES)):
                    return
                os.write(tunnel, packet)
            if free:
                with contextlib.suppress(BlockingIOError):
                    pipe.send(late[0][1])
                    late.popleft()


if __name__ == "__main__":
    delay, address, handle = sys.argv[1:]
    pump(open_tunnel(address), socket.socket(fileno=int(handle)), float(delay) / 1e3)
