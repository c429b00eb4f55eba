"""Which configurations a launch tries, with a stand-in for one on a GPU: only its key and sizes are read."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from simulated import CPU, H200, HERE, Benches, session, silent

from attnrewrite.backend import Backend
from attnrewrite.kernels.dense import keys, tuned
from attnrewrite.kernels.dense import launch as launching
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.launch import Launch, launched_by
from attnrewrite.kernels.dense.sample import Recipe, Sample
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.generation.resources import Resources
from attnrewrite.kernels.store.key import pairs
from attnrewrite.kernels.store.record import Record, Timing
from attnrewrite.kernels.store.settings import default_store
from attnrewrite.kernels.store.validation import read
from attnrewrite.kernels.tuning.estimate import wanted_registers
from attnrewrite.kernels.tuning.model import smaller
from attnrewrite.kernels.tuning.published import RATES
from attnrewrite.kernels.tuning.spills import spilling_least
from attnrewrite.kernels.tuning.tasks import Task
from attnrewrite.kernels.tuning.work import Shape

FIRST = configs("forward", 64, 16)[0]


class OnGPU:
    """A tensor that says that it is on a GPU."""

    def __init__(self, tensor):
        self.tensor, self.is_cuda = tensor, True
        self.device = SimpleNamespace(index=0)

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.fixture
def launch(monkeypatch):
    found = []
    with launched_by(found.append):
        Sample(Recipe(1, 2, 2, 256, 256, 64, 64, scale=0.125, causal=True), CPU).run()
    made = found[0]
    monkeypatch.setattr(keys, "here", lambda index: HERE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("attnrewrite.kernels.tuning.model.present", lambda index: H200)
    monkeypatch.setattr(Launch, "uses", lambda self, config: Resources(100, 0, 1024, ""))
    return replace(made, call=replace(made.call, query=OnGPU(made.call.query)))


def test_a_launch_without_a_record_runs_what_the_model_prefers(launch):
    first, *rest = tuned.configurations(launch)
    assert first == smaller("forward", FIRST, keys.shape_of(launch), H200, RATES[H200.name])
    assert FIRST in rest or first == FIRST


def test_a_launch_runs_what_is_stored(launch):
    task = Task.of(launch, keys.key_of(launch, HERE))
    results = session(default_store(), Benches()).tune([task], silent)
    assert tuned.configurations(launch)[0] == results[0].outcome.winner


def test_a_stored_configuration_that_does_not_run_is_followed_by_defaults(launch):
    found = tuned.configurations(launch)
    assert found[-1] == Config(16, 16, 4, 1)


def test_after_a_winner_with_descriptors_comes_the_fastest_without(launch):
    """For launches of tensors that are not fit for them."""
    winner, second, slow = Config(64, 64, 4, 2, descriptors=True), Config(128, 64, 8, 2), Config(64, 64, 4, 2)
    timings = [
        Timing(pairs(config._asdict()), "ok", ms, ms, ms, 40)
        for config, ms in ((slow, 3.0), (winner, 1.0), (second, 2.0), (Config(32, 64, descriptors=True), 1.5))
    ]
    key = keys.key_of(launch, HERE)
    default_store().put(Record(key, tuple(timings), pairs(winner._asdict()), 0.01, 1, 0))
    assert tuned.configurations(launch)[:3] == (winner, second, FIRST)
    assert read(default_store().find(key, SPACES["forward"]).record.data).winner == pairs(winner._asdict())


def test_mode_off_runs_the_default(launch):
    tuned.search_as("off")
    assert list(tuned.configurations(launch)) == configs("forward", 64, 16)


def test_the_backend_sets_the_mode(monkeypatch):
    model = torch.nn.Linear(2, 2)
    torch.compile(model, backend=Backend(autotune="off", inner="eager"))(torch.zeros(1, 2))
    assert default_store().mode.search == "off"


def test_mode_quick_tunes_at_the_first_call(launch, monkeypatch):
    asked = []
    monkeypatch.setattr("attnrewrite.kernels.tuning.now.tune_now", lambda *given: asked.append(given))
    tuned.search_as("quick")
    tuned.configurations(launch)
    tuned.configurations(launch)
    assert len(asked) == 1


def test_a_lookup_needs_no_key(launch, monkeypatch):
    tuned.configurations(launch)
    monkeypatch.setattr(keys, "key_of", None)
    assert tuned.configurations(launch)


def test_few_programs_get_smaller_tiles():
    crowded = Shape(8, 32, 32, 4096, 4096, 64, 64, causal=True)
    assert smaller("forward", FIRST, crowded, H200, RATES[H200.name]) == FIRST
    lonely = Shape(1, 4, 4, 512, 512, 64, 64, causal=True)
    chosen = smaller("forward", FIRST, lonely, H200, RATES[H200.name])
    assert chosen.block_m < FIRST.block_m
    assert chosen[2:] == FIRST[2:]


# Where the compiler spills


CROWDED = Shape(8, 32, 32, 4096, 4096, 64, 64, causal=True)


def spilling(spills, tried):
    """What compiles: ``spills`` says how many registers a configuration spills, or None where it does not run."""

    def uses(config):
        tried.append(config)
        found = spills(config)
        return None if found is None else Resources(255, found, 1024, "")

    return uses


def least(spills, tried, kernel="forward", first=FIRST):
    return spilling_least(kernel, first, CROWDED, spilling(spills, tried), H200, RATES[H200.name])


def wanted(config):
    return wanted_registers("forward", config, CROWDED)


def test_what_spills_nothing_is_compiled_alone():
    tried = []
    assert least(lambda config: 0, tried) == FIRST
    assert tried == [FIRST]


@pytest.mark.parametrize("spills", [1, 2000, None])
def test_tiles_shrink_until_nothing_spills(spills):
    tried = []
    chosen = least(lambda config: 0 if wanted(config) < 0.7 * wanted(FIRST) else spills, tried)
    assert chosen == tried[-1]
    assert wanted(chosen) < 0.7 * wanted(FIRST)
    assert [wanted(config) for config in tried] == sorted(map(wanted, tried), reverse=True)
    assert len(set(tried)) == len(tried) <= 8


def test_where_all_spill_the_one_that_spills_least_runs():
    tried = []
    chosen = least(lambda config: 5 if len(tried) == 2 else 70, tried)
    assert chosen == tried[1]
    assert 2 < len(tried) <= 8


def test_where_none_can_run_the_first_is_left_to_fail():
    assert least(lambda config: None, []) == FIRST


def test_a_launch_takes_smaller_tiles_where_its_own_flags_spill(launch, monkeypatch):
    uses = spilling(lambda config: 0 if config.block_m * config.block_n < 1024 else 40, [])
    monkeypatch.setattr(Launch, "uses", lambda self, config: uses(config))
    first, *rest = tuned.configurations(launch)
    assert first.block_m * first.block_n < 1024
    assert FIRST in rest


def test_a_device_without_numbers_still_gets_what_spills_nothing(launch, monkeypatch):
    def unknown(index):
        raise ValueError("gfx942 is not known")

    monkeypatch.setattr("attnrewrite.kernels.tuning.model.present", unknown)
    assert tuned.configurations(launch)[0] == FIRST


class Compiled:
    """What triton returns: it says what it uses once it is loaded."""

    metadata = SimpleNamespace(shared=4096)
    refused = None

    @property
    def run(self):
        if self.refused is not None:
            raise self.refused
        self.n_regs, self.n_spills = 168, 3


@pytest.fixture
def compiler(monkeypatch):
    made, asked = Compiled(), []

    def warmup(*, grid, **given):
        asked.append(given)
        return made

    monkeypatch.setattr(launching, "load", lambda emitted: SimpleNamespace(warmup=warmup))
    return made, asked


@pytest.fixture
def plain():
    found = []
    with launched_by(found.append):
        Sample(Recipe(1, 2, 2, 256, 256, 64, 64, scale=0.125, causal=True), CPU).run()
    return found[0]


def test_a_launch_is_compiled_without_running(plain, compiler):
    _, asked = compiler
    assert plain.uses(FIRST) == Resources(168, 3, 4096, "")
    assert asked[0]["BLOCK_M"] == FIRST.block_m
    assert (asked[0]["num_warps"], asked[0]["num_stages"]) == (FIRST.warps, FIRST.stages)
    assert set(asked[0]) == {*plain.emitted.parameters, "num_warps", "num_stages"}


def test_what_the_device_cannot_run_uses_nothing(plain, compiler):
    from triton.runtime.errors import OutOfResources

    compiler[0].refused = OutOfResources(300_000, 232_448, "shared memory")
    assert plain.uses(FIRST) is None
    compiler[0].refused = RuntimeError("PassManager::run failed")
    assert plain.uses(FIRST) is None
    compiler[0].refused = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        plain.uses(FIRST)
