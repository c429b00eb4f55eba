"""Records that come with this library, as packs in ``kernels/tuned``."""

from __future__ import annotations

from pathlib import Path

from attnrewrite.kernels.store.key import Key
from attnrewrite.kernels.store.pack import unpack
from attnrewrite.kernels.store.record import Record, best

FOLDER = Path(__file__).parents[1] / "tuned"


def bundled(family: str, folder: Path = FOLDER) -> dict[Key, Record]:
    """Return the records of a family that come with this library, one for each key."""
    try:
        data = (folder / f"{family}.jsonl").read_bytes()
    except OSError:
        return {}
    found: dict[Key, Record] = {}
    for record in unpack(data):
        if isinstance(record, Record):
            found[record.key] = best(filter(None, (record, found.get(record.key)))) or record
    return found
