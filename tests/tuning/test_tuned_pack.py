"""The pack that comes with the library is made in several sittings, and found by whoever has none of its own."""

import pytest
from scripts import script
from simulated import PLACE, Benches, SimulatedGPU, tasks_of

from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.store.bundled import bundled
from attnrewrite.kernels.store.modes import Mode
from attnrewrite.kernels.store.tiers import Store
from attnrewrite.tuning import Session

TASKS = tasks_of("sdpa")


def fill(folder, benches, tasks=TASKS, **more):
    session = Session(Store(mode=Mode(search="full"), packs=folder), PLACE, bench=benches, **more)
    return script("tuned_pack").fill(session, tasks, folder)


def test_a_pack_is_found_by_others(tmp_path):
    fill(tmp_path / "tuned", Benches())
    for task in TASKS:
        assert Store(packs=tmp_path / "tuned").find(task.key, SPACES[task.key.kernel]).tier == "bundled"


def test_the_next_sitting_goes_on(tmp_path):
    benches = Benches()
    fill(tmp_path, benches, TASKS[:2])
    before = bundled("dense", tmp_path)
    again = Benches()
    assert [result.what for result in fill(tmp_path, again)] == ["stored", "stored"] + ["tuned"] * (len(TASKS) - 2)
    assert len(again.made) == len(TASKS) - 2
    after = bundled("dense", tmp_path)
    assert set(after) == {task.key for task in TASKS}
    assert all(after[key] == record for key, record in before.items())


def test_what_there_was_no_time_for_is_left(tmp_path):
    assert {result.what for result in fill(tmp_path, Benches(), budget=1e-9)} == {"left"}
    assert bundled("dense", tmp_path) == {}


def test_an_interruption_keeps_what_was_tuned(tmp_path):
    class Interrupted(SimulatedGPU):
        def time(self, config):
            if self.problem.key.kernel == "delta":
                raise KeyboardInterrupt
            return super().time(config)

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, Benches(Interrupted))
    assert "forward" in {key.kernel for key in bundled("dense", tmp_path)}
    assert [path.name for path in tmp_path.iterdir()] == ["dense.jsonl"]


def test_usual_calls_launch_every_kernel():
    made = script("tuned_pack")
    small = [recipe for recipe in made.usual() if recipe.S <= 1024 and recipe.D == 64]
    assert {recipe.kind for recipe in small} == {"dense", "selective", "symmetric"}
    assert {recipe.Hkv for recipe in small} == {8, 16}
    wanted = list(made.usual())
    assert {recipe.S for recipe in wanted} == {1024, 2048, 4096, 8192, 32768}
    assert all(recipe.learns for recipe in wanted if recipe.B > 1)
    assert any(recipe.L == 1 and recipe.S == 32768 for recipe in wanted)
    assert len(wanted) == len(set(wanted))


def test_without_a_gpu_the_pack_is_left_as_it_is(tmp_path):
    from click.testing import CliRunner

    done = CliRunner().invoke(script("tuned_pack").main, [str(tmp_path)])
    assert done.exit_code != 0
    assert not list(tmp_path.iterdir())
