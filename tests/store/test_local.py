"""Folders: whole files or none, also where writers are killed, the disk is full or nothing can be written."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_support import SPACE, Nothing, key, many, record, store

from attnrewrite.errors import AttnRewriteWarning
from attnrewrite.kernels.store.local import Folder
from attnrewrite.kernels.store.modes import Mode
from attnrewrite.kernels.store.record import Record
from attnrewrite.kernels.store.upkeep import broken, contents, removable
from attnrewrite.kernels.store.validation import read

WRITER = """
import sys
from store_support import key, record, store
here, number = store(sys.argv[1]), int(sys.argv[2])
for n in range(int(sys.argv[3]), int(sys.argv[4])):
    made = record(key(source=f"{n:064x}", kernel=f"kernel{number}"))
    here.put(made)
    print(here.find(made.key, None).record.path, flush=True)
"""


def start(root, log, number, first, last):
    command = [sys.executable, "-P", "-c", WRITER, str(root), str(number), str(first), str(last)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, env=environment)


def killed_writers(root, logs, processes, each, seed):
    """Let processes write records each, kill them at random and start them again; return what they have said."""
    draw = random.Random(seed)
    logs.mkdir()
    said = [[] for _ in range(processes)]
    left = set(range(processes))
    kills = 0
    while left:
        running = {number: start(root, logs / str(number), number, len(said[number]), each) for number in left}
        doomed = [number for number in sorted(left) if draw.random() < 0.6] if kills < 3 * processes else []
        for number in doomed:
            while not (logs / str(number)).stat().st_size and running[number].poll() is None:
                time.sleep(0.001)  # it has not begun
            time.sleep(draw.uniform(0, 0.02))
            running[number].send_signal(signal.SIGKILL)
            kills += 1
        for number, process in running.items():
            process.wait(timeout=300)
            said[number] += (logs / str(number)).read_text().split("\n")[:-1]  # the last line may be cut
        left = {number for number in left if len(said[number]) < each}
    return said, kills


@pytest.mark.parametrize(("processes", "each"), [(4, 40), pytest.param(16, 200, marks=pytest.mark.slow)])
def test_killed_writers_lose_nothing_and_break_nothing(tmp_path, processes, each):
    root = tmp_path / "store"
    said, kills = killed_writers(root, tmp_path / "said", processes, each, seed=1)
    folder = Folder(root)
    there = set(folder.paths())
    assert kills
    assert [len(paths) for paths in said] == [each] * processes
    assert {path for paths in said for path in paths} <= there
    assert not list(broken(folder, b"", lambda: None))
    fresh = store(root)
    for number in range(processes):
        for n in range(each):
            assert fresh.find(key(source=f"{n:064x}", kernel=f"kernel{number}"), SPACE).tier == "local"


def test_union_of_two_folders_is_their_merge(tmp_path):
    one, two = record(ms=1.0), record(ms=2.0)
    for root, made in (("a", one), ("b", two), ("a", record(key(8192)))):
        Folder(tmp_path / root).write(made.path, made.data)
    for path, data in contents(Folder(tmp_path / "a"), Folder(tmp_path / "a").paths()):
        Folder(tmp_path / "b").write(path, data)
    assert len(list(Folder(tmp_path / "b").paths())) == 3
    assert store(tmp_path / "b").find(key(8192), SPACE).tier == "local"


@pytest.fixture(params=["a file in its place", errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=str)
def unwritable(request, tmp_path, monkeypatch):
    root = tmp_path / "store"
    if request.param == "a file in its place":
        root.write_text("")
        return root

    def refuse(*args, **kwargs):
        raise OSError(request.param, os.strerror(request.param), str(root))

    monkeypatch.setattr("attnrewrite.kernels.store.local.tempfile.mkstemp", refuse)
    return root


def test_what_cannot_be_written_is_kept_in_memory_with_one_warning(unwritable):
    here = store(unwritable)
    with pytest.warns(AttnRewriteWarning) as warned:
        for made in many(3):
            here.put(made)
        assert all(here.find(made.key, SPACE).tier == "memory" for made in many(3))
    assert [str(warning.message)[:5] for warning in warned] == ["AR512"]


def test_folder_that_cannot_be_read_is_one_warning(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("attnrewrite.kernels.store.local.os.scandir", refuse)
    here = store(tmp_path)
    with pytest.warns(AttnRewriteWarning) as warned:
        assert [here.find(made.key, SPACE) for made in many(3)] == [None] * 3
    assert [str(warning.message)[:5] for warning in warned] == ["AR512"]


def test_disk_that_gets_full_while_writing_leaves_no_part(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(AttnRewriteWarning, match="AR512"):
        store(tmp_path).put(record())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_other_versions_lie_side_by_side(tmp_path):
    store(tmp_path).put(record())
    other = tmp_path / "v2" / "dense" / "nvidia-h200" / key().digest / "x.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"version": 2}')
    newer = json.dumps({**record().to_json(), "version": 2}).encode()
    Folder(tmp_path).write(f"{key().folder}/{'0' * 64}.json", newer)
    with pytest.warns(AttnRewriteWarning, match="AR513"):
        assert store(tmp_path).find(key(), SPACE).tier == "local"
    assert [reason for _, reason in removable(Folder(tmp_path), None, b"", lambda: None)] == [
        "its content is not what its name says"
    ]
    assert other.exists()


def test_only_files_are_read(tmp_path):
    folder = tmp_path / key().folder
    (folder / "folder.json").mkdir(parents=True)
    os.mkfifo(folder / "pipe.json")
    (folder / "dangling.json").symlink_to(tmp_path / "nowhere")
    (folder / "note.txt").write_text("x")
    assert store(tmp_path).find(key(), SPACE) is None


def test_times_from_the_future_are_young(tmp_path):
    for time_ in (0, 2**40):
        made = record(key(source=f"{time_:064x}"), time=time_)
        Folder(tmp_path).write(made.path, made.data)
    found = list(removable(Folder(tmp_path), 30, b"", lambda: None))
    assert [reason for _, reason in found] == ["older than 30 days"]


def test_parts_left_by_killed_writers_go_after_an_hour(tmp_path):
    folder = Folder(tmp_path)
    folder.write(record().path, record().data)
    old, new = (tmp_path / key().folder / f"{name}.partial" for name in ("old", "new"))
    for part in (old, new):
        part.write_text("{")
    os.utime(old, (0, 0))
    found = list(removable(folder, None, b"", lambda: None))
    assert found == [(str(old.relative_to(tmp_path)), "left by a writer that was killed")]
    assert store(tmp_path).find(key(), SPACE).tier == "local"


def test_tuning_again_replaces_and_keeps_what_was_measured(tmp_path):
    store(tmp_path).put(record(ms=1.0))
    again = store(tmp_path, mode=Mode("full", refresh=True))
    assert again.find(key(), SPACE) is None
    assert again.timings(key(), SPACE) == {}
    again.put(record(ms=3.0, timings=record(ms=3.0).timings[:1]))
    assert again.find(key(), SPACE).record.timings[0].median == 3.0
    later = store(tmp_path)
    assert later.find(key(), SPACE).record.revision == 2
    assert [timing.median for timing in later.timings(key(), SPACE).values()] == [3.0, 2.0]
    assert [reason for _, reason in removable(later.local, None, b"", lambda: None)] == ["replaced by a later one"]


def test_record_is_found_for_its_own_space_only(tmp_path):
    store(tmp_path).put(record())
    with pytest.warns(AttnRewriteWarning, match="AR513"):
        assert store(tmp_path).find(key(), Nothing()) is None
    assert isinstance(read(record().data), Record)
    assert Path(tmp_path / record().path).exists()
