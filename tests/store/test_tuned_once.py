"""What one machine of a team has tuned, no other one times."""

from simulated import Benches, session, silent, tasks_of
from store_support import store

from attnrewrite.kernels.store.behind import Shared
from attnrewrite.kernels.store.breaker import Breaker


def test_a_second_machine_times_nothing(shared_url, tmp_path):
    tasks, first, second = tasks_of("selective"), Benches(), Benches()
    mine, theirs = (store(tmp_path / x, Shared(shared_url, Breaker(in_vain=30, in_all=60))) for x in "ab")
    session(mine, first).tune(tasks, silent)
    mine.shared.flush()
    results = session(theirs, second).tune(tasks, silent)
    assert first.timed
    assert {result.what for result in results} == {"stored"}
    assert not second.made
