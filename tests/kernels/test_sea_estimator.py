"""The estimate of sea: features, linear attention, position codes, networks (arXiv 2310.01777, 2009.14794)."""

import math

import pytest
import torch
import torch.nn.functional as F
from sea_support import CLOSE, draw_estimator, draw_tensors, worked_example

from attnrewrite.kernels.sea.cnn import bidirectional_cnn, causal_cnn
from attnrewrite.kernels.sea.estimator import bidirectional_estimate, causal_estimate
from attnrewrite.kernels.sea.linear import (
    draw_features,
    feature_count,
    linear_attention,
    positive_features,
    prefix_linear_attention,
    relu_features,
)
from attnrewrite.kernels.sea.positions import fourier_code, interpolated_identity
from attnrewrite.kernels.sea.reference import sea_attention


def draw_rows(B, C, L, width, seed=0):
    return torch.randn(B, C, L, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestFeatures:
    def test_count(self):
        assert [feature_count(64, 8), feature_count(64), feature_count(1)] == [33, 266, 1]

    def test_drawn_once_for_all(self, assert_prints):
        features = draw_features(11, 4, seed=3)
        assert torch.equal(features, draw_features(11, 4, seed=3))
        assert not torch.equal(features, draw_features(11, 4, seed=4))
        assert features.dtype == torch.float32
        state = torch.get_rng_state()
        draw_features(11, 4)
        assert torch.equal(state, torch.get_rng_state())

    def test_rows_of_a_block_are_orthogonal_and_their_norms_are_of_normal_vectors(self):
        features = draw_features(800, 16).double()
        for block in features[:64].split(16):
            cosines = F.normalize(block) @ F.normalize(block).T
            torch.testing.assert_close(cosines, torch.eye(16).double(), rtol=0, atol=1e-6)
        assert features.square().sum(-1).mean().item() == pytest.approx(16, rel=0.03)
        assert features.norm(dim=-1).std().item() == pytest.approx(math.sqrt(0.5), rel=0.1)

    def test_positive_features_estimate_the_exponential_kernel(self):
        source = torch.Generator().manual_seed(0)
        query, key = (0.5 * torch.randn(1, 1, 6, 4, generator=source, dtype=torch.float64) for _ in range(2))
        features = draw_features(20000, 4).double()
        estimate = positive_features(query, features, False) @ positive_features(key, features, True).mT
        exact = torch.exp(query @ key.mT / 2)  # both up to factors of rows and of the whole
        ratio = estimate / exact
        ratio = ratio / ratio.mean(-1, keepdim=True)
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=0.05)

    def test_padding_does_not_set_the_maximum(self):
        states = draw_rows(1, 2, 6, 4)
        real = torch.arange(6) < 4
        loud = states.clone()
        loud[:, :, 4:] *= 100
        for padded in (states, loud):
            found = positive_features(padded, draw_features(5, 4), True, real[None])[:, :, :4]
            torch.testing.assert_close(found, positive_features(states[:, :, :4], draw_features(5, 4), True), **CLOSE)
        assert positive_features(states, draw_features(5, 4), True, real[None] & False).isfinite().all()

    def test_features_are_float32_for_16_bit_states(self):
        states = draw_rows(1, 2, 6, 16)
        for function in (relu_features, lambda x, features: positive_features(x, features, True)):
            found = function(states.bfloat16(), draw_features(9, 16))
            assert found.dtype == torch.float32
            exact = function(states.bfloat16().double(), draw_features(9, 16))
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


class TestLinearAttention:
    def test_running_context_of_the_worked_example(self, assert_prints, table):
        data, features = worked_example(), table("[1 .5] [-.5 1]")
        t, c = torch.arange(1, 7).double()[:, None], torch.arange(1, 3).double()
        code = torch.cos(0.1 * t * c).expand(1, 2, 6, 2)
        context, _ = prefix_linear_attention(
            relu_features(data.query, features), relu_features(data.key, features), torch.cat((code, data.value), -1)
        )
        assert_prints(context[0, 0, 5], "0.9834501645 0.9347421412 0.4773297844 0.5740518156")
        assert_prints(context[0, 0, 1], "0.9894555440 0.9581487389 0.3641698901 0.4710821966")

    @pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
    def test_equals_the_quadratic_form(self, T):
        query, key, value = (draw_rows(2, heads, T, n).abs() + 0.1 for heads, n in ((4, 5), (2, 5), (2, 3)))
        weights = query @ key.repeat_interleave(2, dim=1).mT
        values = value.repeat_interleave(2, dim=1)
        full = weights / weights.sum(-1, keepdim=True) @ values
        torch.testing.assert_close(linear_attention(query, key, value), full, **CLOSE)
        causal = weights.tril() / weights.tril().sum(-1, keepdim=True) @ values
        torch.testing.assert_close(prefix_linear_attention(query, key, value)[0], causal, **CLOSE)

    def test_rows_before_any_key_are_zero(self):
        query, key, value = (draw_rows(1, 2, 6, n).abs() for n in (5, 5, 3))
        key[:, :, :2] = 0
        context, _ = prefix_linear_attention(query, key, value)
        assert (context[:, :, :2] == 0).all()
        assert context.isfinite().all()


class TestPositions:
    def test_interpolated_identity(self, assert_prints):
        code = interpolated_identity(torch.arange(4)[None], torch.tensor([[4]]), 3, torch.float64)
        third = "0.33333333 0.66666667"
        assert_prints(code, f"[1 0 0] [{third} 0] [0 {' '.join(reversed(third.split()))}] [0 0 1]")
        identity = interpolated_identity(torch.arange(5)[None], torch.tensor([[5]]), 5, torch.float64)
        torch.testing.assert_close(identity[0], torch.eye(5).double(), **CLOSE)
        one = interpolated_identity(torch.zeros(1, 1).long(), torch.tensor([[1]]), 3, torch.float64)
        assert one.tolist() == [[[1, 0, 0]]]

    @pytest.mark.parametrize("D", [1, 2, 7, 8])
    def test_fourier_code(self, D):
        rank = torch.tensor([[0, 1, 100_000]])
        code = fourier_code(rank, D, torch.float64)
        assert code.shape == (1, 3, D)
        assert code[0, :, 0].tolist() == pytest.approx([1, math.cos(1), math.cos(100_000)], abs=1e-12)
        single = fourier_code(rank, D, torch.float32)
        torch.testing.assert_close(single.double(), code, rtol=0, atol=1e-7)


class TestNetworks:
    def test_causal_network_sees_eight_rows_up(self):
        cnn = draw_estimator(2, 4, 8, is_causal=True).cnn
        rows = draw_rows(1, 4, 20, 4).requires_grad_()
        logits, _ = causal_cnn(rows, cnn, torch.ones(1, 20, dtype=torch.bool))
        assert logits.shape == (1, 2, 20, 8)
        # Not the plain sum, which the norm over M makes constant.
        (grad,) = torch.autograd.grad((logits[0, :, 15] * torch.arange(8.0)).sum(), rows)
        assert grad.abs().amax((0, 1, 3)).nonzero().flatten().tolist() == [7, 9, 11, 13, 15]

    def test_causal_network_is_its_convolutions_with_the_lower_taps_cut_off(self):
        cnn = draw_estimator(2, 4, 8, is_causal=True).cnn
        rows = draw_rows(2, 4, 9, 4)
        found, _ = causal_cnn(rows, cnn, torch.ones(1, 9, dtype=torch.bool))
        x = F.layer_norm(rows, (4,), *cnn.norm)
        for layer in (cnn.first, cnn.second):
            kernel = F.pad(layer.weight, (0, 0, 0, 2))  # taps at i - 4 to i + 4
            x = F.relu(F.conv2d(x, kernel, layer.bias, dilation=2, padding=(4, 2)))
        x = F.interpolate(x, size=(9, 8), mode="nearest")
        torch.testing.assert_close(found, F.layer_norm(F.conv2d(x, *cnn.last), (8,), *cnn.out_norm), **CLOSE)

    @pytest.mark.parametrize("L", [1, 2, 5, 8])
    def test_bidirectional_network_is_its_convolutions_and_a_resize(self, L):
        cnn = draw_estimator(2, 4, 8, is_causal=False).cnn
        rows = draw_rows(2, 4, L, 4)
        x = F.relu(F.conv2d(rows, *cnn.first, stride=(2, 1), padding=1))
        x = F.relu(F.conv2d(x, *cnn.second, padding=1)).repeat_interleave(2, dim=2)
        x = F.interpolate(F.conv2d(x, *cnn.last, padding=1), size=(L, 8), mode="bilinear")
        found = bidirectional_cnn(rows, cnn, 8, torch.ones(1, L, dtype=torch.bool))
        torch.testing.assert_close(found, x, **CLOSE)

    def test_heads_are_contiguous_channels(self):
        """Channel h ch + s holds part s of head h: with one channel per head alive, only that head's rows count."""
        estimator = draw_estimator(2, 4, 8, is_causal=True, channels=2)
        query, key, value, *_ = (t.detach() for t in draw_tensors(1, 2, 2, 6, 4, 8))
        changed = query.clone()
        changed[:, 1] += 1
        seen = []
        for q in (query, changed):
            cnn = estimator.cnn
            first = cnn.first.weight.clone()
            first[:, 2:] = 0  # only the channels of head 0
            cnn = cnn._replace(first=cnn.first._replace(weight=first))
            seen.append(causal_estimate(q, key, value, type(estimator)(**{**vars(estimator), "cnn": cnn}))[0])
        torch.testing.assert_close(seen[0].estimated, seen[1].estimated, **CLOSE)
        assert not torch.equal(seen[0].mix[:, 1], seen[1].mix[:, 1])


class TestEstimates:
    @pytest.mark.parametrize("Hkv", [1, 2, 4])
    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_shapes_and_repeated_kv(self, Hkv, is_causal):
        estimator = draw_estimator(4, 6, 8, is_causal=is_causal, Dv=5)
        query, key, value, *_ = draw_tensors(2, 4, Hkv, 9, 6, 8, Dv=5)
        found = self.estimate(query, key, value, estimator, is_causal)
        assert found.estimated.shape == (2, 4, 9, 8)
        assert found.scale_prob.shape == found.mix.shape == (2, 4, 9)
        repeated = [t.repeat_interleave(4 // Hkv, dim=1) for t in (key, value)]
        for ours, theirs in zip(found, self.estimate(query, *repeated, estimator, is_causal), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)

    @pytest.mark.parametrize("table", [0, 64], ids=["fourier", "learned"])
    def test_no_leak_from_the_future(self, table):
        estimator = draw_estimator(2, 4, 8, is_causal=True, table=table)
        tensors = [t.detach() for t in draw_tensors(2, 2, 2, 33, 4, 8)[:3]]
        changed = [t.clone() for t in tensors]
        for t in changed:
            t[:, :, 20:] = 3 * t[:, :, 20:].flip(2) + 1
        outs = []
        for q, k, v in (tensors, changed):
            estimate, _ = causal_estimate(q, k, v, estimator)
            outs.append(sea_attention(q, k, v, *estimate[:1], is_causal=True, budget=3, **self.factors(estimate)))
        assert torch.equal(outs[0][:, :, :20], outs[1][:, :, :20])
        assert not torch.equal(outs[0][:, :, 20:], outs[1][:, :, 20:])

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("real", [slice(0, 7), slice(0, 8), slice(5, None), slice(4, None)], ids=str)
    def test_padding_changes_nothing(self, is_causal, real):
        estimator = draw_estimator(2, 4, 8, is_causal=is_causal)
        tensors = [t.detach() for t in draw_tensors(2, 2, 2, 13, 4, 8)[:3]]
        mask = torch.zeros(13, dtype=torch.bool)
        mask[real] = True
        alone = self.estimate(*(t[:, :, real] for t in tensors), estimator, is_causal)
        for t in tensors:
            t[:, :, ~mask] *= 50
        found = self.estimate(*tensors, estimator, is_causal, mask[None])
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours[:, :, real], theirs, **CLOSE)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_nothing_but_padding_is_finite(self, is_causal):
        estimator = draw_estimator(2, 4, 8, is_causal=is_causal)
        tensors = [t.detach() for t in draw_tensors(1, 2, 2, 5, 4, 8)[:3]]
        found = self.estimate(*tensors, estimator, is_causal, torch.zeros(1, 5, dtype=torch.bool))
        assert all(tensor.isfinite().all() for tensor in found)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_16_bit_weights(self, is_causal):
        estimator = draw_estimator(2, 4, 8, is_causal=is_causal, table=0, dtype=torch.bfloat16)
        tensors = [t.detach() for t in draw_tensors(1, 2, 2, 601, 4, 8, dtype=torch.bfloat16)[:3]]
        found = self.estimate(*tensors, estimator, is_causal)
        assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
        wide = type(estimator)(**{name: self.doubled(part) for name, part in vars(estimator).items()})
        exact = self.estimate(*(t.double() for t in tensors), wide, is_causal)
        assert (found.estimated - exact.estimated).square().mean() < 0.03**2 * exact.estimated.square().mean()

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_large_bias_of_the_factors_and_budget_give_sdpa(self, is_causal):
        estimator = draw_estimator(2, 4, 8, is_causal=is_causal)
        forty = estimator.scales._replace(
            weight=torch.zeros_like(estimator.scales.weight), bias=torch.full((2,), 40.0).double()
        )
        estimator = type(estimator)(**{**vars(estimator), "scales": forty})
        tensors = draw_tensors(2, 2, 2, 11, 4, 8)[:3]
        estimate = self.estimate(*tensors, estimator, is_causal)
        out = sea_attention(*tensors, estimate[0], is_causal=is_causal, budget=11, **self.factors(estimate))
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, is_causal=is_causal), **CLOSE)

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_gradients(self, is_causal):
        """The estimate is smooth but for ReLU; a loss on the sparse part alone gives it nothing."""
        estimator = draw_estimator(2, 4, 4, is_causal=is_causal)
        tensors = draw_tensors(1, 2, 1, 5, 4, 4)[:3]
        assert torch.autograd.gradcheck(lambda *t: tuple(self.estimate(*t, estimator, is_causal)), tensors)
        weight = estimator.encode.weight.requires_grad_()
        estimate = self.estimate(*tensors, estimator, is_causal)
        sparse = sea_attention(*tensors, estimate[0], is_causal=is_causal, enable_gqa=True, budget=2)
        assert torch.autograd.grad(sparse.sum(), weight, allow_unused=True)[0] is None
        whole = sea_attention(
            *tensors, estimate[0], is_causal=is_causal, enable_gqa=True, budget=2, **self.factors(estimate)
        )
        assert torch.autograd.grad(whole.sum(), weight)[0].abs().max() > 0

    @staticmethod
    def estimate(query, key, value, estimator, is_causal, padding=None):
        if is_causal:
            return causal_estimate(query, key, value, estimator, padding)[0]
        return bidirectional_estimate(query, key, value, estimator, padding)

    @classmethod
    def doubled(cls, part):
        if isinstance(part, tuple):
            return type(part)(*map(cls.doubled, part))
        return part.double() if isinstance(part, torch.Tensor) else part

    @staticmethod
    def factors(estimate):
        return {"scale_prob": estimate.scale_prob, "mix": estimate.mix}
