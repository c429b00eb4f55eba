"""Tuning from the command to the store, with a simulated device."""

import json

import pytest
import torch
from simulated import H200, HERE, PLACE, Benches, SimulatedGPU, session, silent, tasks_of
from store_support import store
from tiny import llama

import attnrewrite
from attnrewrite.cli import main
from attnrewrite.kernels.dense.configs import Config, configs
from attnrewrite.kernels.dense.names import OPERATORS, kernel_names
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.diagnostics import TuningError
from attnrewrite.kernels.store.key import pairs
from attnrewrite.kernels.store.modes import Mode
from attnrewrite.kernels.tuning.cost import Rates
from attnrewrite.kernels.tuning.rates import SPACE, as_config, key_like, rates_of
from attnrewrite.kernels.tuning.tasks import of_run
from attnrewrite.loading import LoadedModel
from attnrewrite.tuning import Session, of_model

TASKS = tasks_of("sdpa")


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("sdpa", "forward delta backward_keys backward_queries decode merge"),
        ("ssa", "forward delta backward_keys backward_queries decode merge"),
        ("selective", "votes forward delta backward_keys backward_queries backward_logits backward_votes decode merge"),
        ("symmetric", "forward delta backward_keys backward_queries decode merge"),
    ],
)
def test_all_kernels_of_a_variant_are_found(variant, names):
    assert {task.key.kernel for task in tasks_of(variant, Hkv=4)} == set(names.split())


def test_gradients_of_wide_heads_are_made_by_two_kernels():
    """And reports name both."""
    found = {task.key.kernel: task for task in tasks_of("sdpa", Hkv=4, D=160, Dv=32, step=False)}
    assert set(found) == {"forward", "delta", "backward_keys", "backward_values", "backward_queries"}
    made = [dict(found[name].key.flags)["GRADIENTS"] for name in ("backward_keys", "backward_values")]
    assert made == ["keys", "values"]
    tensors = (torch.empty(1, 4, 256, width, dtype=torch.bfloat16) for width in (160, 160, 32))
    named = kernel_names(OPERATORS[0], (*tensors, *[None] * 6, 1.0, 0.0, True, None, None), learns=True)
    assert [name.rpartition("_")[2] for name in named] == [task.key.source[:16] for task in found.values()]


def test_symmetric_both_ways_has_a_backward_pass_of_its_own():
    found = tasks_of("symmetric", causal=False, Hkv=4)
    assert [task.key.kernel for task in found] == ["forward", "delta", "backward_shared"]


def test_what_a_run_launches_is_found(monkeypatch):
    from attnrewrite.functional import attention
    from attnrewrite.functional import kernels as choose

    query = torch.randn(1, 2, 20, 16)
    with choose("triton"):
        found = of_run(lambda: attention(query, query, query, is_causal=True), HERE)
    assert [task.key.kernel for task in found] == ["forward"]
    assert found[0].recipe.L == 20
    assert found[0].recipe.causal


@pytest.mark.parametrize("learns", [False, True])
def test_what_a_converted_model_launches_is_found(learns):
    model = llama()
    attnrewrite.convert(model, attnrewrite.SelectiveConfig(mode="gate"), example_inputs=(torch.arange(12)[None],))
    loaded = LoadedModel(model, "tiny", (torch.arange(24)[None],))
    found = of_model(loaded, PLACE, learns=learns, kernels="triton")
    names = {"votes", "forward"}
    if learns:
        names |= {"delta", "backward_keys", "backward_queries", "backward_logits", "backward_votes"}
    assert {task.key.kernel for task in found} == names
    assert {task.recipe.L for task in found} == {24}


def test_a_session_tunes_once(tmp_path):
    first, again = Benches(), Benches()
    results = session(store(tmp_path), first).tune(TASKS, silent)
    assert {result.what for result in results} == {"tuned"}
    assert first.timed
    results = session(store(tmp_path), again).tune(TASKS, silent)
    assert {result.what for result in results} == {"stored"}
    assert not again.made
    assert json.dumps([result.to_json() for result in results])


def test_refresh_tunes_again_and_replaces(tmp_path):
    session(store(tmp_path), Benches()).tune(TASKS[:1], silent)
    benches = Benches()
    session(store(tmp_path, mode=Mode(search="full", refresh=True)), benches).tune(TASKS[:1], silent)
    assert benches.timed
    found = store(tmp_path).find(TASKS[0].key, SPACES["forward"])
    assert found.record.revision == 2


def test_verify_compares_two(tmp_path):
    kept = store(tmp_path)
    session(kept, Benches()).tune(TASKS[:1], silent)
    benches = Benches()
    results = session(store(tmp_path), benches, verify=True).tune(TASKS[:2], silent)
    assert [result.what for result in results] == ["tuned", "left"]
    assert len(set(benches.made[0].timed)) == 2
    assert kept.find(TASKS[0].key, SPACES["forward"]).record.winner in {
        tuple(sorted(config._asdict().items())) for config in set(benches.made[0].timed)
    }


def test_the_budget_is_for_all(tmp_path):
    results = session(store(tmp_path), Benches(), budget=1e-9).tune(TASKS, silent)
    assert {result.what for result in results} == {"left"}


def test_what_cannot_be_compiled_is_said(tmp_path):
    class Failing(SimulatedGPU):
        def compile(self, wanted, seconds):
            return dict.fromkeys(wanted)

    results = session(store(tmp_path), Benches(Failing)).tune(TASKS[:1], silent)
    assert results[0].what == "failed"
    assert store(tmp_path).find(TASKS[0].key, SPACES["forward"]) is None


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    class Interrupted(SimulatedGPU):
        def time(self, config):
            if len(self.timed) > 20:
                raise KeyboardInterrupt
            return super().time(config)

    with pytest.raises(KeyboardInterrupt):
        session(store(tmp_path), Benches(Interrupted)).tune(TASKS, silent)
    assert store(tmp_path).find(TASKS[0].key, SPACES["forward"]).tier == "local"


def test_a_key_that_another_process_tunes_is_left_to_it(tmp_path):
    with store(tmp_path).lease(TASKS[0].key, 60) as mine:
        assert mine
        results = session(store(tmp_path), Benches()).tune(TASKS[:1], silent)
    assert results[0].what == "elsewhere"


def test_the_cost_model_is_fitted_to_what_was_measured(tmp_path):
    kept = store(tmp_path)
    before = rates_of(H200, TASKS[0].key, kept)
    session(kept, Benches()).tune(TASKS, silent)
    after = rates_of(H200, TASKS[0].key, store(tmp_path))
    assert after != before
    assert store(tmp_path).timings(key_like(TASKS[0].key), SPACE)


@pytest.mark.parametrize("change", [{"matmul": "2"}, {"matmul": "nan"}, {"matmul": "x"}, {"more": "1"}])
def test_rates_out_of_their_limits_are_refused(change):
    from attnrewrite.kernels.store.validation import fits

    good = dict(as_config(Rates()))
    assert fits(pairs(good), SPACE)
    assert not fits(pairs({**good, **change}), SPACE)


def test_every_default_is_declared():
    for name, space in SPACES.items():
        for widest in (64, 128, 256):
            for bits in (16, 32):
                assert all(space.valid(config._asdict()) for config in configs(name, widest, bits)), name


GOOD = Config(64, 64, 4, 1)._asdict()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_m": 64},
        {"block_m": 64, "block_n": 64, "warps": 4, "stages": 1},
        {**GOOD, "block_m": 64.0},
        {**GOOD, "block_m": True},
        {**GOOD, "block_m": 48},
        {**GOOD, "descriptors": 1},
        {**GOOD, "maxnreg": 1},
    ],
)
def test_what_is_not_declared_is_refused(config):
    assert not SPACES["forward"].valid(config)


def test_descriptors_are_declared_by_kernels_that_load_by_them():
    assert SPACES["forward"].valid(GOOD)
    assert SPACES["forward"].valid({**GOOD, "descriptors": True})
    assert not SPACES["votes"].valid({**GOOD, "descriptors": True})


def test_where_tensors_are_not_fit_no_descriptors_are_considered(tmp_path):
    for fit in (True, False):
        benches = Benches()
        session(store(tmp_path / str(fit)), benches).tune([TASKS[0]._replace(descriptors=fit)], silent)
        assert {config.descriptors for gpu in benches.made for config in gpu.compiled} == {fit, False}


def test_heads_that_descriptors_cannot_describe():
    assert {task.key.kernel for task in TASKS if task.descriptors} == {"forward", "backward_keys", "backward_queries"}
    assert not any(task.descriptors for task in tasks_of("sdpa", D=20, Dv=20))


# The command


def test_without_a_gpu_nothing_is_tuned(capsys):
    assert main(["tune", "--variant", "selective"]) == 2
    said = capsys.readouterr().err
    assert "AR501" in said
    assert "TRITON_INTERPRET is set" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_without_a_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr("attnrewrite.tuning.interpreted", lambda: False)
    assert main(["tune", "--variant", "selective"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either MODEL or --variant"),
        (["./model", "--variant", "ssa"], "either MODEL or --variant"),
        (["--variant", "ssa", "--seq-len", "0"], "seq-len"),
        (["--variant", "ssa", "--verify", "--refresh"], "give one of them"),
        (["--variant", "ssa", "--budget", "0"], "budget"),
        (["--variant", "ssa", "--device", "toaster"], "toaster"),
    ],
)
def test_wrong_words(words, said, capsys):
    assert main(["tune", *words]) in (1, 2)
    assert said in capsys.readouterr().err


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr("attnrewrite.tuning.open_device", lambda name: PLACE)
    monkeypatch.setattr(Session, "bench", Benches(), raising=False)
    made = Session.__init__

    def with_bench(self, *arguments, **named):
        made(self, *arguments, **{**named, "bench": Benches()})

    monkeypatch.setattr(Session, "__init__", with_bench)


@pytest.mark.usefixtures("on_a_gpu")
def test_the_command_tunes_and_stores(capsys):
    words = ["tune", "--variant", "ssa", "--heads", "4", "--head-dim", "32", "--seq-len", "128", "--no-backward"]
    assert main([*words, "--dry-run", "--format", "json"]) == 0
    assert {task["stored"] for task in json.loads(capsys.readouterr().out)["tasks"]} == {None}
    assert main([*words, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["tuned"]
    assert [task["kernel"] for task in found] == ["forward", "decode", "merge"]
    assert all(task["what"] == "tuned" and task["ms"] > 0 for task in found)
    assert main(words) == 0
    assert "was stored" in capsys.readouterr().out
    assert main([*words, "--dry-run"]) == 0
    assert "local" in capsys.readouterr().out


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant", "selectiv"], "AR403"),
        (["--variant", "ssa", "--heads", "4", "--kv-heads", "3"], "cannot share"),
    ],
)
def test_what_cannot_be_tuned(words, said, capsys):
    assert main(["tune", *words]) in (1, 2)
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("on_a_gpu")
def test_readonly_refuses_to_tune(monkeypatch, capsys):
    monkeypatch.setenv("ATTNREWRITE_AUTOTUNE", "readonly")
    assert main(["tune", "--variant", "ssa", "--seq-len", "64", "--no-backward"]) == 1
    assert "AR102" in capsys.readouterr().err


def test_an_unknown_generation_is_said(monkeypatch):
    from attnrewrite.tuning import open_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("attnrewrite.tuning.interpreted", lambda: False)

    def unknown(index):
        raise ValueError("it is sm_75")

    monkeypatch.setattr("attnrewrite.tuning.present", unknown)
    with pytest.raises(TuningError, match="AR502"):
        open_device("cuda:0")
