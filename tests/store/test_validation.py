"""A thousand records that nobody should believe: none is taken, none is raised."""

import hashlib
import json
import random
import string
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_support import CONFIG, SPACE, Nothing, key, record, store

from attnrewrite.errors import AttnRewriteWarning
from attnrewrite.kernels.store.key import canonical, pairs
from attnrewrite.kernels.store.misses import missed
from attnrewrite.kernels.store.record import Record
from attnrewrite.kernels.store.validation import Refusal, read

SECRET = b"of the team"


def changed(data, **changes):
    return canonical({**json.loads(data), **changes})


def inside(data, *path, value):
    plain = inner = json.loads(data)
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return canonical(plain)


GOOD = record().data
HOSTILE = {
    "empty": b"",
    "no JSON": b"\x00\xff",
    "a list": b"[]",
    "a number": b"1",
    "deep": b"[" * 4000,
    "deep objects": b'{"a":' * 800,
    "huge": b" " * 5000,
    "truncated": GOOD[:-20],
    "not a number": GOOD.replace(b'"noise":0.01', b'"noise":NaN'),
    "infinite": GOOD.replace(b'"noise":0.01', b'"noise":1e999'),
    "negative": inside(GOOD, "noise", value=-1),
    "many digits": GOOD.replace(b'"revision":1', b'"revision":' + b"9" * 1000),
    "true for a number": inside(GOOD, "revision", value=True),
    "version 2": changed(GOOD, version=2),
    "no version": canonical({k: v for k, v in json.loads(GOOD).items() if k != "version"}),
    "field too many": changed(GOOD, extra=1),
    "field twice": GOOD.replace(b'{"key"', b'{"noise":0,"key"', 1),
    "spaces": GOOD + b"\n",
    "no timings": changed(GOOD, timings=[]),
    "timings of another kind": changed(GOOD, timings={"a": 1}),
    "winner not timed": changed(GOOD, winner={"block_m": 1}),
    "winner failed": inside(GOOD, "timings", 0, "status", value="failed"),
    "status unknown": inside(GOOD, "timings", 0, "status", value="fast"),
    "quantiles out of order": inside(GOOD, "timings", 0, "p20", value=9.0),
    "no median": inside(GOOD, "timings", 0, "median", value=None),
    "escapes for a terminal": inside(GOOD, "key", "kernel", value="\x1b[2J"),
    "escapes in a name": changed(GOOD, origin={"\x1b]0;": "x"}),
    "family is a path": inside(GOOD, "key", "family", value="../../.."),
    "device is no object": inside(GOOD, "key", "device", value="NVIDIA H200"),
    "device lacks facts": inside(GOOD, "key", "device", value={"name": "NVIDIA H200"}),
    "dtypes are text": inside(GOOD, "key", "dtypes", value="bf16"),
    "config of lists": inside(GOOD, "timings", 0, "config", value={"block_m": [1]}),
    "signature is a number": changed(GOOD, signature=1),
    "signature is not ASCII": changed(GOOD, signature="ä"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_content_is_refused(data):
    assert isinstance(read(data, secret=SECRET), Refusal)
    if data != HOSTILE["signature is not ASCII"]:  # text like any other one, without a secret
        assert isinstance(read(data), Refusal)


def test_reasons_are_told_apart():
    signed = record().signed(SECRET)
    assert read(b" " * 4097) == Refusal.LARGE
    assert read(GOOD[:-1]) == Refusal.TRUNCATED
    assert read(changed(GOOD, noise=0.5), record().path) == Refusal.TAMPERED
    assert read(HOSTILE["version 2"]) == Refusal.VERSION
    assert read(HOSTILE["field too many"]) == Refusal.FORM
    assert read(GOOD, record().path.replace("h200", "h100")) == Refusal.PLACE
    assert read(GOOD, secret=SECRET) == Refusal.SIGNATURE
    assert read(signed.data, secret=b"of others") == Refusal.SIGNATURE
    assert read(changed(signed.data, noise=0.5), secret=SECRET) == Refusal.SIGNATURE
    assert read(signed.data, signed.path, SECRET) == signed
    assert read(signed.data, signed.path) == signed  # who has no secret, asks for no signature


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # threads that other tests left waiting do
@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    ).map(lambda plain: json.dumps(plain).encode())
)
def test_anything_may_stand_in_a_file(data):
    assert isinstance(read(data), Refusal)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(json.loads(GOOD))),
    st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()),
)
def test_any_field_may_hold_anything(name, value):
    found = read(changed(GOOD, **{name: value}))
    assert isinstance(found, Refusal) or found.to_json()[name] == value


def hostile(count, seed=0):
    """Yield paths and contents of records that are broken in one of many ways; most names fit the content."""
    draw = random.Random(seed)
    good = record().signed(SECRET)
    for number in range(count):
        data = bytearray(good.data)
        kind = number % 6
        if kind == 0:
            data = data[: draw.randrange(len(data))]
        elif kind == 1:
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.choice(string.printable.encode())
            data = data if bytes(data) != good.data else data[1:]
        elif kind == 2:
            data = changed(good.data, version=draw.randint(2, 10**9))
        elif kind == 3:
            data = record(ms=draw.random()).signed(draw.randbytes(8)).data
        elif kind == 4:
            outside = tuple((name, draw.randint(129, 10**6)) for name, _ in CONFIG)
            timing = replace(record().timings[0], config=outside)
            data = record(winner=outside, timings=(timing,)).signed(SECRET).data
        else:
            data = draw.randbytes(draw.randint(0, 5000))
        named = bytes(data) if draw.random() < 0.8 else draw.randbytes(8)
        yield f"{good.key.folder}/{hashlib.sha256(named).hexdigest()}.json", bytes(data)


def test_a_thousand_hostile_records_are_left_aside(tmp_path):
    here = store(tmp_path, secret=SECRET)
    good = record().signed(SECRET)
    given = dict(hostile(1000))
    for path, data in given.items():
        here.local.write(path, data)
    with pytest.warns(AttnRewriteWarning, match="AR513"):
        assert here.find(key(), SPACE) is None
    assert here.refused.keys() == given.keys()
    assert len(given) > 990
    here.local.write(good.path, good.data)
    fresh = store(tmp_path, secret=SECRET)
    with pytest.warns(AttnRewriteWarning, match="AR513"):
        assert fresh.find(key(), SPACE).record == good


def test_every_hostile_record_is_refused_by_itself():
    accepted = [found for path, data in hostile(1000, 1) if isinstance(found := read(data, path, SECRET), Record)]
    assert all(not SPACE.valid(dict(found.winner)) for found in accepted)
    assert len(accepted) <= 1000 // 6 + 1  # those outside the space, which the store asks


def test_winner_outside_the_space_is_refused(tmp_path):
    store(tmp_path).put(record())
    here = store(tmp_path)
    with pytest.warns(AttnRewriteWarning, match="outside the space"):
        assert here.find(key(), Nothing()) is None
    assert list(here.refused.values()) == [Refusal.SPACE]
    assert here.timings(key(), Nothing()) == {}


@pytest.mark.parametrize("config", [{"tile": 1}, {"block_m": "wide"}, {"block_m": True}])
def test_winner_that_the_space_cannot_read_is_outside_of_it(tmp_path, config):
    class Careless(Nothing):
        def valid(self, config):
            return config["block_m"] + 16 > 100

    timing = replace(record().timings[0], config=pairs(config))
    store(tmp_path).put(record(timings=(timing,), winner=timing.config))
    with pytest.warns(AttnRewriteWarning, match="outside the space"):
        assert store(tmp_path).find(key(), Careless()) is None


def test_notes_of_misses_may_hold_anything(tmp_path):
    folder = tmp_path / "missed"
    folder.mkdir()
    for number, data in enumerate(HOSTILE.values()):
        (folder / f"{number}.json").write_bytes(data)
    assert missed(tmp_path) == []
