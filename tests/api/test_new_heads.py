"""Selective attention whose votes come from a head of its own: how it starts, learns, decodes, is saved, is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from rows import rows
from spellings import WIDTH, NanoGPT
from tiny import llama
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import DynamicCache, StaticCache

import attnrewrite
from attnrewrite import AttnRewriteError, SelectiveConfig, SelectiveSSAConfig
from attnrewrite.conversion import compile_in_place, new_parameters
from attnrewrite.inference import SelectiveCache
from attnrewrite.kernels.selective import reference
from attnrewrite.observation import Observed, outputs_observed
from attnrewrite.passes.rules import RULES

BY_NAME = {family.name: family for family in FAMILIES}
LENGTH = 14
IDS = torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))  # three pads on the left
PLACES = (MASK.cumsum(-1) - 1).clamp(min=0)
REAL = MASK.bool()
INPUTS = {"input_ids": IDS, "use_cache": False}
MODES: Any = ["new-head", "selector"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def converted(model: nn.Module, config: Any, **inputs: Any) -> Any:
    """Convert, and move the new weights far from their start, so that votes matter."""
    torch.manual_seed(1)
    attnrewrite.convert(model, config, example_kwargs=inputs or INPUTS)
    with torch.no_grad():
        for _, weight in new_parameters(model):
            weight.normal_(std=0.7)
    return model


@torch.no_grad()
def logits(model: nn.Module, **changes: Any) -> Tensor:
    found: Tensor = model(**{**INPUTS, **changes}).logits
    return found


@torch.no_grad()
def whole(model: Any) -> Tensor:
    found: Tensor = model(IDS, attention_mask=MASK, position_ids=PLACES, use_cache=False).logits[REAL]
    return found


@torch.no_grad()
def stepwise(model: Any, cache: Any, cuts: tuple[int, ...] = (5, 6, 7)) -> Tensor:
    out, start = [], 0
    for stop in (*cuts, LENGTH):
        given = {"attention_mask": MASK[:, :stop], "position_ids": PLACES[:, start:stop]}
        out.append(model(IDS[:, start:stop], past_key_values=cache, **given).logits)
        start = stop
    return torch.cat(out, 1)[REAL]


# --- how it starts and learns --------------------------------------------------------------------------


def test_a_new_head_starts_as_the_same_function_to_the_bit() -> None:
    """Next to votes that count nothing, which need the same kernel."""
    plain = llama()
    gate = attnrewrite.convert(copy.deepcopy(plain), SelectiveConfig(), example_kwargs=INPUTS)
    head = attnrewrite.convert(copy.deepcopy(plain), SelectiveConfig("new-head"), example_kwargs=INPUTS)
    assert torch.equal(logits(head), logits(gate))
    assert torch.allclose(logits(head), logits(plain), atol=1e-5)
    width, D = 32, 8
    shapes = {name.rpartition(".")[2]: tuple(weight.shape) for name, weight in new_parameters(head)}
    assert shapes == {"q_proj": (D, width), "k_proj": (D, width), "v_proj": (D, width), "o_proj": (width, D)}


def test_a_selector_starts_near_the_same_function_and_votes() -> None:
    plain = llama().double()
    model = attnrewrite.convert(copy.deepcopy(plain), SelectiveConfig("selector"), example_kwargs=INPUTS)
    moved = (logits(model) - logits(plain)).abs().max()
    assert 0 < moved < 1e-4
    loss = model(**INPUTS, labels=IDS).loss
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for _, weight in new_parameters(model))


def test_a_new_head_is_alive() -> None:
    """Its output learns first, then its keys, by what it attends to, and then it votes."""
    model = attnrewrite.convert(llama(), SelectiveConfig("new-head"), example_kwargs=INPUTS)
    weights = dict(new_parameters(model))
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    moving = []
    for _ in range(3):
        optimizer.zero_grad()
        model(**INPUTS, labels=IDS).loss.backward()
        moving.append({name.rpartition(".")[2] for name, x in weights.items() if x.grad is not None and x.grad.any()})
        optimizer.step()
    assert moving == [{"o_proj"}, {"o_proj", "v_proj", "k_proj"}, {"o_proj", "v_proj", "k_proj", "q_proj"}]


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_computes_what_the_reference_computes(mode: Any) -> None:
    """In float64, with the new head's own attention put together by hand."""
    layer = NanoGPT().double()
    x = torch.randn(2, 13, WIDTH, dtype=torch.float64)
    attnrewrite.convert(layer, SelectiveConfig(mode), example_inputs=(x,))
    own: Any = layer.selective
    with torch.no_grad():
        for weight in own.parameters():
            weight.normal_(std=0.7)
        votes = {"vote_query": linear(x, own.q_proj.double()), "vote_key": linear(x, own.k_proj.double())}
        heads = layer.c_attn(x).unflatten(-1, (3, -1, own.q_proj.shape[0])).permute(2, 0, 3, 1, 4)
        expected = layer.c_proj(reference.selective_attention(*heads, **votes).transpose(1, 2).flatten(2))
        if mode == "new-head":
            qkv = (linear(x, w.double()).unsqueeze(1) for w in (own.q_proj, own.k_proj, own.v_proj))
            expected += linear(reference.selective_attention(*qkv)[:, 0], own.o_proj.double())
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inner", rows(["aot_eager", "eager"], quick=["eager"]))
def test_training_with_and_without_the_cache_that_models_make(mode: Any, inner: Any) -> None:
    model = converted(llama(num_hidden_layers=1), SelectiveConfig(mode))
    limits: Any = {"recompile_limit": 64, "isolate_recompiles": True}
    model.compile(backend=attnrewrite.Backend(inner=inner), **limits)
    gradients = []
    for use_cache in (True, False):
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=use_cache).loss.backward()
        gradients.append([x.grad for x in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None and a.any()
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_observed_model_is_what_it_was_before() -> None:
    """Also where the observer runs what the layer was converted to, as distillation does."""
    model = converted(llama(num_hidden_layers=1), SelectiveConfig("new-head"))

    def see(at: Observed) -> None:
        RULES[at.request.variant].function(at.request)(at.tensors)

    (out,) = outputs_observed(model, [INPUTS], see)
    assert torch.allclose(out.logits, logits(llama(num_hidden_layers=1)), atol=1e-5)
    (out,) = outputs_observed(model, [INPUTS], see, converted=True)
    assert torch.allclose(out.logits, logits(model), atol=1e-5)


# --- with a cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "beams"), [("new-head", 2), ("selector", 1)])
def test_tokens_are_those_of_generation_without_a_cache(mode: Any, beams: int) -> None:
    model = converted(llama(num_hidden_layers=1), SelectiveConfig(mode))
    settings = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    caches: list[dict[str, Any]] = [{"use_cache": False}, {}, {"cache_implementation": "static"}]
    found = [model.generate(IDS[:, :9], attention_mask=MASK[:, :9], **settings, **cache) for cache in caches]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("config", [*map(SelectiveConfig, MODES), SelectiveSSAConfig(mode="new-head")], ids=str)
def test_steps_equal_the_whole(config: Any) -> None:
    model = converted(llama(num_hidden_layers=1), config)
    expected = whole(model)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 2)):
        assert torch.allclose(stepwise(model, cache), expected, atol=1e-4)
    attnrewrite.restore(model)
    assert not torch.allclose(whole(model), expected, atol=1e-2)


@pytest.mark.slow
def test_budgets() -> None:
    model = converted(llama(), SelectiveConfig("new-head"))
    assert torch.allclose(stepwise(model, SelectiveCache(model.config, LENGTH)), whole(model), atol=1e-5)
    cache, again = (SelectiveCache(model.config, [6, 9]) for _ in range(2))
    assert torch.allclose(stepwise(model, cache), stepwise(model, again, ()), atol=1e-4)
    assert [layer.keys.shape[2] for layer in cache.layers] == [6, 9]
    assert [layer.state["vote_key"].shape[1] for layer in cache.layers] == [6, 9]


FAMILIES = [("gpt2", "new-head"), ("gemma2", "new-head"), ("gpt_neox", "selector")]


@pytest.mark.parametrize(("name", "mode"), rows(FAMILIES, quick=FAMILIES[:1]))
def test_other_families(name: str, mode: Any) -> None:
    """Windows and soft cap, another name of the argument, fused projections."""
    model = converted(build(BY_NAME[name], "eager"), SelectiveConfig(mode))
    expected = whole(model)
    assert torch.allclose(stepwise(model, DynamicCache(config=model.config), (9, 10)), expected, atol=1e-4)


# --- saved, copied, exported, undone -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_saved_loaded_copied_and_restored(mode: Any, tmp_path: Path) -> None:
    plain = llama(num_hidden_layers=1)
    model = converted(copy.deepcopy(plain), SelectiveConfig(mode))
    expected = logits(model)
    folder = attnrewrite.save_pretrained(model, tmp_path / "saved")
    assert torch.equal(logits(attnrewrite.load_pretrained(folder)), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compile_in_place(other)
        assert torch.equal(logits(other), expected)
    attnrewrite.restore(model)
    assert torch.equal(logits(model), logits(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_exported(mode: Any, tmp_path: Path) -> None:
    model = converted(llama(num_hidden_layers=1), SelectiveConfig(mode))
    expected = logits(model)
    file = attnrewrite.export(model, (IDS,), tmp_path / "model.pt2")
    found = torch.export.load(file).module()(IDS)
    found = found if isinstance(found, Tensor) else next(x for x in found.values() if isinstance(x, Tensor))
    assert torch.allclose(found, expected, atol=1e-4)


# --- refusals ------------------------------------------------------------------------------------------


class TokensFirst(nn.Module):
    """Causal attention of [L, B, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).permute(1, 2, 0, 3) for y in self.qkv(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.out(out.permute(2, 0, 1, 3).flatten(2))
        return found


class Narrow(NanoGPT):
    """Its output is not as wide as its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 2, 16), (4, 4, 16)])
def test_tokens_before_batch_are_refused(mode: Any, shape: tuple[int, ...]) -> None:
    layer = TokensFirst()
    with pytest.raises(AttnRewriteError, match=r"AR307.*(.|\n)*batch, tokens, features"):
        attnrewrite.convert(layer, SelectiveConfig(mode), example_inputs=(torch.randn(shape),))
    assert not hasattr(layer, "selective")


def test_an_output_of_another_width_is_refused() -> None:
    layer, x = Narrow(), torch.randn(2, 13, WIDTH)
    with pytest.raises(AttnRewriteError, match=r"AR30[79]"):  # the compiler hides the hook's own error
        attnrewrite.convert(layer, SelectiveConfig("new-head"), example_inputs=(x,))
    assert not hasattr(layer, "selective")
    attnrewrite.convert(layer, SelectiveConfig("selector"), example_inputs=(x,))
