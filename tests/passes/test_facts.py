"""The facts of a site beyond its normal form, against what the models' configs state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from families import FAMILIES, HEAD_DIM, Family, build, text_inputs

from attnrewrite.explanation import explain
from attnrewrite.passes.graph.capture import from_dynamo
from attnrewrite.passes.pipeline import Pipeline
from attnrewrite.passes.report import Report, Site

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Case:
    """A model by its config, and facts that all of its sites have."""

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    inputs: Callable[[], dict[str, Any]] = text_inputs


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def _half(dims: int = HEAD_DIM, **facts: Any) -> dict[str, Any]:
    return {"rope": "half", "rope_dims": dims, **facts}


def _interleaved(dims: int = HEAD_DIM, **facts: Any) -> dict[str, Any]:
    return {"rope": "interleaved", "rope_dims": dims, **facts}


NO_ROPE = {"rope": "none", "rope_dims": 0}
CASES = [
    Case("Mistral", {**TEXT, "num_key_value_heads": 2, "sliding_window": 8}, _half(qk_norm="none")),
    Case("Qwen3", {**TEXT, **GROUPED}, _half(qk_norm="rms")),
    Case("Olmo2", TEXT, _half(qk_norm="rms")),
    Case("Phi", {**TEXT, "partial_rotary_factor": 0.5}, _half(HEAD_DIM // 2)),
    Case("Phi3", {**TEXT, "eos_token_id": 1}, _half()),
    Case("GPTJ", GPT, _interleaved(4)),
    Case("CodeGen", {**GPT, "n_ctx": 64}, _interleaved(4)),
    Case("Persimmon", TEXT, _half(HEAD_DIM // 2, qk_norm="layer")),
    Case("StableLm", {**TEXT, **GROUPED, "qk_layernorm": True}, _half(2, qk_norm="layer")),
    Case("Cohere", {**TEXT, "use_qk_norm": True}, _interleaved(qk_norm="layer")),
    Case("Glm4", {**TEXT, **GROUPED, "eos_token_id": 1}, _interleaved(HEAD_DIM // 2)),
    Case("Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}, {**NO_ROPE, "kinds": ["alibi"]}),
    Case("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}, {**NO_ROPE, "kinds": ["alibi"]}),
    Case("Falcon", {**SIZES, "alibi": False}, _half(kinds=[])),
]


def explained(name: str, config: dict[str, Any], inputs: dict[str, Any], head: str = "ForCausalLM") -> list[Site]:
    torch.manual_seed(0)
    made = getattr(tf, f"{name}Config")(attn_implementation="eager", **config)
    report = explain(getattr(tf, name + head)(made).eval(), **inputs)
    assert Report.from_dict(report.to_dict()) == report
    assert report.sites
    assert all(site.status == "matched" for site in report.sites)
    return report.sites


def dynamo_report(model: torch.nn.Module, inputs: dict[str, Any]) -> Report:
    report = Report()

    def collect(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        report.extend(Pipeline(verify=False).inspect(from_dynamo(gm, example_inputs))[0])
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=collect)(**inputs)
    return report


def facts(site: Site, like: dict[str, Any]) -> dict[str, Any]:
    return {name: [b.kind for b in site.bias] if name == "kinds" else getattr(site, name) for name in like}


SLOW = ("Mistral", "Olmo2", "Phi3", "CodeGen", "StableLm")  # kin of others in the list
PARAMS = [pytest.param(c, marks=[pytest.mark.slow] if c.name in SLOW else [], id=c.name) for c in CASES]


@pytest.mark.parametrize("case", PARAMS)
def test_facts_are_those_of_the_config(case: Case) -> None:
    for site in explained(case.name, case.config, case.inputs()):
        assert facts(site, case.facts) == case.facts
        assert (site.dtype, site.softmax_dtype, site.cross, site.cache) == ("float32", "float32", False, "none")
        assert (site.sink, site.gated, site.other_users) == (False, False, [])
        assert all(made is not None and made.modules and made.weights for made in site.projections.values())


ENTRIES = [(family, "export") for family in FAMILIES] + [(f, "dynamo") for f in FAMILIES if f.name in ("llama", "gpt2")]


@pytest.mark.parametrize(("family", "entry"), ENTRIES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_facts_of_the_first_families(family: Family, entry: str) -> None:
    model = build(family, family.implementations[0])
    report = explain(model, **family.inputs()) if entry == "export" else dynamo_report(model, family.inputs())
    turned = {"llama": 8, "gpt_neox": 2, "gemma2": 8, "gpt_oss": 8}
    rope = ("half", turned[family.name]) if family.name in turned else ("none", 0)
    weights = {name for name, _ in model.named_parameters()}
    for site in report.sites:
        assert (site.rope, site.rope_dims, site.qk_norm) == (*rope, "none")
        assert site.cross == ("EncDec" in site.layer)
        assert [(b.kind, b.trainable) for b in site.bias] == [("relative", True)] * len(site.bias)
        for made in site.projections.values():
            assert made is not None
            assert all(module.startswith(site.layer) for module in made.modules)
            assert set(made.weights) <= weights
            assert len(made.weights) == 1
            assert made.fused == (family.name in ("gpt2", "gpt_neox"))
            assert not made.opaque
            assert not made.shared


def test_facts_are_found_by_module_path() -> None:
    made = explained("Llama", TEXT, text_inputs())[0].projections
    paths = {role: p and (p.modules, p.weights) for role, p in made.items()}
    at = "model.layers.0.self_attn"
    assert paths == {
        role: ([f"{at}.{short}_proj"], [f"{at}.{short}_proj.weight"])
        for role, short in {"query": "q", "key": "k", "value": "v"}.items()
    }


def test_biases_of_windows_are_relative_tables_and_static() -> None:
    plain, shifted = explained("Swin", SWIN, _image(), head="Model")
    assert [(b.kind, b.trainable, b.shape) for b in plain.bias] == [("relative", True, [1, 2, 16, 16])]
    assert [(b.kind, b.trainable) for b in shifted.bias] == [("relative", True), ("static", False)]
    assert explained("Swinv2", SWIN, _image(), head="Model")[0].qk_norm == "l2"


def test_compressed_keys_are_no_other_sequence() -> None:
    config = {**TEXT, **MLA, "n_routed_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    config |= {"num_key_value_heads": 4}
    (site,) = explained("DeepseekV3", config, text_inputs())
    assert (site.rope, site.rope_dims, site.cross, site.head_dim) == ("interleaved", 4, False, 12)
    key, value = site.projections["key"], site.projections["value"]
    assert key is not None
    assert value is not None
    at = "model.layers.0.self_attn"
    assert sorted(key.modules) == [f"{at}.kv_a_proj_with_mqa", f"{at}.kv_b_proj"]
    assert (key.fused, value.modules) == (True, [f"{at}.kv_b_proj"])


def test_whisper_attends_across() -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    sizes |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 4),)}
    sizes |= {"max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    ids = text_inputs()["input_ids"]
    inputs = {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids, "use_cache": False}
    sites = explained("Whisper", {**sizes, "decoder_start_token_id": 1}, inputs, head="Model")
    assert [site.cross for site in sites] == [False, False, True]


def test_sinks_are_told() -> None:
    config = {**TEXT, **GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
    (site,) = explained("GptOss", config, text_inputs())
    assert (site.sink, site.rope, site.other_users) == (True, "half", [])


def test_weights_that_are_returned_are_used_elsewhere() -> None:
    config = {**TEXT, "output_attentions": True}
    assert explained("Llama", config, text_inputs())[0].other_users == ["probs"]


def _cached(cache: Any, steps: int) -> list[Site]:
    """Return the sites of the calls: a prompt and ``steps`` tokens after it."""
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(attn_implementation="eager", **TEXT)).eval()
    cache = cache(model.config)
    sites = []
    ids = text_inputs()["input_ids"]
    for step in range(1 + steps):
        inputs = {"input_ids": ids if step == 0 else ids[:, :1], "past_key_values": cache, "use_cache": True}
        sites += dynamo_report(model, inputs).sites
    return sites


def test_a_growing_cache_is_joined() -> None:
    first, second = _cached(lambda config: tf.DynamicCache(config=config), 1)
    assert second.cache == "cat"
    assert second.other_users == ["key", "value"]
    assert first.other_users == ["key", "value"]
    assert (second.rope, second.cross) == ("half", False)
    assert all(made is not None and made.modules for made in second.projections.values())


def test_a_static_cache_is_written() -> None:
    first, second = _cached(lambda config: tf.StaticCache(config=config, max_cache_len=32), 1)
    assert (first.cache, second.cache) == ("index_copy", "index_copy")
    assert second.projections["key"] == first.projections["key"]
    assert second.rope == "half"
