"""The amount that a command says: `--quiet` leaves warnings, verdicts and errors, `-v` adds a line for every step and
phase. Imports no torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.IntEnum):
    """The levels, from less to more."""

    QUIET = -1
    NORMAL = 0
    VERBOSE = 1


@dataclass
class Verbosity:
    """The level of this process; the command line sets it."""

    level: Level = Level.NORMAL

    @property
    def quiet(self) -> bool:
        return self.level == Level.QUIET

    @property
    def verbose(self) -> bool:
        return self.level == Level.VERBOSE


verbosity = Verbosity()
