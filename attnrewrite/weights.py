"""Up-front checks of weight files: the header is read, the tensors are not.

A damaged file must be named as such before a loader stumbles over it somewhere deep.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

from attnrewrite.kernels.diagnostics import AttnRewriteError, error

_GGUF_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# A header larger than this is no header: both formats keep names and shapes there, never weights.
_LARGEST_HEADER = 100 << 20


def check_safetensors(path: Path) -> None:
    """Raise AR602 unless ``path`` is a whole safetensors file."""
    size = _size(path)
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _damaged(path, f"it has {size} bytes, a safetensors file has at least 8")
        (length,) = struct.unpack("<Q", head)
        if length > min(size - 8, _LARGEST_HEADER):
            reason = f"its header claims {length} bytes, the file has {size}"
            raise _damaged(path, f"{reason}: it is truncated or no safetensors file")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as cause:
            raise _damaged(path, "its header is not that of a safetensors file") from cause
    needed = 8 + length + max(ends, default=0)
    if needed != size:
        raise _damaged(path, f"its header describes {needed} bytes, the file has {size}")


def check_gguf(path: Path) -> None:
    """Raise AR602 unless ``path`` is a whole GGUF file (little endian, version 2 or 3)."""
    size = _size(path)
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise _damaged(path, f"it begins with {magic!r}, a GGUF file begins with b'GGUF'")
        try:
            needed = _gguf_bytes(file)
        except (struct.error, KeyError, UnicodeDecodeError, _TooLongError) as cause:
            raise _damaged(path, f"its header ends or breaks off after {file.tell()} bytes") from cause
    if needed > size:
        raise _damaged(path, f"its header describes at least {needed} bytes, the file has {size}: it is truncated")


class _TooLongError(Exception):
    """A length field points past any sensible header."""


def _gguf_bytes(file: BinaryIO) -> int:
    """Return how many bytes the file must have for the last tensor to be whole."""
    version, tensors, fields = _read(file, "<IQQ")
    if version not in (2, 3):
        raise KeyError(version)
    alignment = _GGUF_ALIGNMENT
    for _ in range(fields):
        key = _string(file)
        value = _value(file, _read(file, "<I")[0])
        if key == b"general.alignment" and isinstance(value, int) and value > 0:
            alignment = value
    end = 0
    for _ in range(tensors):
        _string(file)
        (rank,) = _read(file, "<I")
        shape = _read(file, f"<{min(rank, 8)}Q")
        kind, offset = _read(file, "<IQ")
        end = max(end, offset + _tensor_bytes(shape, kind))
    start = file.tell()
    return start + (-start % alignment) * bool(tensors) + end


def _tensor_bytes(shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError:
        # A quantisation that the installed gguf does not know; the loader names it.
        return 0
    count = 1
    for extent in shape:
        count *= extent
    return count // per_block * block_bytes


def _value(file: BinaryIO, kind: int) -> int | float | bytes | None:
    """Read one metadata value; the content of arrays is skipped."""
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item, length = _read(file, "<IQ")
        if item in _SCALARS:
            _skip(file, length * struct.calcsize(f"<{_SCALARS[item]}"))
        else:
            for _ in range(length):
                _value(file, item)
        return None
    value: int | float = _read(file, f"<{_SCALARS[kind]}")[0]
    return value


def _string(file: BinaryIO) -> bytes:
    (length,) = _read(file, "<Q")
    if length > _LARGEST_HEADER:
        raise _TooLongError
    return file.read(length)


def _skip(file: BinaryIO, length: int) -> None:
    if length > _LARGEST_HEADER:
        raise _TooLongError
    file.seek(length, 1)


def _read(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _size(path: Path) -> int:
    if not path.is_file():
        raise error("AR602", f"{path} does not exist, or is no file")
    return path.stat().st_size


def _damaged(path: Path, reason: str) -> AttnRewriteError:
    return error("AR602", f"{path} cannot be used: {reason}")
