"""Selective attention under tracers, and its wrong arguments."""

import pytest
import torch
from selective_support import CLOSE
from torch.fx.experimental.proxy_tensor import make_fx

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.selective.reference import selective_attention


class TestTracing:
    def test_compiled_forward_and_backward(self, random_qkv, quick_inductor):
        self.check_compiled(random_qkv, "inductor", lambda L: {}, lengths=(12,))

    def test_traced_forward_and_backward_with_mask(self, random_qkv):
        def arguments(L):
            return {"attn_mask": torch.arange(L).reshape(1, 1, 1, L) >= 3, "window": 9, "softcap": 5.0}

        self.check_compiled(random_qkv, "aot_eager", arguments)

    @staticmethod
    def check_compiled(random_qkv, backend, arguments, lengths=(12, 33)):
        dynamic = len(lengths) > 1
        compiled = torch.compile(selective_attention, backend=backend, dynamic=dynamic, fullgraph=True)
        for L in lengths:
            tensors = random_qkv(2, 4, 2, L, 8, dtype=torch.float32)
            gamma = torch.tensor(0.7, requires_grad=True)
            options = {"enable_gqa": True, "gamma": gamma, **arguments(L)}
            ours, plain = compiled(*tensors, **options), selective_attention(*tensors, **options)
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
            for found, expected in zip(
                torch.autograd.grad(ours.square().sum(), (*tensors, gamma)),
                torch.autograd.grad(plain.square().sum(), (*tensors, gamma)),
                strict=True,
            ):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("mode", ["real", "symbolic"])
    def test_make_fx(self, random_qkv, mode):
        tensors = [tensor.detach() for tensor in random_qkv(1, 4, 2, 12, 8)]

        def run(query, key, value):
            return selective_attention(query, key, value, enable_gqa=True, window=5)

        traced = make_fx(run, tracing_mode=mode)(*tensors)
        torch.testing.assert_close(traced(*tensors), run(*tensors), **CLOSE)

    def test_export_with_a_dynamic_length(self, random_qkv):
        class Attention(torch.nn.Module):
            def forward(self, query, key, value):
                return selective_attention(query, key, value)

        length = torch.export.Dim("length", min=4, max=256)
        shapes = {name: {2: length} for name in ("query", "key", "value")}
        tensors = tuple(tensor.detach() for tensor in random_qkv(1, 2, 2, 12, 8))
        exported = torch.export.export(Attention(), tensors, dynamic_shapes=shapes).module()
        longer = tuple(tensor.detach() for tensor in random_qkv(1, 2, 2, 31, 8))
        torch.testing.assert_close(exported(*longer), selective_attention(*longer), **CLOSE)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"key": (1, 4, 5, 8), "value": (1, 4, 5, 8)}, ("6", "5")),
            ({"attn_mask": torch.ones(1, 4, 6, 6, dtype=torch.bool)}, ("4 heads", "1")),
            ({"attn_mask": torch.ones(4, 6, 6, dtype=torch.bool)}, ("4 heads", "1")),
            ({"attn_mask": torch.ones(6, 7, dtype=torch.bool)}, ("6 x 7", "1 x 4 x 6 x 6")),
            ({"selection_head": 4}, ("4", "0 to 3")),
            ({"selection_head": -1}, ("-1", "0 to 3")),
            ({"gamma": torch.ones(4)}, ("1 dimensions", "0-d")),
            ({"window": 0}, ("0",)),
            ({"window": 3, "is_causal": False}, ("3", "False")),
            ({"softcap": 0.0}, ("0.0",)),
            ({"dropout_p": 1.5}, ("1.5",)),
        ],
    )
    def test_say_both_sides(self, change, says):
        arguments = {"query": (1, 4, 6, 8), "key": (1, 4, 6, 8), "value": (1, 4, 6, 8)} | change
        for name in ("query", "key", "value"):
            arguments[name] = torch.zeros(arguments[name])
        with pytest.raises(LoweringError) as raised:
            selective_attention(**arguments)
        assert raised.value.code == "AR402"
        assert all(part in raised.value.detail for part in says)
