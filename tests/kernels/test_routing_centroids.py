"""Centroids of routing attention: moving average, dead clusters, k-means, the auxiliary loss."""

import math

import pytest
import torch
from routing_support import CLOSE, random_routing, worked_example

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.routing.calibration import calibrate, one_sided, seeds
from attnrewrite.kernels.routing.centroids import CentroidState, accumulate, balance, reseed, update
from attnrewrite.kernels.routing.clusters import affinity, commitment_loss, nearest, routing_features


def started(centroids, count=3.0):
    counts = torch.full(centroids.shape[:2], count, dtype=centroids.dtype)
    return CentroidState(centroids, counts, count * centroids)


@pytest.fixture
def drawn():
    """Features of 2 sequences of 4 heads in 2 centroid sets of 3 clusters."""
    query, *_, centroids = random_routing(2, 4, 2, 20, 8, 3)
    return routing_features(query), centroids


class TestMovingAverage:
    def test_worked_example(self, assert_prints):
        data = worked_example()
        features = routing_features(data.query)
        counts, sums = accumulate(features, data.centroids)
        assert counts.tolist() == [[3.0, 3.0]]
        after = update(started(data.centroids), counts, sums, 0.9)
        assert_prints(
            after.centroids,
            """1.3013815651 0.5905869539 -0.6562942241 -1.2356742949
            -1.3595211418 1.1862293507 0.6906107827 -0.5173189916""",
        )
        assert_prints(commitment_loss(features, data.centroids, beta=1.0), "1.0949479862")

    def test_decay_1_changes_nothing(self, drawn):
        features, centroids = drawn
        before = started(centroids)
        after = update(before, *accumulate(features, centroids), 1.0)
        for found, expected in zip(after, before, strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)

    def test_decay_0_gives_the_means_of_the_batch(self, drawn):
        features, centroids = drawn
        after = update(started(centroids), *accumulate(features, centroids), 0.0)
        cluster = nearest(affinity(features, centroids))
        for g in range(2):
            for c in range(3):
                members = features[:, 2 * g : 2 * g + 2][cluster[:, 2 * g : 2 * g + 2] == c]
                assert after.ema_count[g, c] == len(members)
                mean = members.mean(0)
                torch.testing.assert_close(after.centroids[g, c], math.sqrt(8) * mean / mean.norm(), **CLOSE)

    def test_ranks_add_up(self, drawn):
        """Two ranks that add their sums get what one gets from both batches; so do queries and keys."""
        features, centroids = (tensor.float() for tensor in drawn)
        whole = accumulate(features, centroids)
        parts = accumulate(features[:1], centroids), accumulate(features[1:], centroids)
        summed = [one + other for one, other in zip(*parts, strict=True)]
        states = [update(started(centroids), *sums) for sums in (whole, summed)]
        for one, other in zip(*states, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

    def test_padding_does_not_count(self, drawn):
        features, centroids = drawn
        valid = torch.arange(20) < torch.tensor([[20], [7]])
        dirty = features.masked_fill(~valid[:, None, :, None], math.nan)
        short = [accumulate(part, centroids) for part in (features[:1], features[1:, :, :7])]
        for found, one, other in zip(accumulate(dirty, centroids, valid), *short, strict=True):
            torch.testing.assert_close(found, one + other, **CLOSE)

    def test_an_empty_cluster_stays(self, drawn):
        features, centroids = drawn
        lonely = torch.cat((centroids, torch.zeros_like(centroids[:, :1])), 1)
        lonely[0, 3] = -8 * features[0, :2].sum((0, 1))
        counts, sums = accumulate(features[:1, :, :1].expand(2, 4, 5, 8), lonely)
        assert (counts == 0).any()
        empty = CentroidState(lonely, torch.zeros_like(counts), torch.zeros_like(sums))
        after = update(empty, counts, sums, 0.9)
        assert torch.equal(after.centroids[counts == 0], lonely[counts == 0])
        norms = after.centroids[counts > 0].norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(8)), **CLOSE)

    def test_norm_stays_where_the_count_starts_at_0(self, drawn):
        """With a count of 0 beside a sum of mu, sum over count is about 1000 / n times too long; the norm is not."""
        features, centroids = drawn
        counts, sums = accumulate(features, centroids)
        bad = CentroidState(centroids, torch.zeros_like(counts), centroids)
        after = update(bad, counts, sums)
        assert ((after.ema_sum / after.ema_count.unsqueeze(-1)).norm(dim=-1) > 20 * math.sqrt(8)).all()
        torch.testing.assert_close(after.centroids.square().sum(-1), torch.full_like(counts, 8.0), **CLOSE)

    def test_has_no_gradient_and_is_repeatable(self, drawn):
        features, centroids = drawn
        first, second = accumulate(features, centroids), accumulate(features, centroids)
        assert not any(part.requires_grad for part in first)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    def test_autocast_does_not_reach_the_sums(self, drawn):
        features, centroids = (tensor.float() for tensor in drawn)
        with torch.autocast("cpu", torch.bfloat16):
            under = accumulate(features, centroids)
        assert all(torch.equal(one, other) for one, other in zip(under, accumulate(features, centroids), strict=True))


class TestCommitmentLoss:
    def test_gradient_goes_to_the_features_only(self, drawn):
        features, centroids = drawn
        features = features.detach().requires_grad_()
        centroids.requires_grad_()
        loss = commitment_loss(features, centroids, beta=0.5)
        grad, none = torch.autograd.grad(loss, (features, centroids), allow_unused=True)
        assert none is None
        own = centroids.detach().repeat_interleave(2, 0)[
            torch.arange(4)[:, None], nearest(affinity(features, centroids))
        ]
        torch.testing.assert_close(grad, (features - own).detach() / features.numel(), **CLOSE)
        assert commitment_loss(features, centroids).item() == pytest.approx(2e-4 * loss.item(), rel=1e-12)

    def test_padding_does_not_count(self, drawn):
        features, centroids = drawn
        valid = torch.arange(20) < torch.tensor([[6], [6]])
        dirty = features.masked_fill(~valid[:, None, :, None], math.nan)
        expected = commitment_loss(features[:, :, :6], centroids)
        torch.testing.assert_close(commitment_loss(dirty, centroids, valid), expected, **CLOSE)
        assert commitment_loss(dirty, centroids, torch.zeros_like(valid)) == 0


class TestDeadClusters:
    def test_move_to_the_loneliest_tokens(self, drawn):
        features, centroids = drawn
        state = started(centroids)
        state.ema_count[0, 1:] = torch.tensor([0.01, 0.02])
        after = reseed(state, features)
        tokens = features[:, :2].reshape(-1, 8)
        order = (tokens @ centroids[0].T).amax(-1).argsort(stable=True)
        expected = tokens[order[:2]] * math.sqrt(8) / tokens[order[:2]].norm(dim=-1, keepdim=True)
        torch.testing.assert_close(after.centroids[0, 1:], expected, **CLOSE)
        mean = state.ema_count[0].mean()
        assert (after.ema_count[0, 1:] == mean).all()
        torch.testing.assert_close(after.ema_sum[0, 1:], mean * after.centroids[0, 1:], **CLOSE)
        for found, before in zip(after, state, strict=True):
            assert torch.equal(found[1], before[1])
            assert torch.equal(found[0, 0], before[0, 0])

    def test_stay_without_tokens(self, drawn):
        features, centroids = drawn
        state = started(centroids)
        state.ema_count[:, :2] = 0.0
        valid = torch.zeros(2, 20, dtype=torch.bool)
        for found, before in zip(reseed(state, features, valid), state, strict=True):
            assert torch.equal(found, before)
        valid[0, 4] = True  # one token, in each of two heads of a set
        after = reseed(state, features.masked_fill(~valid[:, None, :, None], math.nan), valid)
        assert (after.centroids[:, :2] != centroids[:, :2]).any(-1).all()
        one = torch.zeros(1, 2, 1, 8, dtype=torch.float64) + features[0, ::2, 4][None, :, None]
        assert (reseed(state, one).centroids != centroids).any(-1).sum(-1).tolist() == [1, 1]

    def test_do_not_move_onto_a_constant_vector(self, drawn):
        features, centroids = drawn
        state = started(centroids)
        state.ema_count[:, 0] = 0.0
        features[:, :, 3] = 0.0
        features[:, :, :3] = features[:, :, 4:7] = state.centroids[:, 1].repeat_interleave(2, 0).unsqueeze(1)
        after = reseed(state, features[:, :, :7])
        assert torch.equal(after.centroids[:, 0], centroids[:, 1])

    def test_balance(self):
        least, most = balance(torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]))
        assert least.tolist() == [0.5, 1.0]
        assert most.tolist() == [1.5, 1.0]


def bundles(per=30, seed=0):
    """Tokens [1, 2, N, 8] that lie close to 4 directions, other ones in each head, and those directions."""
    source = torch.Generator().manual_seed(seed)
    directions = routing_features(torch.randn(1, 2, 4, 8, generator=source, dtype=torch.float64))
    noise = 0.1 * torch.randn(1, 2, 4, per, 8, generator=source, dtype=torch.float64)
    return routing_features((directions.unsqueeze(3) + noise).flatten(2, 3)), directions[0]


class TestKMeans:
    def test_finds_what_is_there(self):
        features, directions = bundles()
        state = calibrate(features, 2, 4)
        assert (state.ema_count == 30).all()
        nearness = (directions @ state.centroids.mT / 8).sort(dim=-1).values
        assert (nearness[..., -1] > 0.99).all()
        torch.testing.assert_close(state.centroids.square().sum(-1), torch.full_like(state.ema_count, 8.0), **CLOSE)
        torch.testing.assert_close(state.ema_sum, 30 * state.centroids, **CLOSE)

    def test_is_at_rest_and_no_worse_than_its_seeds(self):
        features, *_ = random_routing(2, 2, 1, 50, 8, 1)
        features = routing_features(features).detach()
        objectives = [
            affinity(features, calibrate(features, 1, 6, steps=steps).centroids).amax(-1).mean() for steps in (0, 2, 40)
        ]
        assert objectives == sorted(objectives)
        rested = calibrate(features, 1, 6, steps=200)
        more = update(rested, *accumulate(features, rested.centroids), 0.0)
        torch.testing.assert_close(more.centroids, rested.centroids, rtol=1e-9, atol=1e-9)

    def test_seed_decides(self):
        features, _ = bundles()
        first, second, other = (calibrate(features, 2, 4, steps=0, seed=seed).centroids for seed in (1, 1, 2))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)

    def test_seeds_are_far_apart(self):
        """Uniform draws hit the same bundle twice in most of all cases; k-means++ does not."""
        features, _ = bundles()
        tokens = features[0]
        for seed in range(5):
            found = seeds(tokens, torch.ones(2, 120, dtype=torch.bool), 4, seed)
            similar = (found @ found.mT / 8).masked_fill(torch.eye(4, dtype=torch.bool), -1.0)
            assert similar.max() < 0.9

    def test_padding_is_not_clustered(self):
        features, _ = bundles()
        longer = torch.cat((features, torch.full_like(features, math.nan)), 2)
        valid = torch.arange(240)[None] < 120
        state = calibrate(longer, 2, 4, valid)
        assert (state.ema_count == 30).all()

    @pytest.mark.parametrize("N", [1, 2, 7])
    def test_equal_tokens_and_fewer_tokens_than_clusters(self, N):
        features, _ = bundles()
        state = calibrate(features[:, :, :1].expand(1, 2, N, 8), 2, 4)
        assert state.centroids.isfinite().all()
        assert state.ema_count.tolist() == [[N, 0, 0, 0]] * 2

    def test_centers_bring_queries_and_keys_together(self):
        """Queries and keys around means of their own fall into clusters of their own unless those are removed."""
        features, _ = bundles()
        away = 40 * torch.linspace(-1, 1, 8, dtype=torch.float64)
        query, key = features + away, features.flip(2) - away
        means = [states.mean((0, 2)) for states in (query, key)]
        for centers, expected in (((None, None), True), (means, False)):
            q, k = (routing_features(x, center) for x, center in zip((query, key), centers, strict=True))
            state = calibrate(torch.cat((q, k), 2), 2, 4)
            sides = [accumulate(x, state.centroids)[0] for x in (q, k)]
            assert one_sided(*sides).all() if expected else not one_sided(*sides).any()

    def test_one_sided(self):
        queries, keys = torch.tensor([[40.0, 41.0, 0.0, 0.0]]), torch.tensor([[2.0, 2.0, 0.0, 1.0]])
        assert one_sided(queries, keys).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, mu: accumulate(x[0], mu), "3 dimensions"),
        (lambda x, mu: accumulate(x.long(), mu), "torch.int64"),
        (lambda x, mu: accumulate(x, mu[..., :4]), "2 x 3 x 4; needed is Hc x C x D = 2 x 3 x 8"),
        (lambda x, mu: accumulate(x[:, :3], mu), "3 heads, not a multiple of the 2"),
        (
            lambda x, mu: commitment_loss(x, mu, torch.ones(2, 20)),
            "torch.float32; needed is B x N = 2 x 20 of torch.bool",
        ),
        (lambda x, mu: reseed(started(mu), x, torch.ones(2, 19, dtype=torch.bool)), "2 x 19"),
        (lambda x, mu: calibrate(x, 3, 2), "4 heads, not a multiple of the 3"),
        (lambda x, mu: calibrate(x, 2, 0), "C is 0"),
        (lambda x, mu: calibrate(x, 2, 3, torch.zeros(2, 20, dtype=torch.bool)), "all are padded"),
        (lambda x, mu: calibrate(x * math.nan, 2, 3), "NaN"),
    ],
)
def test_wrong_arguments(drawn, call, says):
    with pytest.raises(LoweringError) as raised:
        call(*drawn)
    assert raised.value.code == "AR402"
    assert says in raised.value.detail, raised.value.detail
