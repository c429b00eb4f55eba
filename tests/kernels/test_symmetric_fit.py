"""The shared projection nearest to trained ones: worked example, optimality, monotone steps."""

import math
from itertools import pairwise

import pytest
import torch
from symmetric_support import worked

from attnrewrite.kernels.symmetric.fit import (
    fit_keys,
    fit_pairwise,
    fit_rotary,
    fit_signed,
    fit_symmetric,
    shared_bias,
)
from attnrewrite.kernels.symmetric.layer import Moments, Projections, fit_layer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_of(x):
    centred = x - x.mean(0)
    return centred.mT @ centred / x.shape[0]


class TestWorkedExample:
    def test_parts_and_eigenvalues(self, assert_prints):
        data = worked()
        product = data.w_q @ data.w_k.mT
        even, odd = (product + product.mT) / 2, (product - product.mT) / 2
        norms = torch.stack([torch.linalg.matrix_norm(x) for x in (product, even, odd)])
        assert_prints(norms, "4.1031060682 4.0993549334 0.1754096253")
        assert_prints(torch.linalg.eigvalsh(even).flip(0), "4.0951431732 0.1853146603 -0.0003204252 -0.0131009569")

    def test_symmetric(self, assert_prints):
        data = worked()
        found = fit_symmetric(data.w_q, data.w_k)
        assert_prints(
            found.weight,
            "[1.3713107070 0.1370887214] [0.7588978879 0.2293420095] [-0.3546340454 0.2553646480]"
            "[-1.2300239053 0.2207090437]",
        )
        assert_prints(torch.tensor(found.error, dtype=torch.float64), "0.0428695907")

    def test_pairwise(self, assert_prints):
        data = worked()
        start = fit_pairwise(data.w_q[None], data.w_k, steps=0)
        assert_prints(torch.tensor(start.error, dtype=torch.float64), "0.0205605787")
        found = fit_pairwise(data.w_q[None], data.w_k)
        assert_prints(torch.tensor(found.error, dtype=torch.float64), "0.0205577644")

    def test_rotary(self, assert_prints):
        data = worked()
        w_q, w_k = (torch.complex(w[:, :1], w[:, 1:]) for w in (data.w_q, data.w_k))
        found = fit_rotary(w_q, w_k)
        assert_prints(
            torch.view_as_real(found.weight.squeeze(-1)),
            "1.3936784258 0 0.8216716159 -0.4225834313 -0.2936216506 -0.6144405881 -1.2012713042 -0.4568044226",
        )
        assert_prints(torch.tensor(found.error, dtype=torch.float64), "0.4687110871")
        product = w_q @ w_k.mH
        values = torch.linalg.eigvalsh((product + product.mH) / 2)
        assert_prints(values[[-1, 0]], "4.9115344920 -0.6444980405")


class TestSymmetric:
    def test_recovers_what_is_symmetric_already(self):
        w = draw(12, 4)
        found = fit_symmetric(w, w)
        assert found.error < 1e-12
        torch.testing.assert_close(found.weight @ found.weight.mT, w @ w.mT, rtol=1e-12, atol=1e-12)

    def test_no_change_makes_it_better(self):
        w_q, w_k = draw(10, 3), draw(10, 3, seed=1)
        best, product = fit_symmetric(w_q, w_k).weight, w_q @ w_k.mT
        least = torch.linalg.matrix_norm(product - best @ best.mT)
        for seed in range(20):
            other = best + 0.05 * draw(10, 3, seed=seed + 2)
            assert torch.linalg.matrix_norm(product - other @ other.mT) >= least

    def test_the_data_decide(self):
        """Directions that the inputs never take do not count."""
        x = draw(400, 8) * torch.tensor([3.0, 2, 2, 1, 0.01, 0.01, 0.01, 0.01])
        w_q, w_k = draw(8, 3, seed=1), draw(8, 3, seed=2)
        covariance = covariance_of(x)

        def error(w):
            return (x @ (w_q @ w_k.mT - w @ w.mT) @ x.mT).square().mean()

        assert error(fit_symmetric(w_q, w_k, covariance).weight) < error(fit_symmetric(w_q, w_k).weight)

    def test_bias_of_inputs_with_a_mean(self):
        """A symmetric head with inputs that have a mean is reproduced, up to terms that the softmax cancels."""
        x, w, b = draw(300, 6) + 1.5, draw(6, 6, seed=1), draw(6, seed=2)
        bias = shared_bias(w, w, w, b, x.mean(0), covariance_of(x))
        scores, teacher = (x @ w + bias) @ (x @ w + bias).mT, (x @ w + b) @ (x @ w + b).mT
        torch.testing.assert_close(scores.softmax(-1), teacher.softmax(-1), rtol=1e-8, atol=1e-10)


class TestPairwise:
    @pytest.mark.parametrize("groups", [1, 3])
    def test_steps_never_raise_the_error(self, groups):
        w_q, w_k = draw(groups, 12, 4), draw(12, 4, seed=1)
        errors = [fit_pairwise(w_q, w_k, steps=n).error for n in range(6)]
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))

    def test_never_worse_than_symmetric(self):
        for seed in range(3):
            w_q, w_k = draw(10, 4, seed=seed), draw(10, 4, seed=seed + 10)
            assert fit_pairwise(w_q[None], w_k).error <= fit_symmetric(w_q, w_k).error

    def test_size_of_the_old_queries(self):
        x = draw(500, 10)
        w_q, w_k = 3 * draw(1, 10, 4, seed=1), draw(10, 4, seed=2)
        found = fit_pairwise(w_q, w_k, covariance_of(x))
        old, new = (covariance_of(x @ w).trace().sqrt() for w in (w_q[0], found.weight))
        assert math.isclose(old, new, rel_tol=1e-10)

    def test_the_error_is_what_it_says(self):
        w_q, w_k = draw(2, 10, 4), draw(10, 4, seed=1)
        found = fit_pairwise(w_q, w_k)
        products = w_q @ w_k.mT
        gone = torch.linalg.vector_norm(products - found.weight @ found.pair @ found.weight.mT)
        assert math.isclose(gone / torch.linalg.vector_norm(products), found.error, rel_tol=1e-9)

    def test_keys_stay_exact(self):
        w_k, mix = draw(10, 4), draw(2, 4, 4, seed=1)
        found = fit_keys(w_k @ mix, w_k)
        assert torch.equal(found.weight, w_k) and found.error < 1e-12
        torch.testing.assert_close(found.pair, mix, rtol=1e-10, atol=1e-10)


class TestRotary:
    def test_equals_the_eigenproblem(self):
        w_q = torch.complex(draw(9, 5), draw(9, 5, seed=1))
        w_k = torch.complex(draw(9, 5, seed=2), draw(9, 5, seed=3))
        found = fit_rotary(w_q, w_k).weight
        for column in range(5):
            product = torch.outer(w_q[:, column], w_k[:, column].conj())
            values, vectors = torch.linalg.eigh((product + product.mH) / 2)
            best = values[-1] * torch.outer(vectors[:, -1], vectors[:, -1].conj())
            ours = torch.outer(found[:, column], found[:, column].conj())
            torch.testing.assert_close(ours, best, rtol=1e-10, atol=1e-10)

    def test_error_is_the_mean_over_offsets(self):
        w_q, w_k = torch.complex(draw(6, 1), draw(6, 1, seed=1)), torch.complex(draw(6, 1, seed=2), draw(6, 1, seed=3))
        found = fit_rotary(w_q, w_k)
        turns = torch.exp(1j * torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64)[:, None, None]
        exact, ours = (turns * w_q @ w_k.mH).real, (turns * found.weight @ found.weight.mH).real
        error = ((exact - ours).square().sum() / exact.square().sum()).sqrt()
        assert math.isclose(error, found.error, rel_tol=1e-9)


class TestForms:
    def test_signs_are_the_best_symmetric_matrices(self):
        """Better than S = I, and no symmetric change of S or change of W makes it better."""
        w_q, w_k = draw(10, 3), draw(10, 3, seed=1)
        found, product = fit_signed(w_q, w_k), w_q @ w_k.mT
        least = torch.linalg.matrix_norm(product - found.weight @ found.pair[0] @ found.weight.mT)
        assert math.isclose(least / torch.linalg.matrix_norm(product), found.error, rel_tol=1e-9)
        assert found.error < fit_symmetric(w_q, w_k).error
        for seed in range(20):
            change = 0.05 * draw(3, 3, seed=seed)
            weight, pair = found.weight + 0.05 * draw(10, 3, seed=seed + 30), found.pair[0] + change + change.mT
            assert torch.linalg.matrix_norm(product - weight @ pair @ weight.mT) >= least

    @pytest.mark.parametrize("form", ["symmetric", "diag"])
    def test_restricted_matrices_for_given_keys(self, form):
        """The least error among matrices of the form, which are recovered where the queries are made by one."""
        w_k, free = draw(10, 4), draw(2, 4, 4, seed=1)
        pair = torch.diag_embed(free[:, 0]) if form == "diag" else free + free.mT
        exact = fit_keys(w_k @ pair, w_k, form=form)
        torch.testing.assert_close(exact.pair, pair, rtol=1e-9, atol=1e-9)
        w_q = draw(2, 10, 4, seed=2)
        best = fit_keys(w_q, w_k, form=form).pair
        least = torch.linalg.vector_norm(w_q - w_k @ best)
        for seed in range(20):
            change = 0.05 * draw(2, 4, 4, seed=seed + 3)
            change = torch.diag_embed(change[:, 0]) if form == "diag" else change + change.mT
            assert torch.linalg.vector_norm(w_q - w_k @ (best + change)) > least


def rotated(x, angle, interleaved):
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    speed = torch.exp(-torch.arange(half, dtype=x.dtype))
    cos, sin = torch.cos(angle[:, None] * speed), torch.sin(angle[:, None] * speed)
    parts = first * cos - second * sin, second * cos + first * sin
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


class TestLayers:
    def scores(self, layer, x, h, g, rotary):
        """Return the scores of one head, whose first features turn with the position."""
        out = []
        for weight, bias, n in ((layer.query, layer.query_bias, h), (layer.key, layer.key_bias, g)):
            y = x @ weight[n] + (0 if bias is None else bias[n])
            turned = rotated(y[:, :rotary], torch.arange(len(x), dtype=x.dtype), layer.interleaved)
            out.append(torch.cat((turned, y[:, rotary:]), -1))
        return out[0] @ out[1].mT

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("rotary", [0, 4, 6])
    def test_equal_queries_and_keys_are_found_again(self, rotary, interleaved, biased):
        """Weights from the layer's rows of features, biases included: the same weights of attention."""
        weight, bias = draw(2, 8, 6), draw(2, 6, seed=1) if biased else None
        layer = Projections(weight, weight, bias, bias, rotary, interleaved)
        mean = draw(8, seed=2)
        moments = Moments(mean, torch.eye(8, dtype=torch.float64) * 2 + torch.outer(mean, mean))
        for given in (None, moments):
            found = fit_layer(layer, given, None)
            assert max(found.errors) < 1e-12
            ours = Projections(found.weight, found.weight, found.bias, found.bias, rotary, interleaved)
            x = draw(7, 8, seed=3)
            for h in range(2):
                wanted, scores = (self.scores(y, x, h, h, rotary).softmax(-1) for y in (layer, ours))
                torch.testing.assert_close(scores, wanted, rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("groups", [1, 3])
    @pytest.mark.parametrize("rotary", [0, 4])
    def test_queries_made_of_keys_are_found_again(self, rotary, groups):
        keys, mix = draw(2, 8, 4), draw(2 * groups, 4, 4, seed=1)
        bias = draw(2, 4, seed=2)
        query = keys.repeat_interleave(groups, 0) @ mix
        query_bias = (bias.repeat_interleave(groups, 0)[:, None] @ mix).squeeze(1)
        layer = Projections(query, keys, query_bias, bias, rotary)
        found = fit_layer(layer, None, "full")
        assert max(found.errors) < 1e-12 and len(found.errors) == 2 * groups
        ours = Projections(
            found.weight.repeat_interleave(groups, 0) @ found.pair,
            found.weight,
            (found.bias.repeat_interleave(groups, 0)[:, None] @ found.pair).squeeze(1),
            found.bias,
            rotary,
        )
        x = draw(7, 8, seed=3)
        for h in range(2 * groups):
            wanted, scores = (self.scores(y, x, h, h // groups, rotary).softmax(-1) for y in (layer, ours))
            torch.testing.assert_close(scores, wanted, rtol=1e-8, atol=1e-9)

    def test_errors_are_means_over_offsets(self):
        """Measured on scores of all offsets; data weigh them by the inputs' moments."""
        layer = Projections(draw(1, 6, 2), draw(1, 6, 2, seed=1), rotary=2)
        x = draw(4000, 6, seed=2) * torch.tensor([3.0, 1, 1, 1, 0.1, 0.1])
        moments = Moments(x.mean(0), x.mT @ x / len(x))
        found = fit_layer(layer, moments, None)
        turns = torch.exp(1j * torch.arange(16, dtype=torch.float64) * 2 * math.pi / 16)[:, None, None]
        q, k, r = (torch.complex(w[0, :, :1], w[0, :, 1:]) for w in (layer.query, layer.key, found.weight))
        for error, root in ((found.errors, torch.eye(6)), (found.weighted, torch.linalg.cholesky(moments.second).mT)):
            root = root.to(torch.complex128)
            exact, ours = ((turns * (root @ a) @ (root @ b).mH).real for a, b in ((q, k), (r, r)))
            measured = ((exact - ours).square().sum() / exact.square().sum()).sqrt()
            assert math.isclose(measured, error[0], rel_tol=1e-3)
