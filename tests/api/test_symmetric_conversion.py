"""Symmetric and pairwise attention in whole models: conversion, what is removed, decoding, saving, refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from rows import rows
from safetensors.torch import load_file
from symmetric_models import ALL, BY_NAME, SYMMETRIC, model_of, projections
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import attnrewrite
from attnrewrite import AttnRewriteWarning, SelectiveConfig, SymmetricConfig
from attnrewrite.conversion import conversion_of, new_parameters
from attnrewrite.saving import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:AR320")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@torch.no_grad()
def with_keys_as_queries(model: nn.Module) -> nn.Module:
    """Give every head the weights of its queries as those of its keys."""
    for query, key in projections(model):
        key.load_state_dict(query.state_dict())
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3) if name.endswith("bias") else None
        if "c_attn" in name:  # columns of queries, keys and values
            q, k, _ = parameter.chunk(3, -1)
            k.copy_(q)
        if "query_key_value" in name:  # rows of queries, keys and values, head by head
            q, k, _ = parameter.unflatten(0, (4, 3, 8)).unbind(1)
            k.copy_(q)
    for query, key in projections(model):
        key.load_state_dict(query.state_dict())
    return model


@pytest.mark.parametrize(
    "name", rows(["bert", "gpt2", "opt", "gpt_neox", "llama with as many keys"], quick=["bert", "opt"])
)
def test_a_model_whose_keys_are_its_queries_stays_the_same_function(name: str) -> None:
    model, inputs = model_of(name)
    model = with_keys_as_queries(model.double())
    expected = model(**inputs)[0].detach()
    attnrewrite.convert(model, SymmetricConfig("symmetric"), example_kwargs=inputs)
    errors = attnrewrite.fit_errors(model)
    assert list(errors) == list(BY_NAME[name.split()[0]].layers)
    assert max(x for found in errors.values() for x in found["frobenius"] or []) < 1e-12
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-9, atol=1e-11)


def test_pairwise_with_an_invertible_key_projection_is_any_head() -> None:
    """Square key projections, with rotary embedding and several query heads to one key head."""
    model = tiny.llama(num_key_value_heads=1, head_dim=32).double()
    ids = torch.randint(tiny.VOCABULARY, (2, 11))
    with torch.no_grad():
        for _, key in projections(model):
            key.weight.copy_(torch.eye(32) + 0.1 * torch.randn(32, 32))
    expected = model(ids).logits.detach()
    attnrewrite.convert(model, SymmetricConfig(), example_inputs=(ids,))
    assert max(x for found in attnrewrite.fit_errors(model).values() for x in found["frobenius"] or []) < 1e-12
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-11)


# --- what is removed --------------------------------------------------------------------------------------


SMALL = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}


@pytest.mark.parametrize(
    ("sizes", "form", "wanted"),
    [
        ({}, None, 109_514_298),
        ({}, "pairwise", 103_017_018),
        ({}, "symmetric", 102_427_194),
        (SMALL, None, 28_795_194),
        (SMALL, "pairwise", 27_875_642),
        (SMALL, "symmetric", 27_744_570),
    ],
)
def test_parameters_of_the_papers_models(sizes: dict[str, int], form: str | None, wanted: int) -> None:
    """The counts of the authors' published models: BERT with the head of masked language modelling."""
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(**sizes))
    H = model.config.num_attention_heads
    for n in range(model.config.num_hidden_layers if form else 0):
        layer = f"bert.encoder.layer.{n}.attention.self"
        details = {"query": f"{layer}.query", "key": f"{layer}.key", "heads": H, "kv_heads": H, "head_dim": 64}
        details |= {"form": "full" if form == "pairwise" else None, "new_key": True, "bias": True}
        details |= {"rows": False, "order": False}
        for path, module in SymmetricConfig().swapped_modules(model, details).items():
            model.set_submodule(path, module)
    assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize(
    ("name", "config", "gone"),
    [
        ("bert", SYMMETRIC, 2 * (32 * 32 + 32)),
        ("bert", ALL, 2 * (32 * 32 + 32 - 4 * 8 * 8)),
        ("bert", SymmetricConfig(max_error=1.0, pair_form="diag"), 2 * (32 * 32 + 32 - 4 * 8)),
        ("gpt2", SYMMETRIC, 2 * (32 * 32 + 32)),
        ("gpt_neox", ALL, 2 * (32 * 32 + 32 - 4 * 8 * 8)),
        ("llama", ALL, 2 * (32 * 32 - 4 * 8 * 8)),
    ],
    ids=str,
)
def test_removed_weights_are_gone_everywhere_until_restored(
    tmp_path: Path, name: str, config: SymmetricConfig, gone: int
) -> None:
    model, inputs = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names, expected = [n for n, _ in model.named_parameters()], model(**inputs)[0].detach()
    total = sum(p.numel() for p in model.parameters())
    attnrewrite.convert(model, config, example_kwargs=inputs)
    left = dict(model.named_parameters())
    assert sum(p.numel() for p in left.values()) == total - gone
    kept = {id(p): p.numel() for p in model.state_dict(keep_vars=True).values() if isinstance(p, nn.Parameter)}
    assert sum(kept.values()) == total - gone
    folder = attnrewrite.save_pretrained(model, tmp_path / "out")
    files = [load_file(folder / file) for file in ("model.safetensors", WEIGHTS)]
    saved = {key: value for file in files for key, value in file.items() if value.is_floating_point()}
    assert sum(value.numel() for value in saved.values()) == total - gone
    assert {n for n, _ in new_parameters(model)} == {n for n in left if n in files[1]}
    attnrewrite.restore(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**inputs)[0], expected)


def test_a_model_that_was_moved_is_restored_where_it_is() -> None:
    model, inputs = model_of("bert")
    attnrewrite.convert(model, ALL, example_kwargs=inputs)
    attnrewrite.restore(model.double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(**inputs)[0].dtype == torch.float64


# --- decoding, padding, training --------------------------------------------------------------------------


CONVERSIONS = [
    ("llama", ALL),
    ("gpt2", SYMMETRIC),
    ("llama with as many keys", SYMMETRIC),
    ("gpt2", ALL),
    ("llama", SymmetricConfig(max_error=1.0, mask_self=True)),
]


@pytest.mark.parametrize(("name", "config"), rows(CONVERSIONS, quick=CONVERSIONS[:2]), ids=str)
def test_decoding_with_a_cache_equals_the_whole_pass(name: str, config: SymmetricConfig) -> None:
    model, inputs = model_of(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = inputs["input_ids"]
    attnrewrite.convert(model, config, example_inputs=(ids,))
    with torch.no_grad():
        for _, parameter in new_parameters(model):
            parameter.mul_(8.0)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(ids, attention_mask=mask, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [ALL, SYMMETRIC], ids=str)
def test_only_distances_count_and_padding_does_not(config: SymmetricConfig) -> None:
    """S stands before the rotation: a sequence behind padding, at later positions, gives what it gives alone.

    Up to the rotation's tables, which are float32.
    """
    model = tiny.llama(num_key_value_heads=4).double()
    ids = torch.randint(tiny.VOCABULARY, (2, 9))
    attnrewrite.convert(model, config, example_inputs=(ids,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0) if parameter.dim() > 1 else None
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(2, 4), torch.ones(2, 9)], 1).long()
    positions = torch.arange(13).expand(2, -1)
    behind = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    alone = model(ids).logits
    spread = alone.std()
    torch.testing.assert_close(behind / spread, alone / spread, rtol=1e-5, atol=1e-5)
    swapped = model(ids[:, [1, 0, *range(2, 9)]]).logits[:, 2:]
    assert float(((swapped - alone[:, 2:]).abs().max() / spread).detach()) > 1e-2


def test_a_training_step_compiled_whole_reaches_shared_and_pair_weights() -> None:
    model, inputs = model_of("llama")
    ids = inputs["input_ids"]
    attnrewrite.convert(model, ALL, example_inputs=(ids,))
    by_name = dict(model.named_parameters())
    watched = ["model.layers.0.self_attn.q_proj.pair", "model.layers.0.self_attn.k_proj.weight"]
    start = {name: by_name[name].detach().clone() for name in watched}

    def loss() -> Tensor:
        logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    first = loss()
    eager = torch.autograd.grad(first, [by_name[name] for name in watched])
    model.compile(backend="attnrewrite")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = loss()
    compiled.backward()
    torch.testing.assert_close(compiled, first, rtol=1e-5, atol=1e-6)
    for name, gradient in zip(watched, eager, strict=True):
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(by_name[name].grad, gradient, rtol=1e-3, atol=1e-6)
    optimizer.step()
    assert float(loss().detach()) < float(first.detach())
    assert not any(torch.equal(by_name[name], start[name]) for name in watched)


def test_a_copy_has_its_own_weights_and_one_shared_projection() -> None:
    model, inputs = model_of("bert")
    attnrewrite.convert(model, ALL, example_kwargs=inputs)
    expected = model(**inputs)[0].detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = twin.encoder.layer[0].attention.self
        assert layer.query.source[0] is layer.key
        assert layer.key is not model.encoder.layer[0].attention.self.key
        twin.compile(backend="attnrewrite", options={"inner": "eager"})
        assert torch.equal(twin(**inputs)[0], expected)


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", rows(["full", "symmetric", "diag"], quick=["symmetric"]))
@pytest.mark.parametrize("init", ["normal", "scaled", "identity"])
def test_matrices_to_train_from_scratch(init: Any, form: Any) -> None:
    model, inputs = model_of("llama")
    attnrewrite.convert(model, SymmetricConfig(pair_init=init, pair_form=form), example_kwargs=inputs)
    query = model.model.layers[0].self_attn.q_proj
    pair = query.matrices().detach()
    assert pair.shape == (4, 8, 8)
    assert query.pair.shape == ((4, 8) if form == "diag" else (4, 8, 8))
    spread = {"normal": 1.0, "scaled": 8**-0.5}
    if init == "identity":
        assert torch.equal(pair, torch.eye(8).expand(4, 8, 8))
    else:
        diagonal = pair.diagonal(dim1=-2, dim2=-1)
        assert 0.6 < float(diagonal.std()) / spread[init] < 1.5
    if form != "full":
        assert torch.equal(pair, pair.mT)


def test_identity_starts_as_symmetric_attention_of_the_keys() -> None:
    first, inputs = model_of("bert")
    with torch.no_grad():
        for query, key in projections(first):
            query.load_state_dict(key.state_dict())
    second = copy.deepcopy(first)
    expected = first(**inputs)[0]
    attnrewrite.convert(second, SymmetricConfig(pair_init="identity"), example_kwargs=inputs)
    torch.testing.assert_close(second(**inputs)[0], expected)


@pytest.mark.parametrize("name", rows(["bert", "gpt2", "llama", "gpt_neox"], quick=["gpt_neox"]))
def test_a_fit_to_data_is_closer_on_these_data(name: str) -> None:
    """In the inputs' norm the fit with data has the smaller error, and the outputs are nearer to the original's."""
    distances, errors = [], []
    for fit in ("weights", "data"):
        model, inputs = model_of(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn(parameter.shape))
        expected = model(**inputs)[0].detach()
        attnrewrite.convert(model, SymmetricConfig(fit=fit, max_error=1.0), example_kwargs=inputs)  # type: ignore[arg-type]  # a Literal
        distances.append(float((model(**inputs)[0] - expected).norm().detach()))
        found = attnrewrite.fit_errors(model)
        errors.append([x for layer in found.values() for x in layer["weighted"] or layer["frobenius"] or []])
        assert all((layer["weighted"] is None) == (fit == "weights") for layer in found.values())
    assert distances[1] < distances[0]
    assert sum(errors[1]) < sum(errors[0])


def test_layers_that_are_too_far_off_stay_and_are_named() -> None:
    model, inputs = model_of("bert")
    with torch.no_grad():
        query, key = list(projections(model))[1]
        key.load_state_dict(query.state_dict())
    with pytest.warns(AttnRewriteWarning, match=r"AR321.*\n  1 of 2 layers stay.*max_error = 0\.3: encoder\.layer\.0"):
        attnrewrite.convert(model, SymmetricConfig(), example_kwargs=inputs)
    assert list(attnrewrite.fit_errors(model)) == ["encoder.layer.1.attention.self"]
    assert isinstance(model.encoder.layer[0].attention.self.query, nn.Linear)
    assert model(**inputs)[0].isfinite().all()


def test_symmetric_in_causal_layers_is_warned_of_once() -> None:
    model, inputs = model_of("llama with as many keys")
    with pytest.warns(AttnRewriteWarning, match=r"AR320.*\n  2 of 2 layers are causal, 2 have rotary") as caught:
        attnrewrite.convert(model, SYMMETRIC, example_kwargs=inputs)
    assert sum("AR320" in str(x.message) for x in caught) == 1


def test_a_plan_with_another_variant_in_other_layers() -> None:
    model, inputs = model_of("gpt2")
    plan = {"transformer.h.0.attn": ALL, "*": SelectiveConfig()}
    attnrewrite.convert(model, plan, example_kwargs=inputs)
    found = conversion_of(model)
    assert found is not None
    assert [config.variant for config in found.sites.values()] == ["symmetric", "selective"]
    assert list(attnrewrite.fit_errors(model)) == ["transformer.h.0.attn"]
    names = [n for n, _ in new_parameters(model)]
    assert names[-1] == "transformer.h.1.attn.selective.gamma"
    assert len(names) == 4
    model(**inputs)[0].sum().backward()
    assert all(p.grad is not None for _, p in new_parameters(model))
    assert conversion_of(attnrewrite.restore(model)) is None
