from unittest import mock

import pytest
from store_support import H100, SPACE, key, record, store

from attnrewrite.errors import AttnRewriteError
from attnrewrite.kernels.store import settings, tiers
from attnrewrite.kernels.store.bundled import bundled
from attnrewrite.kernels.store.key import pairs
from attnrewrite.kernels.store.misses import missed
from attnrewrite.kernels.store.modes import Mode, from_environment, parse
from attnrewrite.kernels.store.pack import pack


def test_words_of_a_mode():
    assert parse("") == Mode()
    assert parse("quick, offline") == Mode("quick", offline=True)
    assert parse("full,readonly,refresh,strict") == Mode("full", readonly=True, refresh=True, strict=True)
    with pytest.raises(AttnRewriteError, match="did you mean 'offline'") as caught:
        parse("ofline")
    assert caught.value.code == "AR102"


def test_ranks_read_unless_told_otherwise():
    assert not from_environment({}).readonly
    assert not from_environment({"WORLD_SIZE": "1"}).readonly
    assert from_environment({"WORLD_SIZE": "8"}) == Mode(readonly=True)
    assert from_environment({"WORLD_SIZE": "8", "ATTNREWRITE_AUTOTUNE": "quick"}) == Mode("quick")


def test_ranks_say_how_to_tune_before(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    here = settings.default_store()
    with mock.patch.object(tiers.log, "warning") as said:
        for length in (1024, 65536):
            assert here.find(key(length), SPACE) is None
    said.assert_called_once()
    assert "attnrewrite tune" in said.call_args.args[0]
    here.put(record())
    assert here.find(key(), SPACE).tier == "memory"
    assert not (tmp_path / "cache").exists()


def test_off_looks_nowhere(tmp_path):
    store(tmp_path).put(record())
    assert store(tmp_path, mode=Mode("off")).find(key(), SPACE) is None


def test_readonly_writes_nothing(tmp_path):
    here = store(tmp_path / "store", mode=Mode("full", readonly=True))
    assert here.find(key(), SPACE) is None
    here.put(record())
    assert here.find(key(), SPACE).tier == "memory"
    assert not (tmp_path / "store").exists()


def test_strict_names_the_fields_that_differ(tmp_path):
    here = store(tmp_path, mode=Mode(strict=True))
    with pytest.raises(AttnRewriteError, match="nothing like it is stored") as caught:
        here.find(key(), SPACE)
    assert caught.value.code == "AR511"
    store(tmp_path).put(record())
    assert here.find(key(4000), SPACE).tier == "local"  # the same bucket
    for _ in range(2):
        fresh = store(tmp_path, mode=Mode(strict=True))
        with pytest.raises(
            AttnRewriteError, match=r"triton: wanted 3.6.0, stored 3.7.1; bucket.L: wanted 13, stored 12"
        ):
            fresh.find(key(8192, triton="3.6.0"), SPACE)


def test_first_answer_holds_for_the_process(tmp_path):
    here = store(tmp_path)
    assert here.find(key(), SPACE) is None
    store(tmp_path).put(record())
    assert here.find(key(), SPACE) is None
    assert store(tmp_path).find(key(), SPACE).tier == "local"


def test_near_record_is_the_nearest_and_is_called_near(tmp_path):
    wanted = key(4096)
    stored = {
        "bucket": key(8192),
        "buckets": key(2**17),
        "device": key(device=H100),
        "triton": key(triton="3.6.0"),
        "source": key(source="aa" * 32),
    }
    order = ("bucket", "device", "buckets", "triton", "source")
    for name in reversed(order):
        store(tmp_path).put(record(stored[name]))
        found = store(tmp_path).find(wanted, SPACE)
        assert found.tier == "near"
        assert found.record.key == stored[name]


@pytest.mark.parametrize(
    "other",
    [
        key(kernel="delta"),
        key(target="sm_100"),
        key(dtypes=("fp16",)),
        key(dims=pairs({"D": 128})),
        key(flags=()),
        key(deterministic=False),
    ],
    ids=["kernel", "target", "dtypes", "dims", "flags", "deterministic"],
)
def test_record_of_another_kind_is_not_near(tmp_path, other):
    store(tmp_path).put(record(other))
    assert store(tmp_path).find(key(), SPACE) is None


def test_near_record_replaces_nothing(tmp_path):
    store(tmp_path).put(record(key(8192)))
    here = store(tmp_path)
    assert here.find(key(), SPACE).tier == "near"
    here.put(record())
    assert here.find(key(), SPACE).tier == "memory"
    assert store(tmp_path).find(key(), SPACE).tier == "local"


def test_misses_are_noted_until_they_are_tuned(tmp_path):
    here = store(tmp_path)
    here.find(key(), SPACE)
    assert missed(tmp_path) == [key()]
    here.put(record())
    assert missed(tmp_path) == []


def test_bundled_records_come_after_those_of_the_user(tmp_path):
    packs = tmp_path / "packs"
    packs.mkdir()
    (packs / "dense.jsonl").write_bytes(b"broken\n" + pack([record(ms=1.0), record(key(8192))]))
    assert bundled("dense", packs)[key()] == record(ms=1.0)
    assert bundled("other", packs) == {}
    here = store(tmp_path / "store", secret=b"secret", packs=packs)
    assert here.find(key(), SPACE).tier == "bundled"
    assert here.find(key(16384), SPACE).record.key == key(8192)
    store(tmp_path / "store", secret=b"secret").put(record(ms=2.0))
    fresh = store(tmp_path / "store", secret=b"secret", packs=packs)
    assert fresh.find(key(), SPACE).tier == "local"


def test_environment_makes_the_store(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNREWRITE_CACHE_URL", str(tmp_path / "shared"))
    monkeypatch.setenv("ATTNREWRITE_CACHE_SECRET", "secret")
    monkeypatch.setenv("ATTNREWRITE_AUTOTUNE", "quick,strict")
    here = settings.default_store()
    assert here.local.root == tmp_path / "cache" / "tuning"
    assert here.shared.address == str(tmp_path / "shared")
    assert here.secret == b"secret"
    assert here.mode == Mode("quick", strict=True)
