"""Routing attention as an operator: gradients in closed form, registration, cost, tracing."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_support import CLOSE, random_routing
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.routing import attend as attend_file
from attnrewrite.kernels.routing.attend import Scored, attend, seen
from attnrewrite.kernels.routing.backward import attend_backward
from attnrewrite.kernels.routing.clusters import affinity, routing_features
from attnrewrite.kernels.routing.op import routing_attention_op
from attnrewrite.kernels.routing.prepare import Options, Routed, prepare
from attnrewrite.kernels.routing.reference import routing_attention
from attnrewrite.kernels.routing.selection import select_windows
from attnrewrite.kernels.routing.tiles import tiled

CASES = [
    {"rule": "topw"},
    {"rule": "topw", "logits": "normed", "is_causal": True, "paper_causal": True},
    {"rule": "topw", "shared_qk": True},
    {},
    {"is_causal": True, "window": 4, "scale": 0.7},
    {"is_causal": True, "logits": "normed"},
    {"is_causal": True, "shared_qk": True},
    {"shared_qk": True, "logits": "normed"},
]
EACH_CASE = pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))


def draw(options, N=11, seed=0):
    H = 2 if options.get("shared_qk") else 4
    return random_routing(2, H, 2, N, 6, 3, Dv=5, seed=seed)


def margin(query, key, centroids):
    """How far the affinities are from any change of membership."""
    values = [affinity(routing_features(states), centroids) for states in (query, key)]
    best = [(v.topk(2, -1).values @ torch.tensor([1.0, -1.0], dtype=v.dtype)).min() for v in values]
    ranks = [v.sort(2).values.diff(dim=2).min() for v in values]
    return min(*best, *ranks).item()


class TestGradient:
    @EACH_CASE
    def test_against_finite_differences(self, options):
        """Membership must not change between the two sides of a difference."""
        *tensors, centroids = random_routing(1, 2, 1 if "shared_qk" not in options else 2, 5, 4, 2, seed=3)
        assert margin(*tensors[:2], centroids) > 1e-4
        names = (0, 2) if "shared_qk" in options else (0, 1, 2)

        def layer(*some):
            data = list(tensors)
            for name, tensor in zip(names, some, strict=True):
                data[name] = tensor
            return routing_attention_op(*data, centroids, window_size=3, **options)

        assert torch.autograd.gradcheck(layer, [tensors[name] for name in names])

    @EACH_CASE
    def test_equals_that_of_the_reference(self, options):
        *tensors, centroids = draw(options)
        mask = (torch.arange(11) >= torch.tensor([[0], [3]]))[:, None, None]
        center = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)
        names = ("center_query",) if options.get("shared_qk") else ("center_query", "center_key")
        centers = dict.fromkeys(names, center)
        for attn_mask in (None, mask):
            ours = routing_attention_op(*tensors, centroids, attn_mask, window_size=4, **centers, **options)
            plain = routing_attention(
                *tensors, centroids, attn_mask, enable_gqa=True, window_size=4, **centers, **options
            )
            torch.testing.assert_close(ours, plain, **CLOSE)
            self.check_grads(ours, plain, tensors)

    @pytest.mark.parametrize("rule", ["topw", "argmax_window"])
    def test_near_the_logit_of_a_token_with_itself(self, rule):
        """Where the other logit is as low, the weight of a shared token with itself is neither 0 nor 1."""
        _, _, value, centroids = random_routing(1, 1, 1, 2, 4, 1)
        query = torch.tensor([[2.0, 1.0, 0.0, 0.0], [-1.0, 0.5, 0.0, 0.0]], dtype=torch.float64)[None, None]
        query.requires_grad_()
        options = {"rule": rule, "shared_qk": True, "scale": 5e4 / 1.5, "window_size": 4}
        ours, plain = (
            function(query, query, value, centroids, **options)
            for function in (routing_attention_op, routing_attention)
        )
        assert ((plain - value) / (value.flip(2) - value)).min() > 0.1
        self.check_grads(ours, plain, (query, value))

    def test_with_a_bias_and_other_routing(self):
        *tensors, centroids = draw({})
        source = torch.Generator().manual_seed(5)
        options = {
            "attn_mask": torch.randn(4, 11, 11, generator=source, dtype=torch.float64),
            "routing_query": torch.randn(tensors[0].shape, generator=source, dtype=torch.float64),
            "routing_key": torch.randn(tensors[1].shape, generator=source, dtype=torch.float64),
        }
        ours = routing_attention_op(*tensors, centroids, **options)
        plain = routing_attention(*tensors, centroids, enable_gqa=True, **options)
        torch.testing.assert_close(ours, plain, **CLOSE)
        self.check_grads(ours, plain, tensors)

    @staticmethod
    def check_grads(ours, plain, tensors):
        upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found = torch.autograd.grad(ours, tensors, upstream)
        expected = torch.autograd.grad(plain, tensors, upstream, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, **CLOSE)

    @pytest.mark.parametrize("options", [{"rule": "topw"}, {"is_causal": True}], ids=["topw", "argmax_window"])
    def test_frozen_selection_in_blocks(self, monkeypatch, options):
        *tensors, centroids = draw(options)
        chosen = Options(window_size=4, **options)
        _, selection = prepare(Routed(*tensors, centroids), chosen)
        monkeypatch.setattr(attend_file, "ELEMENTS", 2000)

        def frozen(*data):
            return attend(Scored(*data, None, 0.5, chosen.is_causal), selection)

        out = frozen(*tensors)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        expected = torch.autograd.grad(out, tensors, upstream)
        found = attend_backward(Scored(*tensors, None, 0.5, chosen.is_causal), selection, upstream)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)

    def test_low_precision_is_no_worse_than_the_recorded_graph(self, assert_no_worse):
        *tensors, centroids = random_routing(1, 2, 2, 64, 32, 4, dtype=torch.bfloat16)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        outs = routing_attention_op(*tensors, centroids), routing_attention(*tensors, centroids)
        goal = routing_attention(*exact, centroids)
        found = [
            torch.autograd.grad(out.float().square().sum(), data)
            for out, data in zip((*outs, goal), (tensors, tensors, exact), strict=True)
        ]
        for name, *trio in zip(("dq", "dk", "dv"), *found, strict=True):
            assert trio[0].dtype == torch.bfloat16
            assert_no_worse(*trio, name)

    def test_saves_its_inputs_and_nothing_else(self):
        *tensors, centroids = draw({}, N=64)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            routing_attention_op(*tensors, centroids)
        assert sum(saved) == sum(tensor.numel() for tensor in (*tensors, centroids))


class TestTiles:
    @settings(max_examples=60, deadline=None)
    @given(
        N=st.integers(1, 40),
        C=st.integers(1, 5),
        width=st.integers(1, 45),
        causal=st.booleans(),
        shared=st.booleans(),
        pad=st.integers(0, 3),
        seed=st.integers(0, 2**16),
    )
    def test_hold_the_pairs_of_the_windows(self, N, C, width, causal, shared, pad, seed):
        source = torch.Generator().manual_seed(seed)
        queries = torch.randn(2, 2 if shared else 4, N, C, generator=source)
        keys = queries if shared else torch.randn(2, 2, N, C, generator=source)
        valid = torch.arange(N).expand(2, N) >= pad
        windows = select_windows(queries, keys, width, is_causal=causal, valid=valid)
        found, expected = (self.pairs(selection, N) for selection in (tiled(windows), windows))
        assert torch.equal(found, expected)
        assert expected.max() <= 1

    @staticmethod
    def pairs(selection, N):
        """How often each query meets each key, [B, H, N, N]."""
        block = selection.block(0, selection.sizes[0])
        B, H = block.queries.shape[:2]
        scored = Scored(torch.zeros(B, H, N, 1), torch.zeros(B, H, N, 1), torch.zeros(B, H, N, 1), None, 1.0)
        met = seen(scored, block).long()
        flat = block.queries.clamp(min=0).unsqueeze(-1) * N + block.keys.clamp(min=0).unsqueeze(-2)
        return torch.zeros(B, H, N * N).long().scatter_add(2, flat.flatten(2), met.flatten(2)).reshape(B, H, N, N)

    def test_gather_a_few_times_the_sequence(self):
        *tensors, centroids = random_routing(1, 1, 1, 1024, 4, 16)
        _, selection = prepare(Routed(*tensors, centroids), Options(window_size=32, is_causal=True))
        (groups, _, keys), (groups_in_tiles, _, keys_in_tiles) = selection.sizes, tiled(selection).sizes
        assert groups * keys == 1024 * 33
        assert groups_in_tiles * keys_in_tiles <= 8 * 1024

    def test_two_runs_are_equal_bit_for_bit(self):
        *tensors, centroids = random_routing(2, 4, 2, 50, 8, 5)

        def run():
            out = routing_attention_op(*tensors, centroids)
            return out, *torch.autograd.grad(out.square().sum(), tensors)

        assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


class TestOperator:
    @pytest.mark.parametrize("options", [{"rule": "topw"}, {"is_causal": True}], ids=["topw", "argmax_window"])
    def test_opcheck(self, options):
        *tensors, centroids = draw(options, N=5)
        mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
        torch.library.opcheck(routing_attention_op, (*tensors, centroids, mask), {"window_size": 3, **options})

    def test_compiled_for_any_length(self):
        def layer(*data):
            return routing_attention_op(*data, is_causal=True, window_size=4)

        compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
        for N in (12, 33):
            *tensors, centroids = draw({}, N=N)
            ours, plain = compiled(*tensors, centroids), layer(*tensors, centroids)
            torch.testing.assert_close(ours, plain, **CLOSE)
            grads = (torch.autograd.grad(out.square().sum(), tensors) for out in (ours, plain))
            assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))

    def test_export_with_a_dynamic_length(self):
        class Attention(torch.nn.Module):
            def forward(self, query, key, value, centroids):
                return routing_attention_op(query, key, value, centroids, is_causal=True, window_size=4)

        length = torch.export.Dim("length", min=2, max=256)
        shapes = {name: {2: length} for name in ("query", "key", "value")} | {"centroids": None}
        data, longer = (tuple(tensor.detach() for tensor in draw({}, N=N)) for N in (12, 31))
        exported = torch.export.export(Attention(), data, dynamic_shapes=shapes).module()
        assert torch.equal(exported(*longer), Attention()(*longer))

    @pytest.mark.parametrize(
        ("options", "pairs"),
        [
            ({"rule": "topw", "window_size": 4}, 3 * 4 * 4),
            ({"rule": "topw"}, 3 * 4 * 4),  # ceil(11 / 3)
            ({"window_size": 3}, 11 * (3 + 1)),
            ({"window_size": 30}, 11 * (11 + 1)),
        ],
    )
    def test_flops(self, options, pairs):
        *tensors, centroids = draw({})
        routing = 2 * (2 * 4 * 11 + 2 * 2 * 11) * 3 * 6
        with FlopCounterMode(display=False) as forward:
            out = routing_attention_op(*tensors, centroids, **options)
        assert forward.get_total_flops() == routing + 2 * 2 * 4 * pairs * (6 + 5)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert backward.get_total_flops() == routing + 2 * 2 * 4 * pairs * (3 * 6 + 2 * 5)

    def test_a_mask_that_needs_a_gradient_is_refused(self):
        *tensors, centroids = draw({})
        bias = torch.zeros(11, 11, dtype=torch.float64, requires_grad=True)
        with pytest.raises(LoweringError, match="attn_mask requires a gradient"):
            routing_attention_op(*tensors, centroids, bias)

    def test_the_reference_defines_no_operator(self):
        code = (
            "import torch, attnrewrite.kernels.routing.reference, attnrewrite.kernels.routing.decode\n"
            "print(hasattr(torch.ops.attnrewrite, 'routing_attention'))"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "False", done.stderr
