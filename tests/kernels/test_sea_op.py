"""The sea operator and the reference under tracers: gradients, opcheck, compile, export; wrong arguments."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sea_support import CLOSE, draw_tensors, selected_sets
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.sea import slices
from attnrewrite.kernels.sea.op import sea_attention_op as operator
from attnrewrite.kernels.sea.reference import sea_attention
from attnrewrite.kernels.sea.slices import Rule


@st.composite
def cases(draw):
    is_causal = draw(st.booleans())
    return SimpleNamespace(
        L=draw(st.integers(1, 12)),
        M=draw(st.integers(1, 6)),
        mask=draw(st.sampled_from([None, "padding", "bias", "bias_of_keys"])),
        factors=draw(st.booleans()),
        is_causal=is_causal,
        window=draw(st.none() | st.integers(1, 6)) if is_causal else None,
        budget=draw(st.integers(1, 13)),
        rule=draw(st.sampled_from(["exact", "paper"])),
        grouping=draw(st.sampled_from(["causal_per_batch", "per_query"])),
        padding=draw(st.sampled_from([None, torch.arange(12) > 1])),
        pooling=draw(st.sampled_from(["width", "paper"])),
        seed=draw(st.integers(0, 2**16)),
    )


def draw_mask(kind, L, seed):
    source = torch.Generator().manual_seed(seed)
    if kind is None:
        return None
    if kind == "bias":
        return torch.randn(4, L, L, generator=source, dtype=torch.float64).requires_grad_()
    real = torch.rand(2, 1, 1, L, generator=source) > 0.3
    if kind == "padding":
        return real
    bias = torch.randn(2, 1, 1, L, generator=source, dtype=torch.float64)
    return bias.masked_fill(~real, float("-inf")).requires_grad_()


def as_operator(query, key, value, estimated, mask, scale_prob, mix, **options):
    options = {
        "is_causal": True,
        "window": None,
        "budget": 3,
        "rule": "exact",
        "grouping": "causal_per_batch",
        "padding": None,
        "pooling": "width",
    } | options
    return (
        *(query, key, value, estimated, mask, options["is_causal"], None, options["window"]),
        *(options["budget"], options["rule"], options["grouping"], scale_prob, mix),
        *(options["padding"], options["pooling"]),
    )


def as_reference(query, key, value, estimated, mask, scale_prob, mix, *, rule="exact", **options):
    options = {"is_causal": True, "budget": 3} | options
    return sea_attention(
        query,
        key,
        value,
        estimated,
        mask,
        enable_gqa=True,
        budget_rule=rule,
        scale_prob=scale_prob,
        mix=mix,
        strict_window=False,
        **options,
    )


def inputs_of(L=9, M=4, mask=None, seed=0, factors=True):
    *tensors, scale_prob, mix = draw_tensors(2, 4, 2, L, 3, M, Dv=2, seed=seed)
    tensors += [draw_mask(mask, L, seed), *((scale_prob, mix[:1, :, :1]) if factors else (None, None))]
    return [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


class TestGradients:
    @settings(max_examples=40, deadline=None)
    @given(case=cases())
    def test_closed_form_equals_autograd(self, case):
        inputs = inputs_of(case.L, case.M, case.mask, case.seed, case.factors)
        options = {
            name: getattr(case, name) for name in ("is_causal", "window", "budget", "rule", "grouping", "pooling")
        }
        options["padding"] = None if case.padding is None else case.padding[None, : case.L]
        ours = operator(*as_operator(*inputs, **options))
        reference = as_reference(*inputs, **options)
        assert torch.equal(ours, reference)
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = torch.autograd.grad(ours, leaves, upstream)
        expected = torch.autograd.grad(reference, leaves, upstream, allow_unused=True)
        for grad, other in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, torch.zeros_like(grad) if other is None else other, **CLOSE)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("function", ["reference", "operator"])
    def test_gradcheck_with_a_fixed_selection(self, is_causal, function):
        query, key, value, estimated, _, scale_prob, mix = inputs_of(6, 3)
        mask = draw_mask("bias", 6, 0)

        def run(query, key, value, mask, scale_prob, mix):
            if function == "reference":
                return as_reference(query, key, value, estimated.detach(), mask, scale_prob, mix, is_causal=is_causal)
            return operator(
                *as_operator(query, key, value, estimated.detach(), mask, scale_prob, mix, is_causal=is_causal)
            )

        assert torch.autograd.gradcheck(run, (query, key, value, mask, scale_prob, mix), fast_mode=True)

    @pytest.mark.parametrize("L", [2, 7])
    def test_gradcheck_of_the_estimate_where_all_keys_are_kept(self, L):
        query, key, value, estimated, _, scale_prob, mix = (
            t if t is None else t.detach() for t in inputs_of(L, 4, seed=2)
        )
        estimated.requires_grad_()
        for run in (as_reference, lambda *inputs, **options: operator(*as_operator(*inputs, **options))):
            assert torch.autograd.gradcheck(
                lambda z, run=run: run(query, key, value, z, None, scale_prob, mix, is_causal=False, budget=L),
                estimated,
                fast_mode=True,
            )

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_garbage_at_padding_stays_there(self, is_causal):
        inputs = inputs_of(12, 4)
        mask = torch.arange(12) >= 4
        garbage = [None if t is None else t.detach().clone() for t in inputs]
        for t in garbage:
            if t is not None and t.shape[2] == 12:
                t[:, :, :4] = float("nan")
        leaves = [t.requires_grad_() for t in garbage if t is not None]
        garbage[4] = mask
        out = operator(*as_operator(*garbage, is_causal=is_causal))
        grads = torch.autograd.grad(out.square().sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("empty", ["batch", "length"])
    def test_empty_tensors(self, is_causal, empty):
        tensors = draw_tensors(*((0, 2, 2, 5) if empty == "batch" else (2, 2, 2, 0)), 4, 3)
        for run in (as_reference, lambda *inputs, **options: operator(*as_operator(*inputs, **options))):
            out = run(*tensors[:4], None, *tensors[4:], is_causal=is_causal)
            assert out.shape == tensors[2].shape
            grads = torch.autograd.grad(out.sum(), tensors[:3], allow_unused=True)
            assert all(grad is None or grad.shape == t.shape for grad, t in zip(grads, tensors, strict=False))

    @pytest.mark.parametrize("row", [6, 11])
    def test_nan_of_a_query_reaches_its_own_keys_alone(self, row):
        query, key, value, estimated, *_ = (t.detach() for t in draw_tensors(1, 2, 2, 12, 4, 4))
        keys = selected_sets(estimated, Rule(2), is_causal=True)[0][row]
        query[0, 0, row] = float("nan")
        bias = torch.zeros(2, 12, 12, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in (query, key, value, bias)]
        for run in (as_reference, lambda *inputs, **options: operator(*as_operator(*inputs, **options))):
            out = run(query, key, value, estimated, bias, None, None, budget=2)
            d_query, d_key, d_value, d_bias = torch.autograd.grad(out.square().sum(), leaves)
            assert d_query.isnan().any(-1)[0].nonzero().tolist() == ([[0, row]] if keys else [])
            for grad in (d_key, d_value):
                assert set(grad.isnan().any(-1)[0, 0].nonzero().flatten().tolist()) == keys
            assert d_bias.isnan().nonzero().tolist() == [[0, row, j] for j in sorted(keys)]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_no_worse_than_autograd(self, assert_no_worse, dtype):
        inputs = [t if t is None else t.detach().to(dtype).requires_grad_() for t in inputs_of(20, 4)]
        wide = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        trios = []
        for run, these in ((operator, inputs), (as_reference, inputs), (as_reference, wide)):
            leaves = [t for i, t in enumerate(these) if t is not None and i != 3]
            out = run(*as_operator(*these)) if run is operator else run(*these)
            trios.append(torch.autograd.grad(out.sum(), leaves))
        assert all(grad.dtype == dtype for grad in trios[0])
        for trio in zip(*trios, strict=True):
            assert_no_worse(*trio)


class TestOperator:
    @pytest.mark.parametrize(
        ("mask", "options"),
        [
            (None, {}),
            ("padding", {"is_causal": False, "grouping": "per_query", "pooling": "paper"}),
            ("bias", {"window": 4, "rule": "paper", "padding": torch.arange(9)[None] > 1}),
        ],
        ids=["causal", "full", "window"],
    )
    def test_opcheck(self, mask, options):
        inputs = inputs_of(9, 4, mask, factors=mask != "bias")
        torch.library.opcheck(operator, as_operator(*inputs, **options))

    def test_compiled_with_a_dynamic_length(self):
        @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
        def run(query, key, value, estimated, scale_prob):
            return operator(*as_operator(2 * query, key, value, estimated, None, scale_prob, None)).square()

        for L in (9, 14):
            query, key, value, estimated, _, scale_prob, _ = inputs_of(L)
            ours = run(query, key, value, estimated, scale_prob)
            plain = as_reference(2 * query, key, value, estimated, None, scale_prob, None).square()
            torch.testing.assert_close(ours, plain, **CLOSE)
            leaves = (query, key, value, scale_prob)
            for grad, other in zip(
                torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True
            ):
                torch.testing.assert_close(grad, other, **CLOSE)

    def test_export_with_a_dynamic_length(self):
        class Attention(torch.nn.Module):
            def forward(self, query, key, value, estimated):
                return operator(*as_operator(query, key, value, estimated, None, None, None))

        tensors = tuple(t.detach() for t in inputs_of(9)[:4])
        length = torch.export.Dim("length", min=4, max=64)
        exported = torch.export.export(Attention(), tensors, dynamic_shapes=({2: length},) * 4).module()
        longer = tuple(t.detach() for t in inputs_of(17)[:4])
        assert torch.equal(exported(*longer), as_reference(*longer, None, None, None))

    def test_flops_are_those_of_the_selected_pairs(self):
        inputs = inputs_of(9, 4)
        with FlopCounterMode(display=False) as counter:
            out = operator(*as_operator(*inputs))
            pairs = 2 * 4 * (1 + 2 + 7 * 3)
            assert counter.get_total_flops() == pairs * 2 * (3 + 2)
            out.sum().backward()
        assert counter.get_total_flops() == pairs * 2 * (3 + 2 + 3 * 3 + 2 * 2)

    def test_nothing_else_defines_operators(self):
        """It takes as long as all the rest of the import."""
        for path in Path(slices.__file__).parent.glob("*.py"):
            assert path.name in ("op.py", "step.py", "documents.py") or not re.search(
                r"sea\.op\b|torch\.library", path.read_text()
            )


class TestTracing:
    def test_reference_in_one_graph(self):
        inputs = inputs_of(9, 4, "padding")
        compiled = torch.compile(as_reference, backend="aot_eager", fullgraph=True)
        ours, plain = compiled(*inputs), as_reference(*inputs)
        torch.testing.assert_close(ours, plain, **CLOSE)
        leaves = [t for i, t in enumerate(inputs) if t is not None and t.requires_grad and i != 3]
        for grad, other in zip(
            torch.autograd.grad(ours.square().sum(), leaves),
            torch.autograd.grad(plain.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(grad, other, **CLOSE)

    def test_make_fx(self):
        tensors = [t.detach() for t in inputs_of(9, 4)[:4]]

        def run(*tensors):
            return as_reference(*tensors, torch.arange(9) > 2, None, None, window=5)

        assert torch.equal(make_fx(run)(*tensors)(*tensors), run(*tensors))


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"key": (1, 4, 5, 8), "value": (1, 4, 5, 8)}, ("6", "5")),
            ({"estimated": (1, 4, 5, 3)}, ("1 x 4 x 5 x 3", "1 x 4 x 6 x 3")),
            ({"estimated": (1, 4, 6, 0)}, ("1 x 4 x 6 x 0", "1 or more")),
            ({"estimated": (4, 6, 3)}, ("4 x 6 x 3", "B x H x L x M")),
            ({"budget": 0}, ("0", "1 at least")),
            ({"budget": -3}, ("-3",)),
            ({"budget": 2.0}, ("2.0",)),
            ({"budget": True}, ("True",)),
            ({"budget_rule": "code"}, ("'code'", "'exact' or 'paper'")),
            ({"grouping": "per_head"}, ("'per_head'", "'causal_per_batch' or 'per_query'")),
            ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, ("6 queries", "1 and 1")),
            ({"attn_mask": torch.ones(4, 1, 6, dtype=torch.bool)}, ("4 heads", "1 and 1")),
            ({"attn_mask": torch.ones(7, dtype=torch.bool)}, ("7", "1 x 4 x 6 x 6")),
            ({"window": 3, "is_causal": True, "strict_window": True}, ("3", "strict_window")),
            ({"window": 3, "strict_window": False}, ("3", "False")),
            ({"window": 0, "is_causal": True, "strict_window": False}, ("0",)),
            ({"scale_prob": torch.ones(3, 6)}, ("3 x 6", "1 x 4 x 6")),
            ({"mix": torch.ones(1, 4, 6, 8)}, ("1 x 4 x 6 x 8", "1 x 4 x 6")),
            ({"mix": torch.ones(6, dtype=torch.long)}, ("int64", "float")),
            ({"dropout_p": 1.5}, ("1.5",)),
            ({"pooling": "code"}, ("'code'", "'width' or 'paper'")),
            ({"padding": torch.ones(1, 6)}, ("1 x 6", "bool")),
            ({"padding": torch.ones(6, dtype=torch.bool)}, ("6 of", "B x L")),
            ({"padding": torch.ones(1, 5, dtype=torch.bool)}, ("1 x 5", "1 x 6")),
        ],
    )
    def test_say_both_sides(self, change, says):
        sizes = dict.fromkeys(("query", "key", "value"), (1, 4, 6, 8)) | {"estimated": (1, 4, 6, 3), "budget": 2}
        arguments = sizes | change
        for name in ("query", "key", "value", "estimated"):
            arguments[name] = torch.zeros(arguments[name])
        with pytest.raises(LoweringError) as raised:
            sea_attention(**arguments)
        assert raised.value.code == "AR402"
        assert all(part in raised.value.detail for part in says)
