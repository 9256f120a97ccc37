"""Keyed hashes of stream positions: a row's virtual shard, the rank that owns it, and its priority in the reservoir.

All are functions of (seed, position) alone, so every rank and every resumed run computes them without communication.
The mixer is SplitMix64's finaliser (Steele, Lea and Flood 2014, OOPSLA).
"""

from __future__ import annotations

import hashlib

import numpy as np

NUM_SHARDS = 1024
NUM_GROUPS = 64
SHARDS_PER_GROUP = NUM_SHARDS // NUM_GROUPS

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(*words: int | np.ndarray) -> np.ndarray:
    """64-bit hash of words, each an int or a uint64 array; arrays broadcast."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            word = np.uint64(word & 0xFFFFFFFFFFFFFFFF) if isinstance(word, int) else word.astype(np.uint64, copy=False)
            state = _scramble((state ^ word) + _GOLDEN)
    return state


def _scramble(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLY[0]
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLY[1]
    return z ^ (z >> np.uint64(31))


def name_key(name: str) -> int:
    """64-bit key of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


_SHARD, _PRIORITY, _REST = (name_key(f"safecl replay {purpose}") for purpose in ("shard", "priority", "rest"))


def shard_of(positions: np.ndarray, seed: int) -> np.ndarray:
    """Return the virtual shard of each stream position; uint16 [n], below 1,024.

    The hash deals rows out evenly: every aligned run of 64 positions gives one row to each of the 64 groups of 16
    shards, in an order drawn per run, and every aligned run of 1,024 gives one to each shard. So for any world size
    that divides 64, even a small memory is spread equally over the ranks.
    """
    positions = np.asarray(positions, np.uint64)
    run, place = positions >> np.uint64(6), positions & np.uint64(63)
    group = _permute64(place, mix(seed, _SHARD, run))
    block = run >> np.uint64(4)
    within = (run ^ mix(seed, _SHARD, block, group)) & np.uint64(SHARDS_PER_GROUP - 1)
    return (group * np.uint64(SHARDS_PER_GROUP) + within).astype(np.uint16)


def _permute64(place: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Apply a keyed permutation of 0..63; every round is invertible on six bits."""
    low = np.uint64(63)
    for round_ in range(4):
        bits = key >> np.uint64(13 * round_)
        place = (place * ((bits << np.uint64(1)) | np.uint64(1)) + (bits >> np.uint64(6))) & low
        place = place ^ (place >> np.uint64(3))
    return place


def owner(shard: np.ndarray, world_size: int) -> np.ndarray:
    """Return the rank that owns each shard: contiguous shards, equally many per rank where world_size divides 1,024."""
    return shard * world_size // NUM_SHARDS


def priority_of(positions: np.ndarray, seed: int) -> np.ndarray:
    """Return a uniform 64-bit number per position; the reservoir keeps the rows with the smallest."""
    return mix(seed, _PRIORITY, np.asarray(positions, np.uint64))


def cohort_of(positions: np.ndarray, seed: int, num_cohorts: int) -> np.ndarray:
    """Return which of `num_cohorts` resting cohorts each position belongs to; int64 [n]."""
    return (mix(seed, _REST, np.asarray(positions, np.uint64)) % np.uint64(num_cohorts)).astype(np.int64)
