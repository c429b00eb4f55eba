"""``attnrewrite cache`` on small stores."""

import json

import pytest
from store_support import H100, SPACE, key, record, store

from attnrewrite.env import environment
from attnrewrite.kernels.store.settings import default_store


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A store of its own with two keys, and one that was missed."""
    for name in ("ATTNREWRITE_CACHE_URL", "ATTNREWRITE_CACHE_SECRET", "ATTNREWRITE_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "cache"))
    default_store.cache_clear()
    made = store(tmp_path / "cache" / "tuning")
    made.put(record())
    made.put(record(key(kernel="delta", device=H100)))
    made.find(key(triton="3.6.0"), SPACE)
    yield made
    default_store.cache_clear()


def test_ls(run, run_json):
    code, out, _ = run("cache", "ls")
    assert code == 0
    assert "nvidia-h200" in out
    assert "2 keys in" in out
    rows = run_json("cache", "ls")[1]["rows"]
    assert {(row["family"], row["device"], row["keys"]) for row in rows} == {
        ("dense", "nvidia-h200", 1),
        ("dense", "nvidia-h100-80gb-hbm3", 1),
    }
    _, out, _ = run("cache", "ls", "--keys")
    assert key().digest[:12] in out
    assert "block_m 128" in out
    assert {row["digest"] for row in run_json("cache", "ls", "--keys")[1]["keys"]} >= {key().digest}


def test_empty_store(run, run_json, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "nothing"))
    for verb in ("ls", "why", "verify", "prune"):
        assert run("cache", verb)[0] == 0
    assert run_json("cache", "ls")[1]["rows"] == []
    assert not (tmp_path / "nothing").exists()


def test_show(run, run_json):
    code, out, _ = run("cache", "show", key().digest[:8])
    assert code == 0
    assert "device.l2_cache" in out
    assert "block_m 64" in out
    data = run_json("cache", "show", key().digest[:8])[1]
    assert data["winner"] == {"block_m": 128, "block_n": 64, "stages": 3, "warps": 8}
    assert len(data["timings"]) == 2
    for wrong in ("zz", ""):
        code, data = run_json("cache", "show", wrong)
        assert (code, data["error"]["code"]) == (1, "AR515")


def test_why_names_the_fields(run, run_json):
    code, out, _ = run("cache", "why")
    assert code == 0
    assert "triton: wanted 3.6.0, stored 3.7.1" in out
    (missed,) = run_json("cache", "why", key(triton="3.6.0").digest[:6])[1]["missed"]
    assert missed["nearest"][0]["differences"] == [{"field": "triton", "wanted": "3.6.0", "stored": "3.7.1"}]
    assert run_json("cache", "why", "zz")[1]["error"]["code"] == "AR515"


def test_pack_goes_from_machine_to_machine(run, run_json, monkeypatch, tmp_path):
    pack = tmp_path / "tuned.jsonl"
    assert run_json("cache", "export", pack)[1]["records"] == 2
    first = pack.read_bytes()
    assert run_json("cache", "export", pack)[1]["error"]["code"] == "AR601"
    assert run("cache", "export", pack, "--overwrite")[0] == 0
    assert pack.read_bytes() == first
    assert run_json("cache", "export", tmp_path / "none.jsonl", "--family", "other")[1]["records"] == 0
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "second"))
    assert len(run_json("cache", "import", pack, "--dry-run")[1]["new"]) == 2
    assert not (tmp_path / "second").exists()
    assert len(run_json("cache", "import", pack)[1]["new"]) == 2
    assert run_json("cache", "import", f"file://{pack}")[1]["present"] == 2
    assert store(tmp_path / "second" / "tuning").find(key(), SPACE).tier == "local"


def test_partial_download_is_taken_as_far_as_it_is_whole(run_json, run, monkeypatch, tmp_path):
    pack = tmp_path / "tuned.jsonl"
    run("cache", "export", pack)
    pack.write_bytes(pack.read_bytes()[:-100])
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "second"))
    code, data = run_json("cache", "import", pack)
    assert code == 0
    assert len(data["new"]) == 1
    assert data["refused"] == {"truncated, or no JSON": 1}
    pack.write_bytes(b"<html>not found</html>")
    assert run("cache", "import", pack)[0] == 4
    assert run_json("cache", "import", tmp_path / "missing.jsonl")[1]["error"]["code"] == "AR602"


def test_push_and_pull(run, run_json, monkeypatch, tmp_path):
    shared = tmp_path / "team"
    assert len(run_json("cache", "push", shared, "--dry-run")[1]["new"]) == 2
    assert not shared.exists()
    assert len(run_json("cache", "push", shared)[1]["new"]) == 2
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "second"))
    monkeypatch.setenv("ATTNREWRITE_CACHE_URL", str(shared))
    assert len(run_json("cache", "pull")[1]["new"]) == 2
    code, out, _ = run("cache", "pull")
    assert (code, out) == (0, f"0 records fetched from {shared}, 2 present already\n")


def test_secret_of_a_team(run_json, monkeypatch, tmp_path):
    run_json("cache", "push", tmp_path / "team")
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "second"))
    monkeypatch.setenv("ATTNREWRITE_CACHE_SECRET", "secret")
    code, data = run_json("cache", "pull", tmp_path / "team")
    assert (code, data["refused"]) == (4, {"without the right signature": 2})
    store(tmp_path / "team", secret=b"secret").put(record(key(8)))
    assert len(run_json("cache", "pull", tmp_path / "team")[1]["new"]) == 1


def test_address_is_asked_for_and_checked(run, run_json):
    assert run("cache", "push")[0] == 2
    code, data = run_json("cache", "pull", "nonsense://user:secret@host")
    assert (code, data["error"]["code"]) == (1, "AR514")
    assert "secret" not in json.dumps(data)


def test_store_that_is_down_is_an_error(run_json):
    pytest.importorskip("redis")
    code, data = run_json("cache", "push", "redis://:secret@127.0.0.1:1")
    assert (code, data["error"]["code"]) == (1, "AR514")
    assert "secret" not in json.dumps(data)


def test_verify_and_prune(run, run_json, here, tmp_path):
    assert run_json("cache", "verify") == (0, {"records": 2, "refused": []})
    path = here.local.root / record().path
    path.write_bytes(path.read_bytes()[:50])
    code, data = run_json("cache", "verify")
    assert (code, data["records"]) == (4, 2)
    assert data["refused"] == [{"path": record().path, "reason": "truncated, or no JSON"}]
    assert len(run_json("cache", "prune", "--dry-run")[1]["removed"]) == 1
    assert path.exists()
    code, out, _ = run("cache", "prune")
    assert (code, path.exists()) == (0, False)
    assert out.endswith("1 record removed\n")
    assert run_json("cache", "verify") == (0, {"records": 1, "refused": []})
    assert len(run_json("cache", "prune", "--older-than", 1)[1]["removed"]) == 1
    assert list(here.local.paths()) == []


@pytest.mark.parametrize("verb", ["ls", "show", "why", "export", "import", "push", "pull", "verify", "prune"])
def test_help_of_every_verb(run, verb):
    code, out, _ = run("cache", verb, "--help")
    assert code == 0
    assert f"attnrewrite cache {verb}" in out.partition("Examples:")[2]


def test_environment_keeps_secrets(monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_CACHE_SECRET", "a-word")
    monkeypatch.setenv("ATTNREWRITE_CACHE_URL", "redis://user:a-word@host:1/0")
    assert environment()["variables"]["ATTNREWRITE_CACHE_URL"] == "redis://***@host:1/0"
    assert "a-word" not in json.dumps(environment()["variables"])
