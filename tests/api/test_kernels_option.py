"""``kernels="triton"``: converted models on generated kernels, on a GPU or in triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_support import DEVICE
from tiny import llama
from torch._dynamo.exc import BackendCompilerFailed

from attnrewrite import (
    AttnRewriteError,
    RoutingConfig,
    SelectiveConfig,
    SelectiveSSAConfig,
    SSAConfig,
    VariantConfig,
    convert,
)
from attnrewrite.backend import Backend
from attnrewrite.kernels.generation.loading import load
from attnrewrite.passes.report import Site

IDS = torch.arange(24, device=DEVICE).view(2, 12) % 96
INPUTS = {"input_ids": IDS, "use_cache": False}


def step(model: torch.nn.Module) -> list[torch.Tensor]:
    """Logits, and the gradients of all parameters."""
    model.zero_grad()
    logits = model(**INPUTS).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compiled(model: torch.nn.Module, kernels: Any) -> tuple[list[torch.Tensor], list[str]]:
    outputs, sites = compiled_sites(model, kernels)
    return outputs, [site.implementation for site in sites]


def compiled_sites(model: torch.nn.Module, kernels: Any) -> tuple[list[torch.Tensor], list[Site]]:
    torch._dynamo.reset()
    found: list[Site] = []
    model.compile(backend=Backend(inner="aot_eager", kernels=kernels, report=lambda x: found.extend(x.sites)))
    return step(model), found


@pytest.mark.triton
@pytest.mark.parametrize(
    "config", [None, SelectiveConfig(), SSAConfig(), SelectiveSSAConfig()], ids=["sdpa", "selective", "ssa", "both"]
)
def test_a_model_computes_and_learns_the_same_on_kernels(config: VariantConfig | None) -> None:
    model = llama(num_hidden_layers=1).to(DEVICE)
    if config is not None:
        convert(model, config, example_kwargs=INPUTS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "selective" in name or "ssa" in name:
                    parameter.add_(0.3)
    reference, plain = compiled(model, "reference")
    found, run = compiled(model, "triton")
    assert "triton" not in plain
    assert run == ["triton"]
    for a, b in zip(found, reference, strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_the_report_names_the_kernels_that_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNREWRITE_DUMP_DIR", str(tmp_path))
    load.cache_clear()
    model = convert(llama(num_hidden_layers=1), SelectiveConfig(), example_kwargs=INPUTS)
    _, sites = compiled_sites(model, "triton")
    names = {path.stem for path in tmp_path.iterdir()}
    assert len(names) == 8
    assert set(sites[0].kernels) == names
    _, sites = compiled_sites(model, "reference")
    assert not sites[0].kernels


@pytest.mark.triton
def test_eager_attention_goes_to_the_plain_kernel() -> None:
    model = llama(num_hidden_layers=1, attn_implementation="eager").to(DEVICE)
    reference, plain = compiled(model, "auto")
    found, run = compiled(model, "triton")
    assert (plain, run) == (["fused"], ["triton"])
    for a, b in zip(found, reference, strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_a_variant_without_kernels_is_an_error_where_they_are_asked_for() -> None:
    plain = llama(num_hidden_layers=1).to(DEVICE)
    model = convert(plain, RoutingConfig(clusters=1, window_size=64), example_kwargs=INPUTS)
    with pytest.raises((AttnRewriteError, BackendCompilerFailed), match="AR403"):
        compiled(model, "triton")


def test_without_a_gpu_or_the_interpreter_the_option_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(AttnRewriteError, match="no GPU") as caught:
        Backend(kernels="triton")
    assert caught.value.code == "AR403"
    assert "TRITON_INTERPRET=1" in str(caught.value)
