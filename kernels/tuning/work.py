"""What a kernel of the dense family has to do for a shape: its programs, their tiles, and the work of one tile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from attnrewrite.kernels.dense.catalogue import made_apart, padded
from attnrewrite.kernels.dense.configs import Config

FLOAT = 4
_HALF = 2  # bytes of a penalty beside 16-bit inputs


@dataclass(frozen=True)
class Shape:
    """One call: sizes as everywhere, and what its kernels are specialised for.

    ``penalty`` and ``temperatures`` are those of selective attention and SSA; ``dead`` is the part of the tiles that
    need not be visited, because the penalty leaves nothing of them. ``parts``: into so many few queries split the keys.
    Query i stands at position i + ``offset`` among the keys.
    """

    B: int
    H: int
    Hkv: int
    L: int
    S: int
    D: int
    Dv: int
    causal: bool = False
    window: int | None = None
    bits: int = 16
    penalty: bool = False
    temperatures: bool = False
    dead: float = 0.0
    parts: int = 1
    offset: int = 0

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.bits // 8

    @property
    def pairs(self) -> int:
        """Visible pairs of a query and a key, of one head."""
        behind = 0 if self.window is None else _clipped(self.offset + 1 - self.window, self.L, self.S)
        return (_clipped(self.offset + 1, self.L, self.S) if self.causal else self.L * self.S) - behind

    @property
    def features(self) -> int:
        """Features of a key and its value as tiles hold them."""
        return padded(self.D) + padded(self.Dv)


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n]. ``feeds``: another product takes what is made of its result."""

    m: int
    n: int
    k: int
    feeds: bool = False


class Tile(NamedTuple):
    """The work of one step of a program's loop. ``simple``: float32 operations; ``loads``: bytes from the L2 cache."""

    products: tuple[Product, ...]
    exponentials: int
    simple: int
    loads: int


class Work(NamedTuple):
    """All programs of a launch. ``memory``: the bytes that the device's memory moves at least."""

    programs: int
    tiles: float
    longest: int
    """Tiles of the program that has most."""
    shortest: int
    tile: Tile
    memory: float


def forward(s: Shape, c: Config) -> Work:
    """Online softmax over the keys of a block of rows."""
    M, N, D, Dv = c.block_m, c.block_n, padded(s.D), padded(s.Dv)
    products = (Product(M, N, D, feeds=True), Product(M, Dv, N))
    extra = _addends(s) + (1 if s.temperatures else 0)
    loads = N * s.features * s.size + _penalty_tile(s, M, N)
    # Per pair: largest, fma of the exponent, sum, half of a rounding of two; per row the output is scaled down.
    tile = Tile(products, M * N + M, round((3.5 + extra) * M * N) + M * Dv, loads)
    once = s.size * (s.B * s.H * s.L * (s.D + s.Dv) + s.B * s.Hkv * s.S * (s.D + s.Dv)) + FLOAT * s.B * s.H * s.L
    return _by_rows(s, c, s.B * s.H, tile, once + _penalty(s))


def delta(s: Shape, c: Config) -> Work:
    """Read output and its gradient once."""
    M, Dv = c.block_m, padded(s.Dv)
    programs = s.B * s.H * -(-s.L // M)
    moved = s.B * s.H * s.L * (2 * s.Dv * s.size + FLOAT)
    return Work(programs, programs, 1, 1, Tile((), 0, 3 * M * Dv, 2 * M * Dv * s.size), moved)


def backward_keys(s: Shape, c: Config) -> Work:
    """Go over the rows of all heads of the group, for a block of keys. Of wide heads dv is made elsewhere."""
    M, N, D, Dv = c.block_m, c.block_n, padded(s.D), padded(s.Dv)
    scores = (Product(N, M, D, feeds=True), Product(N, M, Dv, feeds=True))
    products = (*scores, Product(N, D, M), *(() if made_apart(s.D, s.Dv) else (Product(N, Dv, M),)))
    extra = _addends(s) + (1 if s.temperatures else 0)
    scaled = M * D if s.temperatures else 0  # queries by their temperature, in every tile
    loads = M * (s.features * s.size + 2 * FLOAT) + _penalty_tile(s, M, N)
    tile = Tile(products, M * N, round((4 + extra) * M * N) + scaled, loads)
    return _by_keys(s, c, s.B * s.Hkv, s.H // s.Hkv, tile, _backward_memory(s) + _penalty(s))


def backward_values(s: Shape, c: Config) -> Work:
    """Go over the same rows, for dv alone."""
    work, M, N = backward_keys(s, c), c.block_m, c.block_n
    products = (Product(N, M, padded(s.D), feeds=True), Product(N, padded(s.Dv), M))
    return work._replace(tile=work.tile._replace(products=products))


def backward_queries(s: Shape, c: Config) -> Work:
    """Go over the keys of a block of rows."""
    M, N, D, Dv = c.block_m, c.block_n, padded(s.D), padded(s.Dv)
    products = (Product(M, N, D, feeds=True), Product(M, N, Dv, feeds=True), Product(M, D, N))
    extra = _addends(s) + (1 if s.temperatures else 0)
    loads = N * s.features * s.size + _penalty_tile(s, M, N)
    tile = Tile(products, M * N, round((3.5 + extra) * M * N), loads)
    return _by_rows(s, c, s.B * s.H, tile, _backward_memory(s) + _penalty(s))


def votes(s: Shape, c: Config) -> Work:
    """Sum votes down a block of keys; one head. The sum is a product with a triangle, in tf32: half as fast."""
    M, N, D = c.block_m, c.block_n, padded(s.D)
    products = (Product(M, N, D, feeds=True), Product(M, N, 2 * M))
    written = _penalty_tile(s, M, N)
    tile = Tile(products, 0, 8 * M * N, M * D * s.size + written)
    return _by_keys(s, c, s.B, 1, tile, s.B * 2 * s.L * s.D * s.size + _penalty(s))


def backward_logits(s: Shape, c: Config) -> Work:
    """Go over all heads, for a tile of pairs."""
    M, N, D, Dv = c.block_m, c.block_n, padded(s.D), padded(s.Dv)
    loads = (M + N) * s.features * s.size + M * 2 * FLOAT
    # Per pair: two fma of the exponent, less the row's sum, fma into the sum over heads.
    tile = Tile((Product(M, N, D), Product(M, N, Dv)), M * N, 4 * M * N, loads)
    memory = s.size * (s.B * s.H * s.L + s.B * s.Hkv * s.S) * (s.D + s.Dv) + 2 * _penalty(s)
    pairs = _by_rows(s, c, s.B, tile, memory)
    return pairs._replace(programs=round(pairs.tiles), tiles=s.H * pairs.tiles, longest=s.H, shortest=s.H)


def backward_votes(s: Shape, c: Config) -> Work:
    """Walk up a block of keys; one head. The sum over later rows is a product in tf32, half as fast."""
    M, N, D = c.block_m, c.block_n, padded(s.D)
    products = (Product(M, N, D, feeds=True), Product(M, N, 2 * M, feeds=True), Product(N, D, M))
    tile = Tile(products, 0, 10 * M * N, M * D * s.size + 2 * _penalty_tile(s, M, N))
    whole = replace(s, dead=0.0)
    return _by_keys(whole, c, s.B, 1, tile, s.B * 2 * s.L * s.D * s.size + 2 * _penalty(s))


def backward_shared(s: Shape, c: Config) -> Work:
    """Go over all rows as queries and as keys of a block."""
    M, N, D, Dv = c.block_m, c.block_n, padded(s.D), padded(s.Dv)
    values = Product(M, N, Dv, feeds=True)
    products = (Product(M, N, D, feeds=True), values, values, Product(M, Dv, N), Product(M, D, N))
    tile = Tile(products, 2 * M * N, 8 * M * N, N * ((s.features + padded(s.Dv)) * s.size + 2 * FLOAT))
    return _by_rows(s, c, s.B * s.H, tile, _backward_memory(s))


def live(s: Shape, c: Config) -> Work:
    """Look at the rows from which on keys count for nothing, once per block of rows."""
    blocks = -(-s.L // c.block_m)
    tile = Tile((), 0, 2 * s.S, 4 * s.S)
    return Work(s.B * blocks, s.B * blocks, 1, 1, tile, 4.0 * s.B * s.S)


def decode(s: Shape, c: Config) -> Work:
    """Read the keys of a split for all queries of a group. A step of selective attention reads and writes votes."""
    M, N, D, Dv = c.block_m, c.block_n, padded(s.D), padded(s.Dv)
    blocks = -(-s.H // s.Hkv * s.L // M)
    steps = -(-s.S // s.parts // N)
    products = (Product(M, N, D, feeds=True), Product(M, Dv, N))
    votes = 2 * FLOAT if s.penalty else 0
    tile = Tile(products, M * N, 6 * M * N, N * (s.features * s.size + votes))
    programs = s.B * s.Hkv * s.parts * blocks
    parts = FLOAT * s.B * s.H * s.L * s.parts * (s.Dv + 1)
    moved = s.B * s.S * (s.Hkv * (s.D + s.Dv) * s.size + votes) + parts
    return Work(programs, programs * steps, steps, steps, tile, moved)


def merge(s: Shape, c: Config) -> Work:
    """Read the parts of a row."""
    programs = -(-s.B * s.H * s.L // c.block_m)
    tile = Tile((), c.block_m, 4 * c.block_m * padded(s.Dv), FLOAT * c.block_m * (s.Dv + 1))
    moved = s.B * s.H * s.L * (FLOAT * s.parts * (s.Dv + 1) + s.Dv * s.size)
    return Work(programs, programs * s.parts, s.parts, s.parts, tile, moved)


WORK: dict[str, Callable[[Shape, Config], Work]] = {
    "forward": forward,
    "delta": delta,
    "backward_keys": backward_keys,
    "backward_values": backward_values,
    "backward_queries": backward_queries,
    "backward_shared": backward_shared,
    "decode": decode,
    "merge": merge,
    "votes": votes,
    "live": live,
    "backward_logits": backward_logits,
    "backward_votes": backward_votes,
}
"""By the kernel's name in ``kernels/dense/catalogue.py``."""


def _addends(s: Shape) -> int:
    """Return the operations per pair that a penalty takes: widen, fma."""
    return 2 if s.penalty else 0


def _penalty_tile(s: Shape, M: int, N: int) -> int:
    return M * N * max(_HALF, s.size if s.bits == 32 else 0) if s.penalty else 0


def _penalty(s: Shape) -> float:
    """Return the bytes of the visible part of a penalty."""
    return float(s.B * s.pairs * (FLOAT if s.bits == 32 else _HALF)) if s.penalty else 0.0


def _backward_memory(s: Shape) -> float:
    rows, keys = s.B * s.H * s.L, s.B * s.Hkv * s.S
    return float(s.size * (rows + 2 * keys) * (s.D + s.Dv) + 2 * FLOAT * rows)


def _by_rows(s: Shape, c: Config, heads: int, tile: Tile, memory: float) -> Work:
    total, longest, shortest, blocks = _tiles(
        seen_by_rows, s.L, s.S, s.offset, s.causal, s.window, c.block_m, c.block_n
    )
    return Work(heads * blocks, heads * total * (1 - s.dead), longest, shortest, tile, memory)


def _by_keys(s: Shape, c: Config, groups: int, inner: int, tile: Tile, memory: float) -> Work:
    total, longest, shortest, blocks = _tiles(seeing_keys, s.S, s.L, s.offset, s.causal, s.window, c.block_n, c.block_m)
    tiles = groups * inner * total * (1 - s.dead)
    return Work(groups * blocks, tiles, inner * longest, inner * shortest, tile, memory)


Span = Callable[[int, int, int, int, bool, int | None], tuple[int, int]]


def seen_by_rows(first: int, last: int, keys: int, offset: int, causal: bool, window: int | None) -> tuple[int, int]:
    """Return the keys [low, high) that some row of ``first`` to ``last`` sees."""
    low = 0 if window is None else max(0, first + offset - window + 1)
    return low, min(keys, last + offset + 1) if causal else keys


def seeing_keys(first: int, last: int, rows: int, offset: int, causal: bool, window: int | None) -> tuple[int, int]:
    """Return the rows [low, high) that see some key of ``first`` to ``last``."""
    high = rows if window is None else min(rows, last + window - offset)
    return max(0, first - offset) if causal else 0, high


def _clipped(first: int, count: int, most: int) -> int:
    """Return the sum of so many whole numbers from ``first`` on, each taken as at least 0 and at most ``most``."""

    def up_to(last: int) -> int:
        rising = min(max(last, 0), most)
        return rising * (rising + 1) // 2 + max(0, last - most) * most

    return up_to(first + count - 1) - up_to(first - 1)


@functools.lru_cache(maxsize=4096)
def _tiles(
    span: Span, outer: int, inner: int, offset: int, causal: bool, window: int | None, block: int, step: int
) -> tuple[int, int, int, int]:
    """Return the tiles of all blocks together, of the longest and of the shortest block, and the number of blocks."""
    counts = []
    for first in range(0, outer, block):
        low, high = span(first, min(outer, first + block) - 1, inner, offset, causal, window)
        counts.append(max(0, -(-high // step) - low // step) if high > low else 0)
    return sum(counts), max(counts, default=0), min(counts, default=0), len(counts)
