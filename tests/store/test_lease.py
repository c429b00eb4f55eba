import os
import subprocess
import sys

import pytest
from store_support import key, store

from attnrewrite.kernels.store.lease import lease
from attnrewrite.kernels.store.tiers import Store

TUNER = """
import sys, time
from store_support import SPACE, key, record, store
here = store(sys.argv[1])
missing = here.find(key(), SPACE) is None
with here.lease(key(), 60) as mine:
    if missing and mine and here.find(key(), SPACE) is None:
        time.sleep(0.2)
        here.put(record())
        print("tuned")
"""


def test_only_one_has_it(tmp_path):
    with lease(tmp_path, key(), 60) as first, lease(tmp_path, key(), 60) as second:
        assert (first, second) == (True, False)
        with lease(tmp_path, key(8192), 60) as other:
            assert other
    with lease(tmp_path, key(), 60) as again:
        assert again
    assert not list((tmp_path / "leases").iterdir())


def test_lease_of_a_process_that_was_killed_expires(tmp_path):
    with lease(tmp_path, key(), 60):
        (path,) = (tmp_path / "leases").iterdir()
        left = path.read_text()
    path.write_text(left)
    with lease(tmp_path, key(), 60) as early:
        assert not early
    now = path.stat().st_mtime
    os.utime(path, (now - 61, now - 61))
    with lease(tmp_path, key(), 60) as late:
        assert late


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_clock_of_another_machine_decides_nothing(tmp_path, monkeypatch, ahead):
    with lease(tmp_path, key(), 60):
        monkeypatch.setattr("time.time", lambda: 1_750_000_000 + ahead)
        with lease(tmp_path, key(), 60) as second:
            assert not second


def test_who_took_too_long_does_not_end_the_lease_of_the_next(tmp_path):
    with lease(tmp_path, key(), 60):
        (path,) = (tmp_path / "leases").iterdir()
        os.utime(path, (0, 0))
        with lease(tmp_path, key(), 60) as second:
            assert second
            held = path.read_text()
        path.write_text(held)
    assert path.read_text() == held


def test_where_nothing_can_be_written_everybody_may_tune(tmp_path):
    (tmp_path / "leases").write_text("")
    with lease(tmp_path, key(), 60) as first, lease(tmp_path, key(), 60) as second:
        assert first
        assert second
    with Store().lease(key(), 60) as alone:
        assert alone


def test_processes_tune_a_key_once(tmp_path):
    command = [sys.executable, "-P", "-c", TUNER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(6)]
    said = [process.communicate(timeout=100)[0] for process in running]
    assert said.count("tuned\n") == 1
    assert [process.returncode for process in running] == [0] * 6
    assert len(list(store(tmp_path).local.paths())) == 1
