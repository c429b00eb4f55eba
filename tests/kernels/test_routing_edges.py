"""Routing attention at its edges: padding, short and equal tokens, empty clusters, NaN."""

import math

import pytest
import torch
import torch.nn.functional as F
from routing_support import CAUSAL, CLOSE, RULES, by_definition, detached, padding, random_routing

from attnrewrite.kernels.routing.prepare import Options, Routed, prepare
from attnrewrite.kernels.routing.reference import routing_attention


class TestPadding:
    @RULES
    @pytest.mark.parametrize("options", [{}, CAUSAL, {"shared_qk": True}, {"logits": "normed"}], ids=str)
    def test_appended_tokens_change_nothing(self, rule, options):
        query, key, value, centroids = detached(*random_routing(2, 2, 2, 13, 8, 3))
        options = {"rule": rule, "window_size": 4, **options}
        alone = routing_attention(query, key, value, centroids, **options)
        for filler in (7.0, math.nan):
            longer = [F.pad(tensor, (0, 0, 0, 6), value=filler) for tensor in (query, key, value)]
            padded = routing_attention(*longer, centroids, padding(13, 13, N=19), **options)
            assert torch.equal(padded[:, :, :13], alone)
            assert (padded[:, :, 13:] == 0).all()

    @RULES
    def test_left_padding_changes_nothing(self, rule):
        query, key, value, centroids = detached(*random_routing(2, 2, 2, 13, 8, 3))
        options = {"rule": rule, "window_size": 4, **CAUSAL}
        alone = routing_attention(query, key, value, centroids, **options)
        longer = [F.pad(tensor, (0, 0, 6, 0), value=math.nan) for tensor in (query, key, value)]
        real = padding(13, 13, N=19, left=True)
        additive = torch.zeros(real.shape, dtype=torch.float64).masked_fill(~real, -math.inf)
        for mask in (real, additive):
            padded = routing_attention(*longer, centroids, mask, **options)
            torch.testing.assert_close(padded[:, :, 6:], alone, **CLOSE)
            assert (padded[:, :, :6] == 0).all()

    @RULES
    def test_all_padded_rows_give_0_and_finite_gradients(self, rule):
        *tensors, centroids = random_routing(2, 2, 2, 6, 4, 3)
        mask = padding(0, 4, N=6)
        with torch.autograd.detect_anomaly(check_nan=True):
            out = routing_attention(*tensors, centroids, mask, rule=rule)
            out.square().sum().backward()
        assert (out[0] == 0).all()
        assert (out[1, :, 4:] == 0).all()
        for tensor in tensors:
            assert tensor.grad.isfinite().all()
            assert (tensor.grad[0] == 0).all()

    @RULES
    def test_fewer_real_tokens_than_a_cluster_takes(self, rule):
        query, key, value, centroids = random_routing(1, 2, 2, 9, 8, 2)
        out = routing_attention(query, key, value, centroids, padding(3, N=9), rule=rule, window_size=6)
        short = (tensor[:, :, :3] for tensor in (query, key, value))
        expected = by_definition(*short, centroids, 3 if rule == "topw" else 6, rule=rule)
        torch.testing.assert_close(out[:, :, :3], expected, **CLOSE)


class TestEdges:
    @RULES
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("C", [1, 3])
    def test_one_token_meets_itself(self, rule, shared, C):
        query, key, value, centroids = random_routing(2, 2, 2, 1, 4, C)
        out = routing_attention(query, key, value, centroids, rule=rule, shared_qk=shared)
        torch.testing.assert_close(out, value, **CLOSE)

    @RULES
    @pytest.mark.parametrize("causality", [{}, CAUSAL], ids=["full", "causal"])
    @pytest.mark.parametrize(("N", "C", "w"), [(3, 7, None), (3, 7, 2), (5, 2, 50)])
    def test_short_sequences(self, rule, causality, N, C, w):
        query, key, value, centroids = random_routing(1, 2, 2, N, 8, C)
        out = routing_attention(query, key, value, centroids, rule=rule, window_size=w, **causality)
        causal = bool(causality)
        expected = by_definition(query, key, value, centroids, w or 1, rule=rule, causal=causal)
        torch.testing.assert_close(out, expected, **CLOSE)

    @RULES
    @pytest.mark.parametrize("N", [5, 37])
    def test_equal_tokens_take_the_first_cluster_and_the_first_positions(self, rule, N):
        query, key, value, _ = random_routing(1, 1, 1, N, 8, 1)
        query, key = query[:, :, :1].expand(1, 1, N, 8), key[:, :, :1].expand(1, 1, N, 8)
        # One feature each: a product of more may be rounded otherwise in one row of a matrix than in another.
        centroids = torch.zeros(1, 3, 8, dtype=torch.float64)
        centroids[..., 0] = 8**0.5
        out = routing_attention(query, key, value, centroids, rule=rule, window_size=4, **CAUSAL)
        if rule == "topw":
            means = [value[:, :, : i + 1].mean(2) for i in range(4)]
            assert (out[:, :, 4:] == 0).all()
            torch.testing.assert_close(out[:, :, :4], torch.stack(means, 2), **CLOSE)
        else:
            means = [value[:, :, max(0, i - 3) : i + 1].mean(2) for i in range(N)]
            torch.testing.assert_close(out, torch.stack(means, 2), **CLOSE)

    def test_empty_clusters(self):
        query, key, value, centroids = random_routing(1, 1, 1, 12, 8, 2)
        nowhere = torch.zeros(1, 5, 8, dtype=torch.float64)
        nowhere[:, 1::3] = centroids
        out = routing_attention(query, key, value, nowhere, window_size=4, is_causal=True)
        torch.testing.assert_close(out, by_definition(query, key, value, nowhere, 4, causal=True), **CLOSE)

    def test_keys_of_no_cluster_of_a_query(self):
        """Every query is in one cluster and every key in the other: each token has itself."""
        query, key, value, centroids = random_routing(1, 1, 1, 6, 8, 1)
        centroids = torch.cat((centroids, -centroids), 1)
        query, key = centroids[:, :1, None].expand(1, 1, 6, 8), centroids[:, 1:, None].expand(1, 1, 6, 8)
        for causality in ({}, {"is_causal": True}):
            out = routing_attention(query, key, value, centroids, window_size=3, **causality)
            torch.testing.assert_close(out, value, **CLOSE)

    def test_a_token_in_no_cluster_gets_0_and_no_gradient(self):
        *tensors, centroids = random_routing(1, 1, 1, 12, 8, 2)
        options = Options("topw", 2)
        _, selection = prepare(Routed(*tensors, centroids), options)
        out = routing_attention(*tensors, centroids, rule="topw", window_size=2)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        asked, met = (set(part.flatten().tolist()) for part in (selection.queries, selection.keys))
        outside = [n for n in range(12) if n not in asked], [n for n in range(12) if n not in met]
        assert all(outside)
        assert (out[0, 0, outside[0]] == 0).all()
        assert (grads[0][0, 0, outside[0]] == 0).all()
        assert (grads[1][0, 0, outside[1]] == 0).all()
        assert (grads[2][0, 0, outside[1]] == 0).all()
        assert (grads[2][0, 0, sorted(met)] != 0).any(-1).all()

    @RULES
    @pytest.mark.parametrize("which", range(4))
    def test_nan_is_not_hidden(self, rule, which):
        data = detached(*random_routing(1, 1, 1, 12, 8, 3))
        data[which].flatten()[8 * 2 + 1] = math.nan  # token 2, or centroid 2
        out = routing_attention(*data, rule=rule, window_size=8)
        assert out.isnan().any()
        if which == 0:
            assert out[0, 0, 2].isnan().all()
        if which == 3:
            assert out.isnan().all(-1).any()

    def test_nan_of_what_is_only_routed_is_not_hidden(self):
        query, key, value, centroids = detached(*random_routing(1, 1, 1, 12, 8, 3))
        for name in ("routing_query", "routing_key"):
            routed = {"routing_query": query.clone(), "routing_key": key.clone()}
            routed[name][0, 0, 2, 1] = math.nan
            out = routing_attention(query, key, value, centroids, is_causal=True, **routed)
            assert out[0, 0, 2].isnan().all()
            assert out[0, 0, :2].isfinite().all()
