"""Headers of safetensors files: what does not fit its file is refused."""

from __future__ import annotations

import struct

import pytest

from safecl.storage.durable import DamagedCheckpoint
from safecl.storage.safetensors_file import read_header


def _header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


BAD_HEADERS = {
    "empty file": b"",
    "cut in the length": b"\x10\0\0",
    "a length of 2^63": _header(b"{}", 2**63),
    "a length beyond the file": _header(b"{}", 50),
    "a length beyond the library's limit": _header(b"{}", 100_000_001),
    "no JSON": _header(b"{no json}"),
    "not UTF-8": _header(b'{"\xff": 1}'),
    "a list": _header(b"[1, 2]"),
    "nested a million deep": _header(b"[" * 1_000_000),
    "an unknown dtype": _header(b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}') + b"0",
    "a negative size": _header(b'{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}}'),
    "a fraction": _header(b'{"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}}') + b"0",
    "a size that does not fit its bytes": _header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}')
    + b"0000",
    "a gap": _header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}') + b"00",
    "an overlap": _header(
        b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, '
        b'"b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}'
    )
    + b"000",
    "bytes beyond the tensors": _header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}') + b"00",
    "bytes missing": _header(b'{"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}') + b"00",
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, case):
    (tmp_path / "bad.safetensors").write_bytes(BAD_HEADERS[case])
    with pytest.raises(DamagedCheckpoint):
        read_header(tmp_path / "bad.safetensors")
