"""Keys that were looked for in vain, as notes beside the records, so that a person can ask why."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from attnrewrite.kernels.store.key import Key, canonical
from attnrewrite.kernels.store.local import put_file
from attnrewrite.kernels.store.validation import key_of

MOST = 1000
"""Notes that are kept; a note more is not taken."""


def note(root: Path, key: Key) -> None:
    """Note that a key was looked for in vain. Where nothing can be written, nothing is."""
    folder = root / "missed"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if len(os.listdir(folder)) < MOST:
            put_file(folder / f"{key.digest}.json", canonical(key.to_json()))


def forget(root: Path, key: Key) -> None:
    """Drop the note of a key that has a record now."""
    with suppress(OSError):
        (root / "missed" / f"{key.digest}.json").unlink(missing_ok=True)


def missed(root: Path) -> list[Key]:
    """Return the keys that were looked for in vain, the last one first."""
    try:
        files = sorted((root / "missed").glob("*.json"), key=lambda file: -file.stat().st_mtime)
    except OSError:
        return []
    found = []
    for file in files:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found.append(key_of(json.loads(file.read_bytes())))
    return found
