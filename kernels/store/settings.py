"""The store of this process, as the environment says."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from attnrewrite.kernels.places import cache_folder
from attnrewrite.kernels.store import modes
from attnrewrite.kernels.store.behind import Shared
from attnrewrite.kernels.store.breaker import Breaker
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.record import Record
from attnrewrite.kernels.store.tiers import Store

URL, SECRET = "ATTNREWRITE_CACHE_URL", "ATTNREWRITE_CACHE_SECRET"


def folder() -> Path:
    """Return where records lie on this machine."""
    return cache_folder() / "tuning"


def secret() -> bytes:
    """Return ``ATTNREWRITE_CACHE_SECRET``, empty where there is none."""
    return os.environ.get(SECRET, "").encode()


@functools.cache
def default_store() -> Store:
    """Return the store that kernels use. Raises CaptureError AR102 for a mode that is none."""
    return open_store(modes.from_environment())


def open_store(mode: modes.Mode, breaker: Breaker | None = None) -> Store:
    """Return a store in this mode. ``breaker``: how long to wait for the shared one, where that is not as usual."""
    url = os.environ.get(URL)
    return Store(Folder(folder()), Shared(url, breaker) if url else None, mode, secret(), used=_carry)


def _carry(record: Record) -> None:
    """Let a record travel with what torch compiled; without torch nothing was compiled."""
    if "torch" in sys.modules:
        from attnrewrite.kernels.store.artifacts import carry

        carry(record)
