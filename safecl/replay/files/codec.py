"""One row as bytes, and its entry in a table of rows.

    body = input_ids int32 [length] | log_tail fp32 [targets] | indices int32 [targets, k] | values fp16/fp32 [targets,
    width]
           | packed indices 2 or 3 bytes each | mask, 8 tokens a byte | tags as JSON, blanks up to a multiple of 8 bytes

Parts that a row does not have take no bytes. `form` says which are there: the low 4 bits the kind of teacher, bit 4
fp32 values, bits 5-6 the width of an index. A body's checksum is XXH3 seeded with the row's position, so that bodies
cannot change places unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from safecl.replay.rows import HiddenOutputs, LogitsOutputs, MemoryRow, Teacher, TeacherOutputs

ENTRY = np.dtype(
    [
        ("position", "<u8"),
        ("row_id", "<u8"),
        ("checksum", "<u8"),
        ("nbytes", "<u4"),
        ("length", "<u4"),
        ("targets", "<u4"),
        ("step", "<u4"),
        ("label", "<u4"),
        ("width", "<u4"),
        ("prior_nll", "<f4"),
        ("form", "<u4"),
    ]
)  # fmt: skip

NO_TEACHER, TOPK, HIDDEN, LOGITS = 0, 1, 2, 3
_KIND, _FP32, _INDEX = 0b1111, 0b10000, 5
_INDEX_BYTES = (0, 4, 2, 3)
LONGEST = 2**31 - 1


def checksum(position: int, body: Any) -> int:
    """XXH3-64 of a body, seeded with the row's position."""
    return xxhash.xxh3_64_intdigest(body, position)


def index_form(vocab_size: int, packed: bool) -> int:
    """How token ids of a teacher are written: the code in bits 5-6 of `form`."""
    if not packed:
        return 1
    return 2 if vocab_size <= 2**16 else 3


# ------------------------------------------------------------------------------------------------------------- checking


def checked_ids(values: Any, name: str = "input_ids") -> np.ndarray:
    """Token ids as int32 [length]. Raises ValueError for other than whole numbers from 0 to 2^31 - 1 in one
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
    """The loss mask as bool [length]. Raises ValueError for other values than 0 and 1, another length, or a target at
    position 0."""
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


def _checked_values(values: Any, num_targets: int, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or len(values) != num_targets:
        raise ValueError(
            f"teacher {name} have shape {list(values.shape)}; the row has {num_targets} supervised tokens, so [{num_targets}, n]"
        )
    if values.dtype not in (np.float16, np.float32):
        raise ValueError(
            f"teacher {name} are {values.dtype}; store fp16 (log-probabilities lose 0.4 % of the gradient) or fp32"
        )
    if np.isnan(values).any():
        raise ValueError(f"teacher {name} hold NaN")
    return np.ascontiguousarray(values)


def checked_teacher(teacher: Teacher | None, num_targets: int) -> Teacher | None:
    """The outputs with the stored dtypes. Raises ValueError where shapes or values do not fit the row's targets."""
    if teacher is None:
        return None
    if isinstance(teacher, HiddenOutputs):
        return HiddenOutputs(_checked_values(teacher.hidden, num_targets, "hidden states"))
    if isinstance(teacher, LogitsOutputs):
        return LogitsOutputs(_checked_values(teacher.log_probs, num_targets, "log_probs"))
    log_probs = _checked_values(teacher.log_probs, num_targets, "log_probs")
    indices, log_tail = np.asarray(teacher.indices), np.asarray(teacher.log_tail)
    if indices.shape != log_probs.shape or log_tail.shape != (num_targets,):
        raise ValueError(
            f"teacher indices {list(indices.shape)} and log_tail {list(log_tail.shape)} do not fit log_probs {list(log_probs.shape)}"
        )
    if indices.size:
        checked_ids(indices.reshape(-1), "teacher indices")
    if log_tail.dtype.kind != "f" or np.isnan(log_tail).any():
        raise ValueError(f"teacher log_tail is {log_tail.dtype} or holds NaN; it must be fp32")
    return TeacherOutputs(
        log_probs, np.ascontiguousarray(indices, np.int32), np.ascontiguousarray(log_tail, np.float32)
    )


def cut_to_prefix(
    ids: np.ndarray, mask: np.ndarray, teacher: Teacher | None, num_targets: int
) -> tuple[np.ndarray, np.ndarray, Teacher | None]:
    """The row up to its `num_targets`-th supervised token. A causal model says the same about these tokens without the
    rest."""
    places = np.flatnonzero(mask)
    if len(places) <= num_targets:
        return ids, mask, teacher
    end = int(places[num_targets - 1]) + 1
    return ids[:end], mask[:end], first_targets(teacher, num_targets)


def first_targets(teacher: Teacher | None, num_targets: int) -> Teacher | None:
    """The outputs for the first supervised tokens."""
    if teacher is None:
        return None
    return type(teacher)(*(array[:num_targets] for array in vars(teacher).values()))


# ------------------------------------------------------------------------------------------------------ bytes and back


def teacher_form(teacher: Teacher | None, index_code: int) -> tuple[int, int]:
    """(form, width) of outputs: kind of teacher with dtypes, and entries per supervised token."""
    if teacher is None:
        return NO_TEACHER, 0
    values = teacher.hidden if isinstance(teacher, HiddenOutputs) else teacher.log_probs
    form = _FP32 if values.dtype == np.float32 else 0
    if isinstance(teacher, TeacherOutputs):
        return form | topk_form(index_code), values.shape[1]
    return form | (HIDDEN if isinstance(teacher, HiddenOutputs) else LOGITS), values.shape[1]


def topk_form(index_code: int) -> int:
    """`form` of top-k outputs in fp16."""
    return TOPK | index_code << _INDEX


def tag_bytes(tags: Mapping[str, str]) -> bytes:
    """Tags as JSON; nothing for none."""
    return json.dumps(dict(tags), ensure_ascii=False).encode() if tags else b""


def body_bytes(length: int, num_targets: int, form: int, width: int, num_tag_bytes: int) -> int:
    """Bytes of a row's body, known without writing it. A row with only a teacher (the cache) has length 0."""
    size = 4 * length + (length + 7) // 8 + num_tag_bytes
    if form & _KIND:
        size += num_targets * width * (4 if form & _FP32 else 2)
    if form & _KIND == TOPK:
        size += num_targets * (4 + width * _INDEX_BYTES[form >> _INDEX])
    return (size + 7) // 8 * 8


def encode(
    ids: np.ndarray | None, mask: np.ndarray | None, teacher: Teacher | None, index_code: int, tags: bytes
) -> bytes:
    """A row's body. ids int32 [length] and mask bool [length], or None for a teacher alone."""
    parts = [] if ids is None else [ids.tobytes()]
    packed = b""
    if isinstance(teacher, TeacherOutputs):
        parts.append(teacher.log_tail.tobytes())
        if index_code == 1:
            parts.append(teacher.indices.tobytes())
        else:
            packed = _pack(teacher.indices, _INDEX_BYTES[index_code])
    if teacher is not None:
        values = teacher.hidden if isinstance(teacher, HiddenOutputs) else teacher.log_probs
        parts += [values.tobytes(), packed]
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
) -> tuple[np.ndarray, np.ndarray, Teacher | None, dict]:
    """(input_ids, loss_mask, teacher, tags) of a body; arrays are views of it where they can be, read-only."""
    ids = np.frombuffer(body, "<i4", length, 0)
    end, teacher = 4 * length, None
    if form & _KIND:
        teacher, end = _decode_teacher(body, end, num_targets, form, width)
    num_mask = (length + 7) // 8
    mask = np.unpackbits(np.frombuffer(body, np.uint8, num_mask, end), count=length).view(np.bool_)
    rest = body[end + num_mask :]
    # fewer than 8 bytes are the blanks up to a multiple of 8: the shortest tags are {"a": ""}
    return ids, mask, teacher, json.loads(bytes(rest)) if len(rest) >= 8 else {}


def _decode_teacher(body: memoryview, start: int, num_targets: int, form: int, width: int) -> tuple[Teacher, int]:
    kind, dtype, count = form & _KIND, np.dtype("<f4" if form & _FP32 else "<f2"), num_targets * width
    num_bytes = _INDEX_BYTES[form >> _INDEX]
    log_tail = indices = None
    if kind == TOPK:
        log_tail, start = np.frombuffer(body, "<f4", num_targets, start), start + 4 * num_targets
    if num_bytes == 4:
        indices, start = np.frombuffer(body, "<i4", count, start), start + 4 * count
    values, start = np.frombuffer(body, dtype, count, start).reshape(num_targets, width), start + count * dtype.itemsize
    if kind != TOPK:
        return (HiddenOutputs if kind == HIDDEN else LogitsOutputs)(values), start
    if num_bytes != 4:
        indices, start = _unpack(body, start, count, num_bytes), start + count * num_bytes
    return TeacherOutputs(values, indices.reshape(num_targets, width), log_tail), start


# ------------------------------------------------------------------------------------------------------------- the loss


def prior_nll(row: MemoryRow, ids: np.ndarray, mask: np.ndarray, teacher: Teacher | None) -> float:
    """Mean NLL of the row's targets under the aligned model, nats per token: as given, or from its top-k outputs; NaN
    without either.

    A label outside the k stored tokens counts with the largest probability it can have: that of the k-th token, or all
    of the tail.
    """
    if not np.isnan(row.prior_nll) or teacher is None or isinstance(teacher, HiddenOutputs) or not mask.any():
        return float(row.prior_nll)
    labels = ids[mask]
    if isinstance(teacher, LogitsOutputs):
        if labels.max() >= teacher.log_probs.shape[1]:
            raise ValueError(
                f"teacher log_probs cover {teacher.log_probs.shape[1]} tokens, but the row has the target {labels.max()}"
            )
        return float(-np.take_along_axis(teacher.log_probs, labels[:, None], 1).mean(dtype=np.float64))
    hit = teacher.indices == labels[:, None]
    log_probs = np.where(hit, teacher.log_probs, -np.inf).max(1, initial=-np.inf).astype(np.float64)
    bound = np.minimum(teacher.log_tail, teacher.log_probs.min(1, initial=0.0)).astype(np.float64)
    return float(-np.where(hit.any(1), log_probs, np.maximum(bound, -100.0)).mean())
