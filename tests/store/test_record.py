from dataclasses import replace
from itertools import permutations

import pytest
from store_support import CONFIG, SLOWER, key, record

from attnrewrite.kernels.store.key import pairs
from attnrewrite.kernels.store.pack import pack, unpack
from attnrewrite.kernels.store.record import LARGEST, Timing, best, union
from attnrewrite.kernels.store.validation import read


def timings(count):
    return tuple(
        Timing(pairs({"block_m": 64, "block_n": n, "warps": 8, "stages": 3}), "ok", 1.0, 0.9, 1.1, 20, 128, 0, 65536)
        for n in range(count)
    )


def test_record_is_read_back_as_it_was():
    given = record(timings=(*record().timings, Timing(pairs({"block_m": 16}), "pruned", spills=12)))
    assert read(given.data, given.path) == given


def test_path_names_family_device_key_and_content():
    version, family, device, digest, name = record().path.split("/")
    assert (version, family, device, digest) == ("v1", "dense", "nvidia-h200", key().digest)
    assert name.endswith(".json")
    assert record(ms=2.0).path != record().path
    assert record().path == record().path


def test_large_record_is_split_and_nothing_is_lost():
    given = record(timings=timings(200), winner=timings(200)[7].config)
    for secret in (b"", b"secret"):
        parts = list(given.pieces(secret))
        assert len(parts) > 1
        assert all(len(part.data) <= LARGEST for part in parts)
        assert all(read(part.data, part.path, secret) == part for part in parts)
        assert union(parts) == union([given])
        assert {part.winner for part in parts} == {given.winner}


def test_record_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="at most 4096"):
        list(record(origin=pairs({"torch": "x" * 5000})).pieces())


def test_union_does_not_depend_on_the_order():
    first = record()
    second = replace(record(ms=3.0), revision=2)
    third = record(timings=(Timing(CONFIG, "ok", 5.0, 5.0, 5.0, 40), Timing(pairs({"block_m": 16}), "failed")))
    found = {tuple(sorted(union(order).items(), key=str)) for order in permutations((first, second, third))}
    assert len(found) == 1
    assert {best(order) for order in permutations((first, second, third))} == {second}
    merged = union((first, second, third))
    assert merged[CONFIG].median == 3.0  # the later revision
    assert merged[SLOWER].median == 6.0
    assert pairs({"block_m": 16}) in merged


def test_no_clock_decides_which_record_counts():
    future = record(time=2**40)
    assert best((future, replace(record(), revision=2))).revision == 2


def test_pack_is_the_same_for_the_same_records_and_merges_by_lines():
    one, two = record(), record(key(8192))
    assert pack((one, two)) == pack((two, one, two))
    assert set(unpack(pack((one, two)))) == {one, two}
    assert pack(unpack(pack((one,)) + pack((two,)) + b"\n")) == pack((one, two))
