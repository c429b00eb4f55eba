"""Symmetric and pairwise attention: worked example and exact properties (arXiv 2406.06366)."""

import math

import pytest
import torch
from symmetric_support import CLOSE, worked

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.sdpa.reference import attention, attention_logits
from attnrewrite.kernels.symmetric.fit import fit_symmetric
from attnrewrite.kernels.symmetric.op import symmetric_attention as in_strips
from attnrewrite.kernels.symmetric.reference import pairwise_query, symmetric_attention

S = "[1 .5] [-.25 .75]"


@pytest.fixture(params=[symmetric_attention, in_strips], ids=["dense", "strips"])
def attend(request):
    return request.param


@pytest.fixture
def example():
    data = worked()
    data.shared = (data.x @ fit_symmetric(data.w_q, data.w_k).weight)[None, None].requires_grad_()
    return data


def draw(B, H, L, D, seed=0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, L, D, generator=source, dtype=torch.float64).to(dtype).requires_grad_()


class TestWorkedExample:
    def test_shared_projection(self, example, assert_prints):
        printed = """[0.2615509114 0.4039181366] [2.0074769536 0.4416233353] [1.7566296330 -0.2020006082]"""
        assert_prints(example.shared, printed)

    def test_scores(self, example, assert_prints):
        scores = attention_logits(example.shared, example.shared)[0, 0]
        assert_prints(scores[0], "0.1637367555 0.4974051446 0.2671848031")
        assert_prints(scores[1, 1:], "2.9875225370 2.4304570494")
        assert_prints(scores[2, 2], "2.2108060597")

    @pytest.mark.parametrize(
        ("options", "printed"),
        [
            ({}, "[0.9269473356 0.6713916775] [0.9125935213 0.6216485330] [0.9035931934 0.6057783909]"),
            ({"is_causal": True}, "[1 0.8775825619] [0.9587556550 0.7105534609] [0.9035931934 0.6057783909]"),
            (
                {"is_causal": True, "mask_self": True},
                "[1 0.8775825619] [1 0.8775825619] [0.9599411845 0.7153545537]",
            ),
        ],
    )
    def test_output(self, example, attend, assert_prints, options, printed):
        assert_prints(attend(example.shared, example.value, **options), printed)

    def test_the_teacher(self, example, assert_prints):
        out = attention((example.x @ example.w_q)[None, None], (example.x @ example.w_k)[None, None], example.value)
        assert_prints(out, "[0.9242764452 0.6649620866] [0.9078386799 0.6122860153] [0.8993347781 0.5976984842]")

    def test_gradient(self, example, attend, assert_prints):
        (attend(example.shared, example.value) * example.upstream).sum().backward()
        printed = "[0.1129145977 0.1155185191] [0.7682849749 0.1612669744] [-1.1009985945 0.1442247697]"
        assert_prints(example.shared.grad, printed)

    def test_pairwise(self, example, attend, table, assert_prints):
        pair = table(S)[None].requires_grad_()
        scores = attention_logits(pairwise_query(example.shared, pair), example.shared)
        assert_prints(
            scores,
            "[0.1535712639 0.3633691558 0.1374996968] [0.7321338440 3.1097667150 2.1657191721]"
            "[0.5418063896 2.7921876037 2.1408653324]",
        )
        out = attend(example.shared, example.value, pair)
        assert_prints(out, "[0.9294576649 0.6785686962] [0.9240010992 0.6442021332] [0.9165644709 0.6305056586]")
        causal = attend(example.shared, example.value, pair, is_causal=True)
        assert_prints(causal[0, 0, 1], "0.9591281658 0.7120620348")
        (out * example.upstream).sum().backward()
        assert_prints(
            example.shared.grad,
            "[0.1379934512 0.2588548137] [0.6701770869 0.4377086329] [-0.8708280363 -0.3502700304]",
        )
        assert_prints(pair.grad, "[-0.2279187490 0.5825761243] [-0.0651378875 0.0406938170]")

    def test_rotary_comes_after_the_pair(self, example, table, assert_prints):
        pair = table(S)[None]
        scores = attention_logits(rotated(pairwise_query(example.shared, pair)), rotated(example.shared))
        assert_prints(
            scores,
            "[0.1535712639 0.6422347917 0.5768604207] [0.7499698328 3.1097667150 2.8992271501]"
            "[0.4682551104 1.8344805489 2.1408653324]",
        )

    def test_gaussian_form(self, example, assert_prints):
        scores = attention_logits(example.shared, example.shared)[0, 0]
        gaussian = gaussian_form(scores)
        assert_prints(gaussian[[0, 0, 1], [1, 2, 2]], "0.3401990125 0.3984845291 0.8447561705")


def rotated(states, first=0):
    """Rotate the one pair of features by 0.7 per position."""
    angle = 0.7 * torch.arange(first, first + states.shape[2], dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    a, b = states.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1)


def gaussian_form(scores):
    half = scores.diagonal(dim1=-2, dim2=-1) / 2
    return torch.exp(scores - half.unsqueeze(-1) - half.unsqueeze(-2))


class TestProperties:
    def test_scores_are_symmetric_and_bounded(self):
        shared = draw(2, 3, 9, 4)
        scores = shared @ shared.mT
        assert torch.equal(scores, scores.mT)
        diagonal = scores.diagonal(dim1=-2, dim2=-1)
        assert (diagonal >= 0).all()
        bound = (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)).sqrt()
        assert (scores.abs() <= bound * (1 + 1e-12)).all()

    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "window": 3}])
    def test_equals_attention_with_one_tensor(self, attend, options):
        shared, value = draw(2, 3, 9, 4), draw(2, 3, 9, 5, seed=1)
        expected = attention(shared, shared, value, **options)
        torch.testing.assert_close(attend(shared, value, **options), expected, **CLOSE)

    def test_identity_pair_is_symmetric(self, attend):
        shared, value = draw(1, 2, 7, 4), draw(1, 2, 7, 4, seed=1)
        identity = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
        torch.testing.assert_close(attend(shared, value, identity), attend(shared, value), **CLOSE)

    def test_a_square_key_projection_reproduces_any_head(self, attend):
        x, w_q, w_k = draw(1, 1, 6, 4), draw(1, 1, 4, 4, seed=1)[0, 0], draw(1, 1, 4, 4, seed=2)[0, 0]
        value = draw(1, 1, 6, 3, seed=3)
        pair = torch.linalg.solve(w_k, w_q).unsqueeze(0)
        ours = attend(x @ w_k, value, pair, scale=0.5)
        torch.testing.assert_close(ours, attention(x @ w_q, x @ w_k, value, scale=0.5), rtol=1e-9, atol=1e-10)

    def test_twice_the_width_reproduces_any_head(self, attend):
        x, w_q, w_k = draw(1, 1, 6, 8), draw(1, 1, 8, 3, seed=1)[0, 0], draw(1, 1, 8, 3, seed=2)[0, 0]
        value = draw(1, 1, 6, 3, seed=3)
        pair = torch.zeros(1, 6, 6, dtype=torch.float64)
        pair[0, :3, 3:] = torch.eye(3)
        ours = attend(x @ torch.cat((w_q, w_k), -1), value, pair, scale=0.5)
        torch.testing.assert_close(ours, attention(x @ w_q, x @ w_k, value, scale=0.5), **CLOSE)

    def test_gaussian_identity(self):
        shared = draw(1, 2, 9, 4)
        scores = attention_logits(shared, shared)
        weighted = gaussian_form(scores) * torch.exp(scores.diagonal(dim1=-2, dim2=-1) / 2).unsqueeze(-2)
        torch.testing.assert_close(weighted / weighted.sum(-1, keepdim=True), scores.softmax(-1), **CLOSE)

    def test_gauge(self, attend):
        x, w, pair = draw(1, 1, 6, 5), draw(1, 1, 5, 3, seed=1)[0, 0], draw(1, 1, 3, 3, seed=2)[0]
        value, turn = draw(1, 1, 6, 3, seed=3), torch.eye(3) + 0.1 * draw(1, 1, 3, 3, seed=4)[0, 0]
        back = torch.linalg.inv(turn)
        other = attend(x @ w @ turn, value, back @ pair @ back.mT)
        torch.testing.assert_close(other, attend(x @ w, value, pair), rtol=1e-10, atol=1e-10)

    def test_sum_of_mirrored_scores_knows_only_the_symmetric_part(self):
        shared, pair = draw(1, 1, 6, 4), draw(1, 1, 4, 4, seed=1)[0]
        scores = attention_logits(pairwise_query(shared, pair), shared)
        symmetric = attention_logits(pairwise_query(shared, (pair + pair.mT) / 2), shared)
        torch.testing.assert_close(scores + scores.mT, symmetric * 2, **CLOSE)

    def test_causal_rows_do_not_see_later_tokens(self, attend):
        shared, value = draw(1, 2, 8, 4).detach(), draw(1, 2, 8, 4, seed=1).detach()
        before = attend(shared, value, is_causal=True)
        shared[:, :, 5:], value[:, :, 5:] = 7.0, -3.0
        assert torch.equal(attend(shared, value, is_causal=True)[:, :, :5], before[:, :, :5])

    def test_hidden_keys_change_nothing(self, attend):
        shared, value = draw(1, 2, 8, 4).detach(), draw(1, 2, 8, 4, seed=1).detach()
        seen = (torch.arange(8) < 5)[None, None, None]
        before = attend(shared, value, attn_mask=seen)[:, :, :5]
        shared[:, :, 5:], value[:, :, 5:] = 7.0, -3.0
        assert torch.equal(attend(shared, value, attn_mask=seen)[:, :, :5], before)

    def test_rotary_order(self):
        """Only S before the rotation makes scores that depend on the distance alone."""
        content, pair = draw(1, 1, 1, 2).expand(1, 1, 6, 2), draw(1, 1, 2, 2, seed=1)[0]
        before = attention_logits(rotated(pairwise_query(content, pair)), rotated(content))[0, 0]
        after = attention_logits(pairwise_query(rotated(content), pair), rotated(content))[0, 0]
        spread = [
            max((scores.diagonal(lag) - scores[0, lag]).abs().max().item() for lag in range(5))
            for scores in (before, after)
        ]
        assert spread[0] < 1e-12 < 1e-2 < spread[1]

    def test_grouped_heads(self, attend):
        shared, value, pair = draw(2, 2, 7, 4), draw(2, 2, 7, 3, seed=1), draw(1, 4, 4, 4, seed=2)[0]
        out = attend(shared, value, pair, enable_gqa=True)
        queries = torch.stack([shared[:, h // 2] @ pair[h] for h in range(4)], 1)
        torch.testing.assert_close(out, attention(queries, shared, value, enable_gqa=True), **CLOSE)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("pair", "options", "said"),
        [
            ((4, 4, 4), {}, "enable_gqa"),
            ((3, 4, 4), {"enable_gqa": True}, "multiple"),
            ((2, 4, 3), {}, "pair is 2 x 4 x 3"),
            (None, {"window": 3}, "is_causal"),
            (None, {"dropout_p": 2.0}, "probability"),
            (None, {"softcap": 0.0}, "softcap"),
        ],
    )
    def test_said_with_a_code(self, attend, pair, options, said):
        matrix = None if pair is None else torch.zeros(pair, dtype=torch.float64)
        with pytest.raises(LoweringError, match=said) as failure:
            attend(draw(1, 2, 5, 4), draw(1, 2, 5, 4), matrix, **options)
        assert failure.value.code == "AR402"

    def test_nan_reaches_every_row_that_sees_it(self, attend):
        shared, value = draw(1, 1, 5, 4).detach(), draw(1, 1, 5, 4, seed=1).detach()
        shared[0, 0, 3, 0] = math.nan
        out = attend(shared, value, is_causal=True)
        assert out[0, 0, :3].isfinite().all() and out[0, 0, 3:].isnan().all()

    def test_one_token_and_no_keys(self, attend):
        shared, value = draw(1, 1, 1, 4), draw(1, 1, 1, 4, seed=1)
        torch.testing.assert_close(attend(shared, value, mask_self=True), value, **CLOSE)
        assert torch.equal(
            attend(shared, value, attn_mask=torch.zeros(1, 1, dtype=torch.bool)), torch.zeros_like(value)
        )
