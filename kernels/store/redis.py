"""Records in a Redis server: a hash for each key, in which a record's name is a field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import redis

from attnrewrite.kernels.store.key import VERSION

PREFIX = "attnrewrite:"
TIMEOUT = 5.0
"""Seconds for a single answer; how long a process waits in all is decided in ``patience.py``."""


class Redis:
    """Records of a server at a URL, such as ``redis://host:6379/0``."""

    def __init__(self, url: str) -> None:
        # Its methods are typed for the asyncio client, too.
        self.server: Any = redis.Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)

    def fetch(self, folder: str) -> dict[str, bytes]:
        """Return the records of one key's folder by their paths."""
        return {f"{folder}/{name.decode()}": data for name, data in self.server.hgetall(PREFIX + folder).items()}

    def paths(self) -> Iterator[str]:
        """Yield the path of every record."""
        for key in sorted(self.server.scan_iter(match=f"{PREFIX}v{VERSION}/*", count=1000)):
            folder = key.decode().removeprefix(PREFIX)
            yield from (f"{folder}/{name.decode()}" for name in sorted(self.server.hkeys(key)))

    def read(self, path: str) -> bytes:
        """Return a record's content."""
        folder, _, name = path.rpartition("/")
        data = self.server.hget(PREFIX + folder, name)
        if data is None:
            raise FileNotFoundError(path)
        return bytes(data)

    def write(self, path: str, data: bytes) -> None:
        """Put a record there."""
        folder, _, name = path.rpartition("/")
        self.server.hset(PREFIX + folder, name, data)
