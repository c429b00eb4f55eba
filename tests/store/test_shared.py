"""What one machine has tuned, the next one finds: in a folder, in memory, in Redis and in S3."""

import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from store_support import SPACE, Space, free_port, key, many, record, run_python, silent_server, store

from attnrewrite.errors import AttnRewriteError, AttnRewriteWarning
from attnrewrite.kernels.store.behind import Shared
from attnrewrite.kernels.store.breaker import IN_ALL, IN_VAIN, Breaker
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.modes import Mode
from attnrewrite.kernels.store.place import open_place
from attnrewrite.kernels.store.upkeep import transfer

ADDED = 0.5
"""Seconds that a shared store that is down or slow may add to the start of a process."""


def patient(url):
    """A shared store on a machine that is busy with other tests."""
    return Shared(url, Breaker(in_vain=30, in_all=60))


def test_second_machine_finds_everything(shared_url, tmp_path):
    first = store(tmp_path / "first", patient(shared_url))
    made = list(many(8))
    for each in made:
        assert first.find(each.key, SPACE) is None
        first.put(each)
    first.shared.flush()
    second = store(tmp_path / "second", patient(shared_url))
    assert [second.find(each.key, SPACE).tier for each in made] == ["shared"] * len(made)
    assert set(second.timings(made[0].key, SPACE)) == {timing.config for timing in made[0].timings}
    third = store(tmp_path / "second")  # filled behind the second
    assert [third.find(each.key, SPACE).tier for each in made] == ["local"] * len(made)


def test_records_go_to_and_fro(shared_url, tmp_path):
    local, place, other = Folder(tmp_path / "here"), open_place(shared_url), Folder(tmp_path / "there")
    assert list(place.paths()) == []
    made = [record(), record(key(8192)), record(ms=2.0)]
    for each in made:
        local.write(each.path, each.data)
    nothing = partial(transfer, local, place, b"", tick=lambda: None)
    assert len(nothing(dry_run=True).new) == 3
    assert list(place.paths()) == []
    assert len(nothing(dry_run=False).new) == 3
    assert (again := nothing(dry_run=False)).present == 3
    assert again.new == []
    assert sorted(place.paths()) == sorted(each.path for each in made)
    assert place.read(made[0].path) == made[0].data
    assert place.fetch(record().key.folder).keys() == {made[0].path, made[2].path}
    assert sorted(transfer(place, other, b"", dry_run=False, tick=lambda: None).new) == sorted(place.paths())
    assert list(other.paths()) == list(local.paths())


def test_broken_records_of_a_shared_store_are_not_taken(shared_url, tmp_path):
    place = open_place(shared_url)
    place.write(record().path, record().data[:100])
    place.write(f"{key().folder}/{'0' * 64}.json", b"x" * 100_000)
    place.write(record(ms=2.0).path, record(ms=2.0).data)
    here = store(tmp_path, patient(shared_url), secret=b"secret")
    with pytest.warns(AttnRewriteWarning, match="AR513"):
        assert here.find(key(), SPACE) is None
    assert len(here.refused) == 3
    assert list(here.local.paths()) == []
    done = transfer(place, here.local, b"", dry_run=False, tick=lambda: None)
    assert done.new == [record(ms=2.0).path]
    assert done.refused.total() == 2


@pytest.mark.parametrize("shared_url", ["folder", "redis", "s3"], indirect=True)
def test_records_are_sent_when_the_process_ends(shared_url, tmp_path):
    code = "from store_support import *; from attnrewrite.kernels.store.settings import default_store\n"
    code += "here = default_store()\nfor each in many(5): here.put(each)"
    run_python(code, ATTNREWRITE_CACHE_URL=shared_url, ATTNREWRITE_CACHE_DIR=str(tmp_path / "a"))
    assert len(list(open_place(shared_url).paths())) == 5


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def web(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_web_server_is_read_and_not_written(tmp_path):
    store(tmp_path / "team").put(record())
    with web(tmp_path / "team") as url:
        here = store(tmp_path / "here", patient(url))
        assert here.find(key(8), SPACE) is None
        assert here.find(key(), SPACE).tier == "shared"
        here.put(record(key(1024)))
        here.shared.flush()
        assert list(open_place(url).paths()) == [record().path]


def test_offline_asks_nobody(tmp_path):
    shared = tmp_path / "shared"
    here = store(tmp_path / "here", Shared(str(shared)), Mode(offline=True))
    here.put(record())
    here.shared.flush()
    assert not shared.exists()
    store(shared).put(record(key(kernel="delta")))
    assert here.find(key(kernel="delta"), SPACE) is None


def test_readonly_fills_nothing(tmp_path):
    store(tmp_path / "shared").put(record())
    here = store(tmp_path / "here", Shared(str(tmp_path / "shared")), Mode(readonly=True))
    assert here.find(key(), SPACE).tier == "shared"
    assert not (tmp_path / "here").exists()


class Slow(Folder):
    """A store that takes its time; ``seconds`` for each answer."""

    def __init__(self, root, seconds):
        super().__init__(root)
        self.seconds, self.asked = seconds, 0

    def fetch(self, folder):
        self.asked += 1
        time.sleep(self.seconds)
        return super().fetch(folder)


def slow(root, seconds):
    shared = Shared(str(root))
    shared._place = Slow(root, seconds)
    return shared


def waited(here, made):
    """Look records up, and return the seconds for which the shared store was waited for."""
    taken = 0.0
    fetch = here.shared.fetch

    def timed(folder):
        nonlocal taken
        start = time.monotonic()
        try:
            return fetch(folder)
        finally:
            taken += time.monotonic() - start

    here.shared.fetch = timed
    for each in made:
        here.find(each.key, SPACE)
    return taken


@pytest.mark.parametrize("seconds", [0.06, 0.15, 0.3, 5.0])
def test_slow_store_without_what_is_wanted_costs_a_limited_time(tmp_path, seconds):
    here = store(tmp_path / "here", slow(tmp_path / "team", seconds))
    with pytest.warns(AttnRewriteWarning, match="AR514"):
        waited(here, many(40))
    asked = here.shared._place.asked
    assert asked <= 1 + IN_VAIN / seconds
    here.find(key(), SPACE)
    assert here.shared._place.asked == asked


def test_slow_store_is_waited_for_as_long_as_it_has_what_is_wanted(tmp_path):
    for each in many(30):
        store(tmp_path / "team").put(each)
    here = store(tmp_path / "here", slow(tmp_path / "team", 0.15))
    with pytest.warns(AttnRewriteWarning, match="AR514"):
        waited(here, many(30))
    assert IN_VAIN / 0.15 + 1 < here.shared._place.asked <= 1 + IN_ALL / 0.15
    found = [here.find(each.key, SPACE) for each in many(30)]
    assert sum(each is not None and each.tier == "shared" for each in found) >= 8


def test_prompt_store_is_asked_for_every_key(tmp_path):
    here = store(tmp_path / "here", slow(tmp_path / "team", 0.0))
    waited(here, many(200))
    assert here.shared._place.asked == 200


@pytest.mark.parametrize("kind", ["redis", "s3", "http"])
@pytest.mark.parametrize("state", ["nobody listens", "nobody answers"])
def test_store_that_is_down_costs_a_limited_time(tmp_path, monkeypatch, kind, state):
    pytest.importorskip({"redis": "redis", "s3": "s3fs", "http": "aiohttp"}[kind])
    with silent_server() as port:
        port = port if state == "nobody answers" else free_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        url = {"redis": f"redis://:pass@127.0.0.1:{port}", "s3": "s3://team", "http": f"http://127.0.0.1:{port}"}[kind]
        here = store(tmp_path, Shared(url))
        here.shared._open()  # imports of its packages, once per process, are no waiting
        with pytest.warns(AttnRewriteWarning, match="AR514") as warned:
            assert waited(here, many(20)) <= ADDED
        assert "pass@" not in str(warned[0].message)
        start = time.monotonic()
        for each in many(3):
            here.put(each)
        here.shared.flush()
        assert time.monotonic() - start < ADDED
    assert store(tmp_path).find(next(many(1)).key, SPACE).tier == "local"


@pytest.mark.parametrize("url", ["nonsense://host/x", "redis://host:port/x", "s3://"])
def test_address_that_is_none_is_a_warning(tmp_path, url):
    if url.startswith("redis"):
        pytest.importorskip("redis")
    if url.startswith("s3"):
        pytest.importorskip("s3fs")
    here = store(tmp_path, Shared(url))
    with pytest.warns(AttnRewriteWarning, match="AR514"):
        assert here.find(key(), SPACE) is None
    here.put(record())
    assert here.find(key(), SPACE).tier == "memory"


def test_address_that_is_none_is_an_error_where_it_is_asked_for():
    with pytest.raises(AttnRewriteError, match="nonsense") as caught:
        open_place("nonsense://user:secret@host/x")
    assert caught.value.code == "AR514"
    assert "secret" not in str(caught.value)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "redis", None)
    monkeypatch.delitem(__import__("sys").modules, "attnrewrite.kernels.store.redis", raising=False)
    with pytest.raises(AttnRewriteError, match=r"attnrewrite\[redis\]") as caught:
        open_place("redis://host")
    assert caught.value.code == "AR106"


def test_wrong_credentials_are_a_warning_without_the_password(redis_url, tmp_path):
    here = store(tmp_path, Shared(redis_url.replace("//", "//somebody:password@")))
    with pytest.warns(AttnRewriteWarning, match="AR514") as warned:
        assert here.find(key(), SPACE) is None
    assert "password@" not in str(warned[0].message)


def test_bucket_that_is_not_there_is_a_warning(s3_url, tmp_path):
    here = store(tmp_path, Shared("s3://nobody-made-this-bucket/x", Breaker(in_vain=30, in_all=60)))
    assert here.find(key(), Space()) is None  # nothing lies there
    here.put(record())
    here.shared.flush()
    assert Path(tmp_path / record().path).exists()
