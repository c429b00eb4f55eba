"""Many records as one file: a line for each, sorted, so that git shows what a change adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attnrewrite.kernels.store.record import Record
from attnrewrite.kernels.store.validation import Refusal, read


def pack(records: Iterable[Record]) -> bytes:
    """Return records as JSON lines: the same records give the same bytes."""
    lines = {record.path: record.data for record in records}
    return b"".join(lines[path] + b"\n" for path in sorted(lines))


def unpack(data: bytes, secret: bytes = b"") -> Iterator[Record | Refusal]:
    """Yield every record of a pack, or why its line is refused."""
    for line in data.splitlines():
        if line.strip():
            yield read(line, secret=secret)
