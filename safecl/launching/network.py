"""The network of this machine, as the ranks will use it. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import struct
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from safecl.config import ConfigError

LOCALHOST = "127.0.0.1"
_SIOCGIFADDR = 0x8915
_LISTENS = "0A"
"""The state of a socket that listens, in /proc/net/tcp."""


@dataclass(frozen=True)
class Address:
    """The address of this node that other nodes reach, and its interface; None where no interface has it."""

    ip: str
    interface: str | None


def split_endpoint(endpoint: str, port: int) -> tuple[str, int]:
    """Return (host, port) of `host:port` or `host`."""
    host, _, given = endpoint.partition(":")
    return host, int(given or port)


def resolve(host: str, key: str = "launch.rendezvous") -> str:
    """Return the IPv4 address of a host. Raises ConfigError for a name that this machine does not know."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"{key}: {host}: {socket.gethostname()} cannot resolve this name ({error.strerror or error}); "
            "give the address of the first node instead, as `ip -4 addr` shows it there"
        ) from None


def is_own(ip: str) -> bool:
    """True where this machine has the address: only an own address can be bound."""
    with socket.socket() as probe:
        try:
            probe.bind((ip, 0))
        except OSError:
            return False
    return True


def refuse_taken_port(port: int, key: str, partner: str | None = None) -> None:
    """Raise ConfigError where a process of this machine listens on a port that the ranks meet at: they would wait for
    an answer from it. partner: a word of the command line of a process that may."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"{key}: port {port} cannot be used: {error.strerror}") from None
    holder = _listener(port)
    if holder is not None and partner in holder[1]:
        return
    who = f"process {holder[0]} ({shlex.join(holder[1])[:80]})" if holder is not None else "another process"
    raise ConfigError(
        f"{key}: port {port} of this machine ({socket.gethostname()}) is in use by {who}; stop it, or choose another "
        f"port, the same on every node, such as {port + 1 if port < 65535 else port - 1}"
    )


def _listener(port: int) -> tuple[int, list[str]] | None:
    """Return the process id and the command line of the process that listens on a port; None where it is hidden."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{words[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(os.readlink(handle) in sockets for handle in (process / "fd").iterdir()):
                return int(process.name), (process / "cmdline").read_text().rstrip("\0").split("\0")
    return None


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                asked = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                found[name] = socket.inet_ntoa(asked[20:24])
    return found


def address_towards(ip: str) -> Address:
    """Return the address with which this machine reaches another; for an own address, that one.

    Raises ConfigError where there is no route.
    """
    own = ip if is_own(ip) else _source_of_route(ip)
    return Address(own, next((name for name, address in interfaces().items() if address == own), None))


def _source_of_route(ip: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ip, 9))  # sends nothing: it only chooses the route
        except OSError as error:
            raise ConfigError(
                f"launch.rendezvous: {ip}: this machine has no route to the first node ({error.strerror}); its "
                f"interfaces are {_described()}"
            ) from None
        return str(probe.getsockname()[0])


def settle_interface(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let gloo use the interface that reaches the first rank, where nobody has chosen one. By itself it takes the one
    of this machine's name, which is the loopback where /etc/hosts says so."""
    first = environ.get("MASTER_ADDR")
    if not first or int(environ.get("WORLD_SIZE") or 1) == 1 or "GLOO_SOCKET_IFNAME" in environ:
        return
    with contextlib.suppress(ConfigError):  # the ranks will not find each other, and say so
        ip = resolve(first)
        if not ip.startswith("127.") and (interface := address_towards(ip).interface) is not None:
            environ["GLOO_SOCKET_IFNAME"] = interface


def address_of(interface: str) -> Address:
    """Return the address of an interface. Raises ConfigError where there is no such interface with an address."""
    if (ip := interfaces().get(interface)) is None:
        raise ConfigError(
            f"launch.interface: {interface}: this machine ({socket.gethostname()}) has no such interface with an IPv4 "
            f"address; there are {_described()}"
        )
    return Address(ip, interface)


def _described() -> str:
    return ", ".join(f"{name} ({ip})" for name, ip in interfaces().items()) or "none"
