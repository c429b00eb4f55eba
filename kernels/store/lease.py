"""Who tunes a key while others wait for the result or run without: advice, on which nothing depends."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attnrewrite.kernels.store.key import Key


@contextmanager
def lease(root: Path, key: Key, seconds: float) -> Iterator[bool]:
    """Say whether this process is the one that tunes ``key`` for the next ``seconds``, of those that share ``root``.

    A process that was killed keeps others away until its lease expires; one that takes longer than it said has its work
    done twice. Where no file can be written, everybody may tune.
    """
    path, token = root / "leases" / key.digest, uuid.uuid4().hex
    mine = _take(path, token, seconds)
    try:
        yield mine
    finally:
        with suppress(OSError):
            if mine and path.read_text() == token:
                path.unlink()


def _take(path: Path, token: str, seconds: float) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return True
    for _ in range(2):
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), "w") as file:
                file.write(token)
            return True
        except FileExistsError:
            if not _expired(path, seconds):
                return False
            with suppress(OSError):
                path.unlink()
        except OSError:
            return True
    return False


def _expired(path: Path, seconds: float) -> bool:
    """Compare two times of the same file system: clocks of machines may differ."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent) as file:
            return os.stat(file.name).st_mtime - path.stat().st_mtime > seconds
    except OSError:
        return False
