"""Generated kernels at the sizes of real models, where the interpreter would take hours.

The bodies are those of the tests in ``tests/kernels``, which run on a GPU, too.
"""

import pytest
import torch
from dense_support import CAUSAL, DEVICE, compare, drawn, formula, normal, ours, outputs, temperatures

from attnrewrite.functional import attention, selective_attention
from attnrewrite.kernels.dense import tuned
from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.dense.descriptors import LOADED, can_describe, has_unit
from attnrewrite.kernels.dense.keys import here
from attnrewrite.kernels.diagnostics import AttnRewriteError

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_device", "poisoned")]
HEADS = {
    torch.bfloat16: (16, 24, 32, 64, 80, 128, 192, 256),
    torch.float16: (16, 64, 128, 256),
    torch.float32: (16, 64, 128),
}
VARIANTS = ["plain", "ssa", "selective"]


def given(variant, **shape):
    """Inputs of a variant; gradients are asked for by all of them."""
    tensors = drawn(**shape)
    if variant == "ssa":
        tensors |= temperatures(tensors)
    if variant == "selective":
        tensors["gamma"] = torch.tensor(0.7, requires_grad=True)
    return tensors


@pytest.mark.parametrize(("dtype", "D"), [(dtype, D) for dtype, widths in HEADS.items() for D in widths], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_heads(variant, dtype, D):
    compare(given(variant, L=333, H=4, Hkv=2, D=D, Dv=D, dtype=dtype), **CAUSAL)


@pytest.mark.parametrize("D, Dv", [(64, 128), (192, 128), (40, 256)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_of_another_width(variant, D, Dv):
    compare(given(variant, L=200, D=D, Dv=Dv, dtype=torch.bfloat16), **CAUSAL)


@pytest.mark.parametrize("L", [17, 127, 128, 129, 1000, 2048])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths(variant, L):
    compare(given(variant, L=L, B=2, D=64, Dv=64, dtype=torch.bfloat16), **CAUSAL)


@pytest.mark.parametrize("D", [24, 64, 80, 128, 256])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_by_descriptors(variant, D, monkeypatch):
    """Pipelined, and in tiles that are copied in several boxes."""
    own, met = tuned.configurations, []

    def configurations(launch):
        found = own(launch)
        if launch.name in LOADED:
            met.append(can_describe(launch))
        return [config._replace(descriptors=launch.name in LOADED) for config in found] + list(found)

    monkeypatch.setattr(tuned, "configurations", configurations)
    compare(given(variant, L=777, H=4, Hkv=2, D=D, Dv=D, dtype=torch.bfloat16), **CAUSAL)
    assert met == 3 * [has_unit(here(0).target)]


@pytest.mark.parametrize("how", [{"window": 100}, {"softcap": 5.0}, {"window": 16}], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forms(variant, D, how):
    compare(given(variant, L=500, H=4, Hkv=1, D=D, Dv=D, dtype=torch.bfloat16), **CAUSAL, **how)


@pytest.mark.parametrize("variant", ["plain", "ssa"])
@pytest.mark.parametrize(("L", "S"), [(100, 900), (900, 100)])
def test_all_pairs(variant, L, S):
    compare(given(variant, L=L, S=S, H=2, Hkv=1, D=64, Dv=64, dtype=torch.float16))


@pytest.mark.parametrize("kind", ["keys", "pairs", "bias"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_masks(variant, kind):
    tensors = given(variant, L=300, B=2, H=4, Hkv=2, D=64, Dv=64, dtype=torch.bfloat16)
    shape = {"keys": (2, 1, 1, 300), "pairs": (2, 1, 300, 300), "bias": (1, 4, 300, 300)}[kind]
    mask = normal(shape, 2)
    compare({**tensors, "attn_mask": mask.bfloat16() if kind == "bias" else mask > -0.5}, **CAUSAL)


@pytest.mark.parametrize(("shape", "variant"), [((2, 8, 4096, 64), "plain"), ((1, 4, 4096, 128), "selective")])
def test_long_sequences(shape, variant):
    B, H, L, D = shape
    compare(given(variant, B=B, H=H, Hkv=H, L=L, D=D, Dv=D, dtype=torch.bfloat16), **CAUSAL)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_twice_and_with_any_strides(variant, D):
    tensors = given(variant, L=1000, H=4, Hkv=2, D=D, Dv=D, dtype=torch.bfloat16)
    strided = dict(tensors)
    for name in ("query", "key", "value"):
        strided[name] = tensors[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    upstream = normal(tensors["query"].shape, 3)
    with kernels("triton"):
        first, *others = (outputs(ours, x, upstream, CAUSAL) for x in (tensors, tensors, strided))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_dropout_is_that_of_the_seed():
    tensors = {n: x.detach() for n, x in drawn(1000, D=64, Dv=64, dtype=torch.bfloat16).items()}
    found = []
    with kernels("triton"):
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            found.append(attention(**tensors, dropout_p=0.25, is_causal=True))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_addresses_beyond_32_bits():
    """The last keys and values lie more than 2**31 elements behind the first ones."""
    L, step = 80, 1 << 25
    store = torch.empty(L * step, dtype=torch.bfloat16)
    tensors = drawn(L, H=1, Hkv=1, D=64, Dv=64, dtype=torch.bfloat16)
    spread = {"query": tensors["query"].detach()}
    for place, name in ((0, "key"), (64, "value")):
        spread[name] = store.as_strided((1, 1, L, 64), (L * step, L * step, step, 1), place)
        spread[name].copy_(tensors[name].detach())
    near = {n: x.detach().clone() for n, x in tensors.items()}
    for function in (attention, selective_attention):
        with kernels("triton"):
            found, wanted = (
                outputs(function, {n: x.requires_grad_() for n, x in x.items()}, normal((1, 1, L, 64), 3), CAUSAL)
                for x in (spread, near)
            )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_compiled_by_inductor():
    tensors = drawn(300, H=4, Hkv=2, D=64, Dv=64, dtype=torch.bfloat16)

    def step(query, key, value):
        with kernels("triton"):
            return ours(query, key, value, gamma=torch.tensor(0.7, device=DEVICE), **CAUSAL)

    upstream = normal(tensors["query"].shape, 3)
    wanted, found = (outputs(f, tensors, upstream, {}) for f in (step, torch.compile(step)))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_the_backend_puts_the_kernel_in():
    """Eager attention of a model, rewritten and compiled, at a length that no tile divides."""
    tensors = drawn(333, H=4, Hkv=4, D=64, Dv=64, dtype=torch.bfloat16)
    upstream = normal(tensors["query"].shape, 3).bfloat16()

    def eager(query, key, value):
        logits = query @ key.mT * 0.125
        hidden = torch.ones(333, 333, dtype=torch.bool, device=query.device).triu(1)
        return logits.masked_fill(hidden, float("-inf")).softmax(-1) @ value

    reports = []
    options = {"kernels": "triton", "strict": True, "report": reports.append}
    compiled = torch.compile(eager, backend="attnrewrite", options=options)
    found = outputs(compiled, tensors, upstream, {})
    exact = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
    ordinary, true = outputs(eager, tensors, upstream, {}), outputs(formula, exact, upstream, CAUSAL)
    assert [site.implementation for report in reports for site in report.sites] == ["triton"]
    for a, b, c in zip(found, ordinary, true, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()


def test_tensors_of_the_cpu_are_an_error():
    tensors = {n: x.cpu() for n, x in drawn(4).items()}
    with kernels("triton"), pytest.raises(AttnRewriteError, match="tensors are on cpu") as caught:
        attention(**tensors)
    assert caught.value.code == "AR403"
