"""The ranks that run on one node and can share memory."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safecl.distributed import collectives

T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """Ranks that see the same processes and therefore can open each other's memory, in ascending order."""

    ranks: tuple[int, ...]
    rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == self.ranks[0]

    def exchange(self, item: T) -> list[T]:
        """Return the items of all ranks of this node, in rank order. A collective call of all ranks of the job."""
        return [found for rank, found in enumerate(collectives.gather_objects([item])) if rank in self.ranks]


def this_node() -> Node:
    """Find the node of this rank. A collective call of all ranks; one process without a group is a node by itself."""
    own = collectives.rank(), node_identity()
    places = collectives.gather_objects([own])
    return Node(tuple(rank for rank, place in places if place == own[1]), own[0])


def node_identity() -> tuple[str, ...]:
    """Host name, boot and process namespace. Containers on one machine differ in the last: they cannot open each
    other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return (
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(space) if space.is_symlink() else "",
    )
