"""Which ranks run on one node and can share memory."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safecl.distributed import collectives


@dataclass(frozen=True)
class Node:
    """Ranks that see the same processes and therefore can open each other's memory, in ascending order."""

    ranks: tuple[int, ...]
    rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == self.ranks[0]

    def exchange(self, item: Any) -> list[Any]:
        """What every rank of this node says, in rank order. A collective call of all ranks of the job."""
        return [
            said
            for rank, said in sorted(collectives.gather_objects([(collectives.rank(), item)]))
            if rank in self.ranks
        ]


def this_node() -> Node:
    """The node of this rank. A collective call of all ranks; one process without a group is a node of its own."""
    own = collectives.rank(), _identity()
    places = collectives.gather_objects([own])
    return Node(tuple(rank for rank, place in places if place == own[1]), own[0])


def _identity() -> tuple[str, ...]:
    """The same for processes of one kernel and one process namespace: containers on one machine do not see each
    other's."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return (
        socket.gethostname(),
        boot.read_text().strip() if boot.exists() else "",
        os.readlink(space) if space.is_symlink() else "",
    )
