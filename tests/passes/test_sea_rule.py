"""The rule of SEA: which sites it takes, and that a site becomes the estimate and the attention that it selects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import attnrewrite
from attnrewrite import AttnRewriteError, SEAConfig
from attnrewrite.kernels.sea.estimator import Estimator, bidirectional_estimate, causal_estimate
from attnrewrite.kernels.sea.reference import sea_attention

B, L, HEADS, KV_HEADS, DIM = 2, 13, 4, 2, 8
WIDTH = HEADS * DIM
SMALL = SEAConfig(slices=8, budget=2, max_length=64)
PADDINGS = {
    "none": None,
    "left": torch.arange(L) >= torch.tensor([[0], [4]]),
    "right": torch.arange(L) < torch.tensor([[L], [9]]),
}


class Host(nn.Module):
    """Self-attention with grouped heads, written with SDPA; ``real`` is False at padding."""

    def __init__(self, causal: bool = True, biased: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * DIM) for _ in range(2))
        self.causal, self.dropout = causal, dropout
        self.bias = nn.Parameter(torch.randn(1, HEADS, L, L)) if biased else None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return q, k, v

    def mask(self, real: Tensor | None, n: int) -> Tensor | None:
        seen = torch.ones(n, n, dtype=torch.bool).tril() if self.causal else None
        if real is not None:
            seen = real[:, None, None] if seen is None else real[:, None, None] & seen
        if self.bias is None:
            return seen
        bias = self.bias[..., :n, :n]
        return bias if seen is None else bias.masked_fill(~seen, float("-inf"))

    def joined(self, out: Tensor) -> Tensor:
        joined: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return joined

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        dropout = self.dropout if self.training else 0.0
        mask = self.mask(real, x.shape[1])
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=True)
        return self.joined(out.nan_to_num(0.0))


def by_hand(host: Host, x: Tensor, real: Tensor | None, config: SEAConfig) -> Tensor:
    """What the converted layer must give, from the functions of the variant."""
    q, k, v = host.heads(x)
    estimator = Estimator.named(host.get_submodule("sea").state_dict(keep_vars=True), config.slices)
    estimate = causal_estimate(q, k, v, estimator, real)[0] if host.causal else None
    estimate = estimate or bidirectional_estimate(q, k, v, estimator, real)
    out = sea_attention(
        *(q, k, v, estimate.estimated, host.bias),
        is_causal=host.causal,
        enable_gqa=True,
        padding=real,
        budget=config.budget,
        budget_rule=config.budget_rule,
        grouping=config.grouping,
        scale_prob=estimate.scale_prob,
        mix=estimate.mix,
        pooling=config.pooling,
    )
    return host.joined(out)


def converted(host: Host, config: SEAConfig, *inputs: Any) -> Host:
    """Convert in float64, and draw all scales, so that nothing is hidden behind a start."""
    torch._dynamo.reset()
    host = host.double()
    attnrewrite.convert(host, config, example_inputs=inputs)
    host.double()
    with torch.no_grad():
        for parameter in host.get_submodule("sea.scales").parameters():
            parameter.normal_()
    return host


def draw(seed: int = 0, n: int = L) -> Tensor:
    return torch.randn(B, n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_site_becomes_what_the_functions_of_the_variant_give(causal: bool, biased: bool, padding: str) -> None:
    torch.manual_seed(0)
    real = PADDINGS[padding]
    paper = SEAConfig(slices=8, budget=2, budget_rule="paper", grouping="per_query", pooling="paper")
    config = paper if padding == "right" else SMALL
    inputs = (draw(),) if real is None else (draw(), real)
    host = converted(Host(causal, biased), config, *inputs)
    x = draw(1).requires_grad_()
    ours, theirs = host(x, *inputs[1:]), by_hand(host, x, real, config)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    leaves = [x, *host.parameters()]
    found, expected = (
        torch.autograd.grad(out, leaves, draw(2), allow_unused=True, materialize_grads=True) for out in (ours, theirs)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("inner", "causal"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)])
def test_one_graph_for_every_length(inner: str, causal: bool) -> None:
    """The whole layer, estimate and selection, is traced with a length that is not known."""
    torch.manual_seed(0)
    host = converted(Host(causal), SMALL, draw())
    host.compile(backend=attnrewrite.Backend(inner=inner, strict=True), dynamic=True)
    with torch.no_grad():
        host(draw(n=9))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for n in (13, 40):
                torch.testing.assert_close(host(draw(n=n)), by_hand(host, draw(n=n), None, SMALL), rtol=1e-9, atol=1e-9)


def test_dropout_is_drawn_in_training_alone() -> None:
    torch.manual_seed(0)
    host = converted(Host(dropout=0.5), SMALL, draw())
    x = draw()
    assert not torch.equal(host.train()(x), host(x))
    mean = torch.stack([host(x).detach() for _ in range(400)]).mean(0)
    kept = host.eval()(x).detach()
    assert torch.equal(kept, host(x))
    assert float((mean - kept).abs().max()) < 0.25 * float(kept.std())


class Window(Host):
    def mask(self, real: Tensor | None, n: int) -> Tensor | None:
        lag = torch.arange(n)[:, None] - torch.arange(n)
        return (lag >= 0) & (lag < 5)


class Blocks(Host):
    """A block of keys that is not understood."""

    def mask(self, real: Tensor | None, n: int) -> Tensor | None:
        index = torch.arange(n)
        return ((index[:, None] * 7 + index) % 3 > 0) | torch.eye(n, dtype=torch.bool)


class Capped(Host):
    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        scores = (30 * torch.tanh(q @ k.mT / 30)).masked_fill(torch.ones(L, L).tril() == 0, float("-inf"))
        return self.joined(scores.softmax(-1) @ v)


class Cross(Host):
    """As many keys as queries, from another sequence."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, _, _ = self.heads(x)
        _, k, v = self.heads(x if other is None else other)
        return self.joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


class Given(Host):
    """The mask is an input of floats, so that it may hold anything."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.joined(F.scaled_dot_product_attention(*self.heads(x), mask, enable_gqa=True))


@pytest.mark.parametrize(
    ("host", "inputs", "says"),
    [
        (Window(), (), ("window of 5", "strict_window=False")),
        (Blocks(), (), ("custom",)),
        (Capped(), (), ("soft-cap",)),
        (Given(), (torch.full((L, L), float("-inf")).double().triu(1),), ("bias", "may hide")),
        (Cross(), (draw(1),), ("another sequence",)),
        (Cross(), (draw(1, 7),), ("different sequences", "use_cache=False")),
    ],
    ids=["window", "blocks", "cap", "given", "cross", "shorter"],
)
def test_refusals_give_the_reason(host: Host, inputs: tuple[Any, ...], says: tuple[str, ...]) -> None:
    host = copy.deepcopy(host).double()
    with pytest.raises(AttnRewriteError) as raised:
        attnrewrite.convert(host, SMALL, example_inputs=(draw(), *inputs))
    assert raised.value.code == "AR307"
    assert all(part in str(raised.value) for part in says)
    assert not hasattr(host, "sea")


def test_a_window_is_taken_where_it_is_allowed() -> None:
    torch.manual_seed(0)
    host = Window().double()
    expected = host(draw())
    loose = SEAConfig(slices=8, budget=5, scale_bias=40.0, strict_window=False)
    attnrewrite.convert(host, loose, example_inputs=(draw(),))
    torch.testing.assert_close(host(draw()), expected, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_called_with_another_mask_says_so() -> None:
    host = converted(Host(), SMALL, draw())
    host.causal = False
    assert host(draw(n=1)).isfinite().all()  # one token is the same either way
    with pytest.raises(
        BackendCompilerFailed, match="converted for attention with a causal mask, and is called without"
    ):
        host(draw())


def test_explain_draws_what_the_site_would_become() -> None:
    from attnrewrite.explanation import inspect_model

    report, _ = inspect_model(Host(), (draw().float(),), {}, SMALL)
    (site,) = report.sites
    assert (site.status, site.variant, site.rejections) == ("matched", "sea", [])
    assert site.after
