"""SEA in whole models: equal to the host where nothing is left out, causal, padded, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, build, padded
from rows import rows
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import attnrewrite
from attnrewrite import AttnRewriteError, SEAConfig, VariantConfig
from attnrewrite.conversion import new_parameters, new_state
from attnrewrite.variants import parse_config

BY_NAME = {family.name: family for family in FAMILIES}
LLAMA, BERT = BY_NAME["llama"], BY_NAME["bert"]
WHOLE = SEAConfig(slices=8, budget=16, scale_bias=40.0, max_length=32)
SMALL = SEAConfig(slices=8, budget=3, max_length=32)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def converted(family: Family, config: SEAConfig = SMALL, **inputs: Any) -> nn.Module:
    """A converted model in float64 whose factors differ between queries."""
    model = build(family, "sdpa").double()
    attnrewrite.convert(model, config, example_kwargs=inputs or family.inputs())
    model.double()
    with torch.no_grad():
        for name, parameter in new_parameters(model):
            if "scales" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


RULES = [("llama", "exact"), ("bert", "exact"), ("llama", "paper"), ("gpt2", "exact")]


@pytest.mark.parametrize(("name", "rule"), rows(RULES, quick=RULES[:2]))
def test_a_model_whose_keys_are_all_kept_is_its_host(name: str, rule: Any) -> None:
    """With k >= N and both factors at sigmoid(40) = 1 - 4e-18; padding on the left of one sequence."""
    family = BY_NAME[name]
    inputs = padded(family.inputs())
    real = inputs["attention_mask"].bool()
    model = build(family, "sdpa").double()
    expected = first(model(**inputs)).detach()
    config = SEAConfig.from_dict({**WHOLE.to_dict(), "budget_rule": rule})
    attnrewrite.convert(model, config, example_kwargs=inputs)
    torch.testing.assert_close(first(model(**inputs))[real], expected[real], rtol=1e-12, atol=1e-12)
    attnrewrite.restore(model)
    assert torch.equal(first(model(**inputs)), expected)


def test_the_default_start_is_near_the_host() -> None:
    model = build(LLAMA, "sdpa")
    expected = model(**LLAMA.inputs())[0].detach()
    attnrewrite.convert(model, SEAConfig(slices=8, budget=16), example_kwargs=LLAMA.inputs())
    distance = (model(**LLAMA.inputs())[0] - expected).norm() / expected.norm()
    assert 1e-6 < float(distance) < 0.02  # 1 - sigmoid(4)^2 = 0.036 of each layer's attention is lost
    assert not model.model.layers[0].self_attn.sea.scales.weight.any()


def test_later_tokens_leave_earlier_rows_bit_identical() -> None:
    model = converted(LLAMA)
    ids = LLAMA.inputs()["input_ids"]
    changed = ids.clone()
    changed[:, 7:] = (ids[:, 7:] + 5) % 64
    with torch.no_grad():
        before, after = (model(x, use_cache=False).logits for x in (ids, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
@pytest.mark.parametrize("side", rows(["left", "right"], quick=["left"]))
def test_padding_changes_no_real_token(name: str, side: str) -> None:
    family = BY_NAME[name]
    ids = family.inputs()["input_ids"]
    n = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if side == "left" else slice(n - 5, n)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    model = converted(family, **inputs)
    real = mask[0].bool()
    with torch.no_grad():
        out = first(model(**inputs))[0, real]
        alone = first(model(input_ids=ids[:1, real], attention_mask=torch.ones(1, n - 5).long()))[0]
    torch.testing.assert_close(out, alone, rtol=1e-10, atol=1e-10)


def test_parameters_of_a_layer_at_the_size_of_the_paper() -> None:
    """Linear 3 D -> 2 D, norm, Linear 2 D -> ch M / cs, two factors, the network over 2 H channels, a table."""
    from types import SimpleNamespace

    def count(config: SEAConfig, offset: int | None) -> dict[str, int]:
        sizes = {"B": 1, "H": 12, "Hkv": 12, "L": 9, "S": 9, "D": 64, "Dv": 64}
        facts = SimpleNamespace(facts=SimpleNamespace(offset=offset))
        site: Any = SimpleNamespace(sizes=lambda: sizes, visibility=facts, layer="layer")
        holder = config.module(site, torch.device("cpu"), torch.float32)
        empty = config.empty_module({name: tuple(value.shape) for name, value in holder.state_dict().items()})
        assert [(n, v.shape) for n, v in holder.named_parameters()] == sorted_like(holder, empty)
        found: dict[str, int] = {}
        for name, value in holder.state_dict().items():
            if name == "kv_heads":  # holds no number, only a size
                continue
            part = name.split(".")[0]
            found[part] = found.get(part, 0) + value.numel()
        return found

    def sorted_like(holder: nn.Module, empty: nn.Module) -> list[tuple[str, torch.Size]]:
        shapes = {name: value.shape for name, value in empty.named_parameters()}
        assert {n: b.shape for n, b in empty.named_buffers()} == {n: b.shape for n, b in holder.named_buffers()}
        return [(name, shapes[name]) for name, _ in holder.named_parameters()]

    causal = count(SEAConfig(), 0)
    assert causal == {
        "positions": 2048 * 64,
        "features": 33 * 64,
        "encode": 192 * 128 + 128,
        "norm": 256,
        "rows": 128 * 128 + 128,
        "scales": 258,
        "cnn": 128 + 2 * (24 * 24 * 9 + 24) + 24 * 12 + 12 + 512,
    }
    assert "positions" not in count(SEAConfig(max_length=9000), 0)
    assert "positions" not in count(SEAConfig(positions="fourier"), 0)
    full = count(SEAConfig(slices=128), None)
    assert full["features"] == 266 * 64
    assert full["cnn"] == 2 * (48 * 48 * 9 + 48) + 48 * 12 * 9 + 12


def test_gradients_reach_the_estimator_where_the_definition_says() -> None:
    """A causal selection is hard, so a loss of the output reaches the encoder and the factors alone."""
    model = converted(LLAMA)
    first(model(**LLAMA.inputs())).square().sum().backward()
    reached = {name.split(".sea.")[1] for name, p in new_parameters(model) if p.grad is not None and p.grad.any()}
    assert reached == {
        *("positions", "encode.weight", "encode.bias", "norm.weight", "norm.bias", "scales.weight", "scales.bias"),
    }
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "_proj" in n)
    torch._dynamo.reset()
    encoder = converted(BERT)
    first(encoder(**BERT.inputs())).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in new_parameters(encoder))


@pytest.mark.parametrize("name", rows(["llama", "bert"], quick=["llama"]))
def test_saved_and_loaded_bit_exact(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    model = build(family, "sdpa")
    attnrewrite.convert(model, SMALL, example_kwargs=family.inputs())
    expected = first(model(**family.inputs()))
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    loaded = attnrewrite.load_pretrained(folder)
    state, other = dict(new_state(model)), dict(new_state(loaded))
    assert state.keys() == other.keys()
    assert any(key.endswith("sea.features") for key in state)
    assert any(key.endswith("sea.cnn.first.weight") for key in state)
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert {n for n, _ in new_parameters(loaded)} == {n for n, _ in new_parameters(model)}
    assert torch.equal(first(loaded(**family.inputs())), expected)


def test_conversion_is_deterministic_and_draws_nothing_from_the_global_generator() -> None:
    states = []
    for _ in range(2):
        model = build(LLAMA, "sdpa")
        before = torch.get_rng_state()
        attnrewrite.convert(model, SMALL, example_kwargs=LLAMA.inputs(), verify=False)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(dict(new_state(model)))
        torch.manual_seed(5)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("inner", rows(["eager", "aot_eager"], quick=["aot_eager"]))
def test_compiled_by_the_user_it_is_the_same(inner: str) -> None:
    model = converted(LLAMA)
    x = LLAMA.inputs()
    expected = model(**x).logits
    expected.sum().backward()
    grads = [p.grad.clone() for _, p in new_parameters(model) if p.grad is not None]
    model.zero_grad()
    model.compile(backend="attnrewrite", options={"inner": inner})
    out = model(**x).logits
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    out.sum().backward()
    again = [p.grad for _, p in new_parameters(model) if p.grad is not None]
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_packed_documents_and_cross_attention_are_refused_and_a_plan_leaves_them_out() -> None:
    model, inputs = build(BY_NAME["t5"], "eager"), BY_NAME["t5"].inputs()
    with pytest.raises(AttnRewriteError, match=r"AR307[^$]*different sequences"):
        attnrewrite.convert(model, WHOLE, example_kwargs=inputs)
    expected = first(model(**inputs)).detach()
    attnrewrite.convert(model, WHOLE, example_kwargs=inputs, exclude="*.EncDecAttention")
    torch.testing.assert_close(first(model(**inputs)), expected, rtol=1e-5, atol=1e-5)
    packed = {**LLAMA.inputs(), "position_ids": torch.arange(12).remainder(7).expand(2, 12)}
    with pytest.raises(AttnRewriteError, match=r"AR307[^$]*packed documents"):
        attnrewrite.convert(build(LLAMA, "sdpa"), SMALL, example_kwargs=packed)


def test_a_sequence_longer_than_the_table_is_an_error() -> None:
    model = build(LLAMA, "sdpa")
    attnrewrite.convert(model, SMALL, example_kwargs=LLAMA.inputs())
    with pytest.raises(BackendCompilerFailed, match=r"AR402[^$]*40 positions, and a table of 32"):
        model(torch.ones(1, 40, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize(
    "fields",
    [{"budget": 0}, {"slices": 6}, {"slices": 9, "shrink": 3, "channels": 0}, {"shrink": 2.0}, {"positions": "none"}],
    ids=str,
)
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(AttnRewriteError, match="AR303.*\n.*" + list(fields)[-1]):
        SEAConfig(**fields)


def test_config_survives_json_and_is_read_from_text() -> None:
    config = SEAConfig(slices=12, shrink=3, grouping="per_query", scale_bias=0)
    assert VariantConfig.from_dict(config.to_dict()) == config
    found = parse_config("sea", {"shrink": "3", "slices": "12", "channels": "none", "scale_bias": "0"})
    assert found == SEAConfig(slices=12, shrink=3, scale_bias=0)
    with pytest.raises(AttnRewriteError, match="AR303"):
        parse_config("sea", {"shrink": "three"})
