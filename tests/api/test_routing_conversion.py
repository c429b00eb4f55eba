"""Routing attention on whole models: the host's function, causality, training, and what comes of calibration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from families import build
from rich.console import Console
from routing_conversion_support import (
    BY_NAME,
    CONFIG,
    IDS,
    SETTINGS,
    buffers,
    first,
    holders,
    inputs_of,
    routed,
    train_one_of_two,
    trained,
)
from rows import rows

import attnrewrite
from attnrewrite import AttnRewriteError, RoutingConfig, SelectiveConfig, SSAConfig, VariantConfig
from attnrewrite.conversion import new_state
from attnrewrite.kernels.routing.centroids import CentroidState, accumulate, update
from attnrewrite.kernels.routing.clusters import routing_features


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


# --- the function ----------------------------------------------------------------------------------------


HOSTS = [("llama", True), ("gpt2", False), ("bert", True)]


@pytest.mark.parametrize(("name", "padding"), rows(HOSTS, quick=HOSTS[:1]))
def test_one_cluster_as_wide_as_the_sequence_is_the_host_model(name: str, padding: bool) -> None:
    """C = 1, w = N, raw and not shared, in float64; padded rows are no part of it."""
    inputs = inputs_of(name, padding=padding)
    host = first(build(BY_NAME[name], "sdpa").double()(**inputs))
    model = routed(name, RoutingConfig(clusters=1, window_size=64), padding=padding)
    assert [tuple(h.state.centroids.shape[:2]) for h in holders(model)] == [(BY_NAME[name].kv_heads, 1)] * 2
    real = inputs["attention_mask"].bool() if padding else torch.ones_like(inputs["input_ids"]).bool()
    assert torch.allclose(first(model(**inputs))[real], host[real], rtol=1e-12, atol=1e-12)
    several = first(routed(name, padding=padding)(**inputs))
    assert float((several - host)[real].abs().max()) > 1e-3


def test_other_heads_stay_as_they_are_or_attend_locally() -> None:
    """A window as long as the sequence is the host; a shorter one is not, and the clusters are those of fewer heads."""
    host = first(build(BY_NAME["llama"], "sdpa").double()(IDS, use_cache=False))
    wide: dict[str, Any] = {"clusters": 1, "window_size": 64, "local_heads": (0,)}
    model = routed(config=RoutingConfig(**wide, routing_heads=(2,), local_window=64))
    assert torch.allclose(first(model(IDS, use_cache=False)), host, rtol=1e-12, atol=1e-12)
    assert holders(model)[0].state.centroids.shape == (1, 1, 8)
    narrow = routed(config=RoutingConfig(**wide, local_window=3))
    assert float((first(narrow(IDS, use_cache=False)) - host).abs().max()) > 1e-3


def test_the_future_changes_no_bit_of_the_past_and_packing_is_separate_sequences() -> None:
    model = routed()
    other = IDS.clone()
    other[:, 8:] = (other[:, 8:] + 7) % 64
    with torch.no_grad():
        whole, changed = (first(model(ids, use_cache=False)) for ids in (IDS, other))
        assert torch.equal(whole[:, :8], changed[:, :8])
        assert not torch.equal(whole[:, 8:], changed[:, 8:])
        alone = [first(model(part, use_cache=False)) for part in (IDS[:1, :5], IDS[:1, 5:])]
        positions = torch.tensor([[*range(5), *range(7)]])
        packed = first(model(IDS[:1], position_ids=positions, use_cache=False))
    assert torch.allclose(packed, torch.cat(alone, 1), rtol=1e-12, atol=1e-12)


def test_left_padding_changes_nothing() -> None:
    model = routed()
    with torch.no_grad():
        alone = first(model(IDS[:1, 3:], use_cache=False))
        mask = torch.ones_like(IDS)
        mask[0, :3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = first(model(IDS, attention_mask=mask, position_ids=positions, use_cache=False))
    assert torch.allclose(together[:1, 3:], alone, rtol=1e-12, atol=1e-12)


def test_the_papers_rule_leaks_where_it_is_asked_for() -> None:
    model = routed(config=RoutingConfig(**SETTINGS, rule="topw", paper_causal=True))
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 7) % 64
    with torch.no_grad():
        whole, changed = (first(model(ids, use_cache=False)) for ids in (IDS, other))
    assert float((whole - changed)[:, :-1].abs().max()) > 1e-6


# --- calibration -----------------------------------------------------------------------------------------


def test_calibration_is_deterministic_and_its_table_can_be_read() -> None:
    model = routed(ready=False)
    tables = [attnrewrite.calibrate(model, [{"input_ids": IDS}], seed=seed) for seed in (3, 3, 4)]
    assert tables[0].to_dict() == tables[1].to_dict() != tables[2].to_dict()
    again = routed(ready=False)
    attnrewrite.calibrate(again, [{"input_ids": IDS}], seed=4)
    assert all(torch.equal(a, b) for a, b in zip(buffers(model).values(), buffers(again).values(), strict=True))
    rows = json.loads(json.dumps(tables[2].to_dict()))["rows"]
    assert [(row["layer"], row["head"]) for row in rows] == [(x, h) for x in BY_NAME["llama"].layers for h in range(4)]
    for row in rows:
        assert 0 < row["random"] <= 1
        assert 0 < row["routing"] <= 1
        assert sum(row["queries"]) == 2 * sum(row["keys"]) == 2 * IDS.numel()
    console = Console(width=120, record=True)
    console.print(tables[2])
    assert "one_sided" in console.export_text()


def test_heads_are_chosen_by_the_mass_they_capture() -> None:
    row = {"layer": "a", "head": 0, "routing": 0.6, "local": 0.5, "random": 0.55}
    rows = [
        row,
        {**row, "head": 1, "local": 0.7},
        {**row, "head": 2, "random": 0.59},
        {**row, "layer": "b", "local": 1},
    ]
    config = RoutingConfig(**SETTINGS)
    assert config.plan(rows) == {"a": RoutingConfig(**SETTINGS, routing_heads=(0,)), "b": "sdpa"}


def test_one_cluster_captures_all() -> None:
    model = routed(config=RoutingConfig(clusters=1, window_size=64), ready=False, padding=True)
    for row in attnrewrite.calibrate(model, [inputs_of("llama", padding=True)]).rows:
        assert row["routing"] == pytest.approx(1, abs=1e-6)
        assert row["random"] == pytest.approx(1, abs=1e-6)
        assert row["one_sided"] == 0


def test_what_cannot_be_calibrated_is_said_and_changes_nothing() -> None:
    plain = build(BY_NAME["llama"], "sdpa")
    for action in (attnrewrite.calibrate, lambda m, _: attnrewrite.update(m)):
        with pytest.raises(AttnRewriteError, match="AR310"):
            action(plain, [])
    attnrewrite.convert(plain, SSAConfig(), example_inputs=(IDS,))
    with pytest.raises(AttnRewriteError, match="AR316"):
        attnrewrite.calibrate(plain, [IDS])
    attnrewrite.update(plain)
    model = routed(ready=False)
    with pytest.raises(AttnRewriteError, match="AR316"):
        attnrewrite.calibrate(model, [])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(AttnRewriteError, match="AR402"):
        attnrewrite.calibrate(model, [IDS])
    assert not any(h.ready for h in holders(model))


def test_a_layer_that_was_not_calibrated_does_not_run() -> None:
    model = routed(ready=False)
    with pytest.raises(AttnRewriteError, match="AR315"):
        model(IDS, use_cache=False)


# --- training --------------------------------------------------------------------------------------------


def test_the_first_batch_in_training_sets_the_centroids_and_the_next_ones_move_them() -> None:
    model = routed(ready=False)
    trained(model)
    for holder in holders(model):
        assert holder.ready
        assert holder.state.ema_count.sum(1).tolist() == [3 * IDS.numel()] * 2
        assert torch.allclose(holder.state.centroids.norm(dim=-1), torch.tensor(8.0).sqrt().double())
        assert int(holder.step_count.sum()) == 0
    before = [holder.state.centroids.clone() for holder in holders(model)]
    attnrewrite.update(model)
    assert all(torch.equal(h.state.centroids, b) for h, b in zip(holders(model), before, strict=True))
    trained(model, IDS.flip(1))
    attnrewrite.update(model)
    assert not any(torch.equal(h.state.centroids, b) for h, b in zip(holders(model), before, strict=True))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    kept = buffers(model)
    model.eval()
    first(model(IDS, use_cache=False)).sum().backward()
    assert all(torch.equal(value, kept[name]) for name, value in model.named_buffers())


def test_an_update_is_the_moving_average_of_all_batches_of_the_step() -> None:
    """Against sums of what the layer's own projections give; decay 0 and 1 are its ends, and no batch is no change."""
    model = routed()
    layer, holder = model.model.layers[0].self_attn, holders(model)[0]
    states: list[torch.Tensor] = []
    hooks = [p.register_forward_hook(lambda _m, _i, out: states.append(out)) for p in (layer.q_proj, layer.k_proj)]
    attnrewrite.restore(plain := copy.deepcopy(model))
    plain.eval()(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    query, key = (x.detach().unflatten(-1, (-1, 8)).transpose(1, 2) for x in states)
    start = CentroidState(*(x.clone() for x in holder.state))
    centers = holder.get_buffer("center_query"), holder.get_buffer("center_key")
    parts = [
        accumulate(routing_features(x, center), start.centroids)
        for x, center in zip((query, key), centers, strict=True)
    ]
    count, total = (2 * sum(part) for part in zip(*parts, strict=True))
    trained(model)
    trained(model)
    assert torch.equal(holder.step_count, count)
    assert torch.allclose(holder.step_sum, total, rtol=1e-12, atol=1e-12)
    attnrewrite.update(model)
    for found, wanted in zip(holder.state, update(start, count, total, 0.99), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12)
    kept = [x.clone() for x in holder.state]
    attnrewrite.update(model)
    assert all(torch.equal(found, wanted) for found, wanted in zip(holder.state, kept, strict=True))
    assert int(holder.steps) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_every_token_once(reentrant: bool) -> None:
    plain = routed()
    model = copy.deepcopy(plain)
    model.compile(backend=attnrewrite.Backend(inner="eager"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(trained(plain), trained(model))
    for ours, theirs in zip(holders(model), holders(plain), strict=True):
        assert int(ours.step_count.sum()) == 2 * 3 * IDS.numel()
        assert torch.equal(ours.step_sum, theirs.step_sum)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_compiled_model_learns_the_same() -> None:
    plain = routed(dtype=torch.float32, ready=False)
    model = copy.deepcopy(plain)
    model.compile(backend="attnrewrite", options={"inner": "aot_eager"})
    for _ in range(2):
        assert torch.allclose(trained(plain), trained(model), rtol=1e-6)
        for m in (plain, model):
            attnrewrite.update(m)
    for ours, theirs in zip(buffers(model).values(), buffers(plain).values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    model.eval()
    plain.eval()
    assert torch.allclose(first(model(IDS, use_cache=False)), first(plain(IDS, use_cache=False)), atol=1e-5)


def test_dead_clusters_move_onto_lonely_tokens() -> None:
    model = routed(config=RoutingConfig(**SETTINGS, reseed_every=2))
    holder = holders(model)[0]
    for _ in range(2):
        holder.ema_count[0, 1] = 1e-3  # kept dead until the check
        dead = holder.state.centroids[0].clone()
        trained(model)
        holder.step_count[0, 1] = 0
        attnrewrite.update(model)
    moved = (holder.state.centroids[0] - dead).abs().amax(-1)
    assert moved[1] > 0.1
    assert moved[[0, 2]].max() < 0.1
    assert holder.ema_count[0, 1] == pytest.approx(float(holder.ema_count[0].mean()), rel=0.5)
    assert torch.isinf(holder.lonely_affinity).all()


def test_buffers_stay_wide_when_the_model_becomes_narrow() -> None:
    model = routed(dtype=torch.float32)
    kept = buffers(model)
    model.bfloat16()
    for holder in holders(model):
        assert {value.dtype for value in holder.state} == {torch.float32}
        assert holder.steps.dtype == torch.int64
    routing = [name for name in kept if ".routing." in name]
    assert routing
    assert all(torch.equal(dict(model.named_buffers())[name], kept[name]) for name in routing)
    assert first(model(IDS, use_cache=False)).isfinite().all()


# --- several processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_what_one_does_on_both_batches(tmp_path: Path) -> None:
    mp.spawn(train_one_of_two, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)
    model = routed(ready=False, dtype=torch.float32)
    attnrewrite.calibrate(model, [IDS])
    trained(model)
    trained(model)
    attnrewrite.update(model)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    for name, value in buffers(model).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert torch.allclose(ranks[0][name], value, rtol=1e-6, atol=1e-6), name


# --- saving, configs and refusals ------------------------------------------------------------------------


def test_what_is_saved_is_loaded_with_its_centroids(tmp_path: Path) -> None:
    model = routed(dtype=torch.float32, config=RoutingConfig(**SETTINGS, routing_heads=(1, 2)))
    names = [name for name, _ in new_state(model)]
    assert not any(part in name for name in names for part in ("step_", "lonely"))
    attnrewrite.save_pretrained(model, tmp_path / "saved")
    again = attnrewrite.load_pretrained(str(tmp_path / "saved"))
    again.eval()
    for (name, ours), (_, theirs) in zip(new_state(again), new_state(model), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(first(again(IDS, use_cache=False)), first(model(IDS, use_cache=False)))


def test_the_config_survives_json_and_says_what_is_wrong() -> None:
    config = RoutingConfig(routing_heads=(0, 3), local_heads=(1,), local_window=8, temperature=2)
    assert VariantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    wrong: list[dict[str, Any]] = [
        {"clusters": 0},
        {"clusters": True},
        {"window_size": 0},
        {"routing_heads": ()},
        {"routing_heads": (0.5,)},
        {"routing_heads": (1,), "local_heads": (1,), "local_window": 4},
        {"local_heads": (1,)},
        {"local_window": 4},
        {"paper_causal": True},
        {"ema_decay": 1.5},
        {"reseed_every": -1},
        {"temperature": 0.0},
    ]
    for fields in wrong:
        with pytest.raises(AttnRewriteError, match="AR303"):
            RoutingConfig(**fields)


def test_batches_of_several_sizes_share_a_graph() -> None:
    """Sizes that are symbols hide no projection."""
    model = routed()
    with torch.no_grad():
        alone = torch.cat([first(model(IDS[n : n + 1], use_cache=False)) for n in range(2)])
        together = first(model(IDS.repeat(2, 1)[:3], use_cache=False))
    assert torch.allclose(together[:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("llama", RoutingConfig(rule="topw"), "later tokens decide"),
        ("llama", RoutingConfig(shared_qk=True), "a key head per query head"),
        ("llama", RoutingConfig(logits="normed"), "scores what is routed"),
        ("llama", RoutingConfig(routing_heads=(4,)), "no head 4"),
        ("t5", RoutingConfig(), "no common order"),
        ("gemma2", RoutingConfig(), "soft-cap"),
    ],
)
def test_refusals_leave_the_model_as_it_was(name: str, config: RoutingConfig, reason: str) -> None:
    model = build(BY_NAME[name], BY_NAME[name].implementations[0])
    names = set(model.state_dict())
    with pytest.raises(AttnRewriteError, match=reason):
        attnrewrite.convert(model, config, example_kwargs=inputs_of(name))
    assert set(model.state_dict()) == names


def test_a_plan_holds_routing_beside_other_variants() -> None:
    model = build(BY_NAME["t5"], "eager")
    plan = {"*EncDecAttention": RoutingConfig(**SETTINGS, rule="topw"), "decoder.*": SelectiveConfig(), "*": CONFIG}
    inputs = inputs_of("t5")
    attnrewrite.convert(model, plan, example_kwargs=inputs)
    attnrewrite.calibrate(model, [inputs])
    model.train()
    first(model(**inputs)).sum().backward()
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert float(bias.grad.abs().sum()) > 0
