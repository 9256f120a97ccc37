"""One row as bytes, and its entry in a table of rows.

    body = input_ids int32 [length] | log_tail fp32 [targets] | indices int32 [targets, k]
           | values fp16/fp32 [targets, k] | packed indices 2 or 3 bytes each | mask, 8 tokens a byte
           | tags as JSON, blanks up to a multiple of 8 bytes

Parts that a row does not have take no bytes. `form` says which parts exist: the low 4 bits give the kind of teacher,
bit 4 marks fp32 values, bits 5-6 give the width of an index. A body's checksum is XXH3 seeded with the row's position,
so swapped bodies are detected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from safecl.replay.rows import MemoryRow, TeacherOutputs

ENTRY_COLUMNS = {
    "position": "<u8",
    "row_id": "<u8",
    "checksum": "<u8",
    "nbytes": "<u4",
    "length": "<u4",
    "targets": "<u4",
    "step": "<u4",
    "label": "<u4",
    "width": "<u4",
    "prior_nll": "<f4",
    "form": "<u4",
}
ENTRY = np.dtype(list(ENTRY_COLUMNS.items()))

# Kinds 2 and 3 are reserved: they were hidden states and log-probabilities of the whole vocabulary, which no config
# could ask for.
NO_TEACHER, TOPK = 0, 1
_KIND, _FP32, _INDEX = 0b1111, 0b10000, 5
_INDEX_BYTES = (0, 4, 2, 3)
LONGEST = 2**31 - 1


def checksum(position: int, body: bytes | memoryview) -> int:
    """XXH3-64 of a body, seeded with the row's position."""
    return xxhash.xxh3_64_intdigest(body, position)


def index_form(vocab_size: int, packed: bool) -> int:
    """Return the code, for bits 5-6 of `form`, of how a teacher's token ids are written."""
    if not packed:
        return 1
    return 2 if vocab_size <= 2**16 else 3


# ------------------------------------------------------------------------------------------------------------- checking


def checked_ids(values: Any, name: str = "input_ids") -> np.ndarray:
    """Return token ids as int32 [length]. Raises ValueError for anything but whole numbers from 0 to 2^31 - 1 in one
    dimension."""
    ids = np.asarray(values)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"{name} must be a non-empty list of token ids, not an array of shape {list(ids.shape)}")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name} are {ids.dtype}; token ids are whole numbers, e.g. int32")
    if ids.min() < 0 or ((ids.dtype.itemsize > 4 or ids.dtype.kind == "u") and ids.max() > LONGEST):
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise ValueError(f"{name} hold {bad}; token ids lie between 0 and {LONGEST}")
    return np.ascontiguousarray(ids, np.int32)


def checked_mask(values: Any, length: int) -> np.ndarray:
    """Return the loss mask as bool [length]. Raises ValueError for values other than 0 and 1, another length, or a
    target at position 0."""
    mask = np.asarray(values)
    if mask.shape != (length,):
        raise ValueError(f"loss_mask has shape {list(mask.shape)}, input_ids have {length} tokens")
    if mask.dtype != np.bool_:
        if mask.dtype.kind not in "iu" or mask.max() > 1 or mask.min() < 0:
            raise ValueError(f"loss_mask is {mask.dtype} with values beyond 0 and 1; it must be bool")
        mask = mask.astype(np.bool_)
    if mask[0]:
        raise ValueError("loss_mask marks position 0, but nothing comes before the first token to predict it from")
    return mask


def _checked_log_probs(values: Any, num_targets: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or len(values) != num_targets:
        needed = f"the row has {num_targets} supervised tokens, so [{num_targets}, n]"
        raise ValueError(f"teacher log_probs have shape {list(values.shape)}; {needed}")
    if values.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"teacher log_probs are {values.dtype}; store fp16 (log-probabilities lose 0.4 % of the gradient) or fp32"
        )
    if np.isnan(values).any():
        raise ValueError("teacher log_probs hold NaN")
    return np.ascontiguousarray(values)


def checked_teacher(teacher: TeacherOutputs, num_targets: int) -> TeacherOutputs:
    """Return the outputs with the stored dtypes. Raises ValueError where shapes or values do not fit the row's
    targets."""
    log_probs = _checked_log_probs(teacher.log_probs, num_targets)
    indices, log_tail = np.asarray(teacher.indices), np.asarray(teacher.log_tail)
    if indices.shape != log_probs.shape or log_tail.shape != (num_targets,):
        shapes = f"indices {list(indices.shape)} and log_tail {list(log_tail.shape)}"
        raise ValueError(f"teacher {shapes} do not fit log_probs {list(log_probs.shape)}")
    if indices.size:
        checked_ids(indices.reshape(-1), "teacher indices")
    if log_tail.dtype.kind != "f" or np.isnan(log_tail).any():
        raise ValueError(f"teacher log_tail is {log_tail.dtype} or holds NaN; it must be fp32")
    return TeacherOutputs(
        log_probs, np.ascontiguousarray(indices, np.int32), np.ascontiguousarray(log_tail, np.float32)
    )


def cut_to_prefix(
    ids: np.ndarray, mask: np.ndarray, teacher: TeacherOutputs | None, num_targets: int
) -> tuple[np.ndarray, np.ndarray, TeacherOutputs | None]:
    """Cut a row after its `num_targets`-th supervised token. A causal model's outputs up to there stay the same."""
    places = np.flatnonzero(mask)
    if len(places) <= num_targets:
        return ids, mask, teacher
    end = int(places[num_targets - 1]) + 1
    return ids[:end], mask[:end], None if teacher is None else first_targets(teacher, num_targets)


def first_targets(teacher: TeacherOutputs, num_targets: int) -> TeacherOutputs:
    """Return the outputs of the first supervised tokens."""
    return TeacherOutputs(
        teacher.log_probs[:num_targets], teacher.indices[:num_targets], teacher.log_tail[:num_targets]
    )


# ------------------------------------------------------------------------------------------------------ bytes and back


def teacher_form(teacher: TeacherOutputs, index_code: int) -> tuple[int, int]:
    """Return (form, width) of outputs: their kind with dtypes, and their entries per supervised token."""
    fp32 = _FP32 if teacher.log_probs.dtype == np.float32 else 0
    return fp32 | topk_form(index_code), teacher.log_probs.shape[1]


def topk_form(index_code: int) -> int:
    """`form` of top-k outputs in fp16."""
    return TOPK | index_code << _INDEX


def tag_bytes(tags: Mapping[str, str]) -> bytes:
    """Return tags as JSON, no bytes for no tags."""
    return json.dumps(dict(tags), ensure_ascii=False).encode() if tags else b""


def body_bytes(length: int, num_targets: int, form: int, width: int, num_tag_bytes: int) -> int:
    """Number of bytes of a row's body, before it is written. A teacher alone (in the cache) has length 0."""
    size = 4 * length + (length + 7) // 8 + num_tag_bytes
    if form & _KIND == TOPK:
        size += num_targets * width * (4 if form & _FP32 else 2)
        size += num_targets * (4 + width * _INDEX_BYTES[form >> _INDEX])
    return (size + 7) // 8 * 8


def encode(
    ids: np.ndarray | None, mask: np.ndarray | None, teacher: TeacherOutputs | None, index_code: int, tags: bytes
) -> bytes:
    """Return a row's body. ids int32 [length] and mask bool [length], or None for a teacher alone."""
    parts = [] if ids is None else [ids.tobytes()]
    if teacher is not None:
        parts.append(teacher.log_tail.tobytes())
        if index_code == 1:
            parts += [teacher.indices.tobytes(), teacher.log_probs.tobytes()]
        else:
            parts += [teacher.log_probs.tobytes(), _pack(teacher.indices, _INDEX_BYTES[index_code])]
    if mask is not None:
        parts.append(np.packbits(mask).tobytes())
    parts.append(tags)
    body = b"".join(parts)
    return body + b" " * (-len(body) % 8)


def _pack(indices: np.ndarray, num_bytes: int) -> bytes:
    if indices.size and int(indices.max()) >= 1 << 8 * num_bytes:
        raise ValueError(
            f"teacher indices reach {int(indices.max())}, too large for {num_bytes} bytes; use indices: int32"
        )
    return np.ascontiguousarray(indices, "<i4").view(np.uint8).reshape(-1, 4)[:, :num_bytes].tobytes()


def _unpack(body: memoryview, start: int, count: int, num_bytes: int) -> np.ndarray:
    if num_bytes == 2:
        return np.frombuffer(body, "<u2", count, start).astype(np.int32)
    out = np.zeros((count, 4), np.uint8)
    out[:, :num_bytes] = np.frombuffer(body, np.uint8, count * num_bytes, start).reshape(count, num_bytes)
    return out.view("<i4").reshape(-1)


def decode(
    body: memoryview, length: int, num_targets: int, form: int, width: int
) -> tuple[np.ndarray, np.ndarray, TeacherOutputs | None, dict[str, str]]:
    """Return (input_ids, loss_mask, teacher, tags) of a body. Arrays are read-only, and views of it where possible.

    Raises ValueError where the bytes are not a body of this form.
    """
    ids = np.frombuffer(body, "<i4", length, 0)
    end, teacher = 4 * length, None
    if form & _KIND != NO_TEACHER:
        teacher, end = _decode_teacher(body, end, num_targets, form, width)
    num_mask = (length + 7) // 8
    mask = np.unpackbits(np.frombuffer(body, np.uint8, num_mask, end), count=length).view(np.bool_)
    rest = body[end + num_mask :]
    # fewer than 8 bytes are the blanks up to a multiple of 8: the shortest tags are {"a": ""}
    return ids, mask, teacher, json.loads(bytes(rest)) if len(rest) >= 8 else {}


def _decode_teacher(
    body: memoryview, start: int, num_targets: int, form: int, width: int
) -> tuple[TeacherOutputs, int]:
    """Return the outputs that begin at byte `start`, and the byte after them."""
    if form & _KIND != TOPK:
        raise ValueError(f"it has outputs of kind {form & _KIND}, which this safecl does not read")
    if form >> _INDEX not in range(1, len(_INDEX_BYTES)):
        raise ValueError(f"its token ids are written in form {form >> _INDEX}, which this safecl does not read")
    dtype, count = np.dtype("<f4" if form & _FP32 else "<f2"), num_targets * width
    num_bytes = _INDEX_BYTES[form >> _INDEX]
    log_tail, start = np.frombuffer(body, "<f4", num_targets, start), start + 4 * num_targets
    at_indices = start if num_bytes == 4 else start + count * dtype.itemsize
    at_values = start + 4 * count if num_bytes == 4 else start
    if num_bytes == 4:
        indices = np.frombuffer(body, "<i4", count, at_indices)
    else:
        indices = _unpack(body, at_indices, count, num_bytes)
    log_probs = np.frombuffer(body, dtype, count, at_values)
    end = start + count * (num_bytes + dtype.itemsize)
    shape = (num_targets, width)
    return TeacherOutputs(log_probs.reshape(shape), indices.reshape(shape), log_tail), end


# ------------------------------------------------------------------------------------------------------------- the loss


def prior_nll(row: MemoryRow, ids: np.ndarray, mask: np.ndarray, teacher: TeacherOutputs) -> float:
    """Mean NLL of the row's targets under the aligned model, nats per token: as given, or estimated from its top-k
    outputs; NaN for a row without targets.

    A label outside the k stored tokens counts with the largest probability that it can have: that of the k-th token, or
    all of the tail.
    """
    if not np.isnan(row.prior_nll) or not mask.any():
        return float(row.prior_nll)
    hit = teacher.indices == ids[mask][:, None]
    log_probs = np.where(hit, teacher.log_probs, -np.inf).max(1, initial=-np.inf).astype(np.float64)
    bound = np.minimum(teacher.log_tail, teacher.log_probs.min(1, initial=0.0)).astype(np.float64)
    return float(-np.where(hit.any(1), log_probs, np.maximum(bound, -100.0)).mean())
