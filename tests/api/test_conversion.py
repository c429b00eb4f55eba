"""convert and restore: new parameters that train, an unchanged function at the start, and nothing half-done."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family, build, padded
from spellings import WIDTH, GraphBreak, NanoGPT
from tiny import llama
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import attnrewrite
from attnrewrite import AttnRewriteError, SelectiveConfig, SSAConfig
from attnrewrite.conversion import conversion_of, new_parameters

X = torch.randn(2, 13, WIDTH, generator=torch.Generator().manual_seed(0))
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


CAUSAL = ("llama", "gpt2", "opt", "gpt_neox", "gemma2")
IDENTITY = (
    [(name, SSAConfig()) for name in BY_NAME]
    + [("llama", SSAConfig(gate="full")), ("t5", SSAConfig(gate="shared"))]
    + [(name, SelectiveConfig()) for name in CAUSAL]
)


@pytest.mark.parametrize(
    ("name", "config"), IDENTITY, ids=[f"{n}-{c.variant}-{getattr(c, 'gate', c)}" for n, c in IDENTITY]
)
def test_conversion_keeps_the_function_adds_live_parameters_and_is_undone(name: str, config: Any) -> None:
    family: Family = BY_NAME[name]
    model = build(family, "eager")
    inputs = padded(family.inputs()) if family.padded else family.inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = first(model(**inputs)).detach()
    assert attnrewrite.convert(model, config, example_kwargs=inputs) is model
    added = [key for key in model.state_dict() if key not in before]
    assert added == [n for n, _ in new_parameters(model)]
    names = ("gamma",) if config.variant == "selective" else ("q_gate", "v_gate", "q_gain", "v_gain")
    assert added == [f"{layer}.{config.variant}.{n}" for layer in family.layers for n in names]
    out = first(model(**inputs))
    assert torch.allclose(out, expected, atol=3e-6)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for _, p in new_parameters(model))
    assert {n for n, _ in new_parameters(model)} <= {n for n, _ in model.named_parameters()}
    attnrewrite.restore(model)
    assert conversion_of(model) is None
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(first(model(**inputs)), expected)


class SsaByHand(NanoGPT):
    """nanoGPT's attention with temperatures, written out: tau = 1 + gain ln n + tanh(w · GELU(u))."""

    def __init__(self, sigmoid: bool) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        self.q_gate, self.v_gate = (nn.Parameter(torch.zeros(4, 8)) for _ in range(2))
        self.q_gain, self.v_gain = (nn.Parameter(torch.zeros(())) for _ in range(2))

    def tau(self, u: Tensor, gate: Tensor, gain: Tensor) -> Tensor:
        n = torch.arange(1, u.shape[2] + 1, dtype=u.dtype)
        gain = torch.sigmoid(gain) if self.sigmoid else gain
        return 1 + gain * n.log() + torch.tanh((F.gelu(u) * gate[:, None]).sum(-1))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, 4, 8).transpose(1, 2) for y in self.c_attn(x).split(WIDTH, dim=2))
        q, v = (
            q * self.tau(q, self.q_gate, self.q_gain)[..., None],
            v * self.tau(v, self.v_gate, self.v_gain)[..., None],
        )
        scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
        return self.c_proj((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(B, T, C))


@pytest.mark.parametrize("position", ["linear", "sigmoid"])
def test_ssa_equals_the_formulas_written_by_hand_with_all_gradients(position: str) -> None:
    model = NanoGPT().double()
    by_hand = SsaByHand(position == "sigmoid").double()
    by_hand.load_state_dict(model.state_dict(), strict=False)
    attnrewrite.convert(model, SSAConfig(position=position), example_inputs=(X.double(),))  # type: ignore[arg-type]  # a Literal
    model.double()
    with torch.no_grad():
        for (_, ours), name in zip(new_parameters(model), ("q_gate", "v_gate", "q_gain", "v_gain"), strict=True):
            ours.copy_(torch.randn(ours.shape, dtype=torch.float64) * 0.3)
            getattr(by_hand, name).copy_(ours)
    weights = torch.randn(X.shape, dtype=torch.float64)
    outs = [m(X.double()) for m in (model, by_hand)]
    assert torch.allclose(*outs, atol=1e-12)
    for out in outs:
        (out * weights).sum().backward()
    hand = dict(by_hand.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, hand[name.removeprefix("ssa.")].grad, atol=1e-10), name


def test_ssa_trains_with_an_optimizer_of_its_own() -> None:
    model = build(BY_NAME["gpt2"], "sdpa")
    ids = BY_NAME["gpt2"].inputs()["input_ids"]
    attnrewrite.convert(model, SSAConfig(), example_inputs=(ids,))
    optimizer = torch.optim.AdamW([p for _, p in new_parameters(model)], lr=0.05, weight_decay=0.0)

    def loss() -> Tensor:
        logits = model(ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    start = float(loss())
    for _ in range(12):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss()) < start - 1e-3


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_generation_with_a_cache_equals_generation_without(impl: str) -> None:
    model = build(BY_NAME["llama"], impl)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    inputs = padded(BY_NAME["llama"].inputs())
    inputs.pop("use_cache")
    attnrewrite.convert(model, SSAConfig(), example_kwargs=inputs)
    with torch.no_grad():
        for _, parameter in new_parameters(model):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached, whole = (model.generate(**inputs, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    for a, b in zip(cached.logits, whole.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_plan_of_several_variants_and_other_layers_left_alone() -> None:
    model, inputs = build(BY_NAME["t5"], "eager"), BY_NAME["t5"].inputs()
    expected = first(model(**inputs)).detach()
    plan = {"decoder.*.SelfAttention": SelectiveConfig(), "encoder.*": SSAConfig(), "*": "sdpa"}
    attnrewrite.convert(model, plan, example_kwargs=inputs)
    found = conversion_of(model)
    assert found is not None
    assert {layer: config.variant for layer, config in found.sites.items()} == {
        "encoder.block.0.layer.0.SelfAttention": "ssa",
        "encoder.block.1.layer.0.SelfAttention": "ssa",
        "decoder.block.0.layer.0.SelfAttention": "selective",
        "decoder.block.1.layer.0.SelfAttention": "selective",
    }
    assert torch.allclose(first(model(**inputs)), expected, atol=3e-6)


def test_full_compilation_replaces_the_one_in_place() -> None:
    model = build(BY_NAME["llama"], "eager")
    inputs = BY_NAME["llama"].inputs()
    attnrewrite.convert(model, SSAConfig(), example_kwargs=inputs)
    with torch.no_grad():
        expected = first(model(**inputs))
        model.compile(backend="attnrewrite")
        assert torch.allclose(first(model(**inputs)), expected, atol=1e-5)


# --- wrong calls, and nothing half-done ------------------------------------------------------------------


def untouched(model: nn.Module, action: Callable[[], Any]) -> BaseException:
    """Run an action that must fail, and check that the model is as it was."""
    keys, hooks = set(model.state_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
    compiled = model._compiled_call_impl
    with pytest.raises(BaseException) as caught:  # the caller looks at the error itself
        action()
    assert set(model.state_dict()) == keys
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model._compiled_call_impl is compiled
    return caught.value


def code_of(model: nn.Module, action: Callable[[], Any]) -> tuple[str, str]:
    failure = untouched(model, action)
    assert isinstance(failure, AttnRewriteError), failure
    return failure.code, str(failure)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)


class Data(NanoGPT):
    """Control flow that depends on data cannot be captured."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_every_wrong_call_is_named_and_changes_nothing() -> None:
    model, ssa = GraphBreak().first, SSAConfig()
    convert = attnrewrite.convert
    assert code_of(model, lambda: convert(model, "sssa", example_inputs=(X,)))[0] == "AR301"
    assert code_of(model, lambda: convert(model, ssa))[0] == "AR104"
    assert code_of(model, lambda: convert(model, ssa, example_inputs=(X[..., :5],)))[0] == "AR104"
    data = Data()
    assert code_of(data, lambda: convert(data, ssa, example_inputs=(X,)))[0] == "AR105"
    linear = nn.Linear(WIDTH, WIDTH)
    assert code_of(linear, lambda: convert(linear, ssa, example_inputs=(X,)))[0] == "AR201"
    encoder = Encoder()
    code, text = code_of(encoder, lambda: convert(encoder, SelectiveConfig(), example_inputs=(X,)))
    assert (code, "sees all keys" in text) == ("AR307", True)
    llama = build(BY_NAME["llama"], "eager")
    kwargs = BY_NAME["llama"].inputs()
    code, text = code_of(llama, lambda: convert(llama, ssa, example_kwargs=kwargs, targets="model.layer.*.self_attn"))
    assert (code, "model.layers.0.self_attn" in text) == ("AR306", True)
    assert code_of(llama, lambda: convert(llama, ssa, example_kwargs=kwargs, exclude="*"))[0] == "AR306"
    code, text = code_of(llama, lambda: convert(llama, "sdpa", example_kwargs=kwargs))
    assert (code, "torch.compile(model, backend='attnrewrite')" in text) == ("AR306", True)
    llama.model.layers[1].self_attn.ssa = nn.Linear(1, 1)
    assert code_of(llama, lambda: convert(llama, ssa, example_kwargs=kwargs))[0] == "AR311"
    assert code_of(model, lambda: attnrewrite.restore(model))[0] == "AR310"
    wrapped = torch.compile(model)
    assert code_of(model, lambda: convert(wrapped, ssa, example_inputs=(X,)))[0] == "AR102"


def test_converting_twice_is_refused() -> None:
    model = NanoGPT()
    attnrewrite.convert(model, SSAConfig(), example_inputs=(X,))
    again = code_of(model, lambda: attnrewrite.convert(model, SelectiveConfig(), example_inputs=(X,)))
    assert (again[0], "ssa in 1 layers" in again[1]) == ("AR305", True)
    raw = attnrewrite.Backend(variant=SelectiveConfig(mode="raw"), inner="eager")
    with pytest.raises(BackendCompilerFailed, match="AR305"):
        torch.compile(model.forward, backend=raw)  # compiled below
        model.compile(backend=raw)
        model(X)


def test_an_interrupted_conversion_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrewrite import conversion

    model = build(BY_NAME["llama"], "eager")
    calls: list[str] = []
    install = conversion.install

    def interrupted(*args: Any) -> None:
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        install(*args)

    monkeypatch.setattr(conversion, "install", interrupted)
    inputs = BY_NAME["llama"].inputs()
    failure = untouched(model, lambda: attnrewrite.convert(model, SSAConfig(), example_kwargs=inputs))
    assert isinstance(failure, KeyboardInterrupt)
    assert len(calls) == 2


def test_a_conversion_that_changes_the_function_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrewrite.variants import ssa

    monkeypatch.setattr(ssa, "ALMOST_IDENTITY", 0.0)
    monkeypatch.setattr(SSAConfig, "starts_as_identity", True)
    model = NanoGPT()
    wrong = SSAConfig(position="sigmoid")
    assert code_of(model, lambda: attnrewrite.convert(model, wrong, example_inputs=(X,)))[0] == "AR313"


def test_a_model_in_float64_that_rounds_to_float32_inside_is_no_defect() -> None:
    model = llama(attn_implementation="eager").double().eval()
    attnrewrite.convert(model, SSAConfig(), example_inputs=(torch.arange(12)[None],))
    assert model(torch.arange(12)[None]).logits.dtype == torch.float64


def test_a_copy_says_that_it_must_be_compiled_and_then_works() -> None:
    model = NanoGPT()
    attnrewrite.convert(model, SSAConfig(), example_inputs=(X,))
    expected = model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AttnRewriteError, match=r"AR308.*\n.*\n.*model\.compile"):
            twin(X)
        twin.compile(backend="attnrewrite", options={"inner": "eager"})
        assert torch.allclose(twin(X), expected, atol=1e-6)


def test_a_break_between_marker_and_attention_is_an_error_not_plain_attention() -> None:
    class Breaks(NanoGPT):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            if self.broken:
                torch._dynamo.graph_break()
            return super().forward(x)

    model = Breaks()
    attnrewrite.convert(model, SSAConfig(), example_inputs=(X,))
    torch._dynamo.reset()
    model.broken = True
    with pytest.raises(BackendCompilerFailed, match="AR309"):
        model(X + 1)
