"""Records in any file system that fsspec knows: s3, gs, http (read-only), hf, memory and more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import fsspec

from attnrewrite.kernels.store.key import VERSION
from attnrewrite.kernels.store.record import LARGEST

MOST = 64
"""Records of one key that are read, so that a folder that somebody filled costs a limited time."""


class Remote:
    """Records below a URL. Object stores put an object whole; names made of content need no lock."""

    def __init__(self, url: str) -> None:
        self.files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.root = root.rstrip("/")
        if url.startswith("s3"):
            self.files.connect()  # botocore reads its tables: half a second of work that is no waiting for the store

    def fetch(self, folder: str) -> dict[str, bytes]:
        """Return the records of one key's folder by their paths."""
        try:
            listed = self.files.ls(f"{self.root}/{folder}", detail=False)
        except FileNotFoundError:
            return {}
        names = sorted({PurePosixPath(path).name for path in listed if path.endswith(".json")})
        return {f"{folder}/{name}": self.read(f"{folder}/{name}") for name in names[:MOST]}

    def paths(self) -> Iterator[str]:
        """Yield the path of every record."""
        top = f"{self.root}/v{VERSION}"
        try:
            listed = self.files.find(top)
        except FileNotFoundError:
            return
        yield from sorted(
            f"v{VERSION}{path[path.index(top) + len(top) :]}" for path in listed if path.endswith(".json")
        )

    def read(self, path: str) -> bytes:
        """Return a record's content, of a file that is larger at most one byte more than a record can have."""
        data: bytes = self.files.cat_file(f"{self.root}/{path}", start=0, end=LARGEST + 1)
        return data

    def write(self, path: str, data: bytes) -> None:
        """Put a record there."""
        target = f"{self.root}/{path}"
        try:
            self.files.pipe_file(target, data)
        except FileNotFoundError:  # a file system with folders, which object stores do not have
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.pipe_file(target, data)
