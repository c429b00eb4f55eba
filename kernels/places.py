"""Where this library keeps what it makes for one user on one machine."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return ``ATTNREWRITE_CACHE_DIR``, or the platform's cache of the user."""
    given = os.environ.get("ATTNREWRITE_CACHE_DIR")
    return Path(given) if given else Path(platformdirs.user_cache_dir("attnrewrite"))


def without_credentials(address: str) -> str:
    """Return an address without what stands before its ``@``."""
    scheme, separator, rest = address.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{separator}***{at}{host}" if at and user else address
