"""Selective attention: worked example, formula fixtures, exact properties (arXiv 2410.02703)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from selective_support import CLOSE, causal, dense_formula, parts

from attnrewrite.kernels.sdpa.reference import attention_logits, masked_softmax
from attnrewrite.kernels.selective.op import selective_attention as in_strips
from attnrewrite.kernels.selective.reference import selection_penalty, selective_attention

pytestmark = [
    pytest.mark.usefixtures("in_both_forms"),
    pytest.mark.parametrize(
        "in_both_forms",
        [
            ("selective_attention", selective_attention, 1 << 22),
            ("selective_attention", in_strips, 1 << 22),
            ("selective_attention", in_strips, 60),
        ],
        ids=["dense", "one strip", "strips"],
        indirect=True,
    ),
]


@pytest.fixture
def worked(table):
    """The worked example: B 1, H 2, L 5, D 4, scale 1/2, causal."""
    tensors = {
        "query": """[1 0 1 0] [2 1 0 0] [0 2 1 -1] [1 1 1 1] [2 0 -1 1]
                    [0 1 0 1] [1 0 0 -1] [1 1 0 0] [0 0 2 1] [1 -1 1 0]""",
        "key": """[2 0 0 1] [1 1 0 0] [0 1 2 0] [1 0 -1 2] [0 2 1 1]
                  [1 0 1 0] [0 1 1 0] [1 1 0 1] [-1 0 1 1] [2 0 0 -1]""",
        "value": """[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] [1 1 1 1]
                    [0 2 0 1] [1 0 1 0] [2 0 0 1] [0 1 1 0] [1 0 0 2]""",
        "upstream": """[1 0 0 0] [0 1 0 0] [0 0 1 0] [0 0 0 1] [1 -1 1 -1]
                       [0 1 0 0] [1 0 0 0] [0 0 0 1] [0 0 1 0] [1 1 0 0]""",
    }
    read = {name: table(text).reshape(1, 2, 5, 4) for name, text in tensors.items()}
    for name in ("query", "key", "value"):
        read[name].requires_grad_()
    return SimpleNamespace(**read)


def needed_keys(penalty, seen):
    """M_i = number of visible keys - sum of min(F, 1): a soft count of the keys still needed."""
    return seen.sum(-1) - (penalty.clamp(max=1) * seen).sum(-1)


def squared_norm(tensor):
    return tensor.square().sum()


CASES = {
    # sum O, sum O^2, loss, |dQ|^2, |dK|^2, |dV|^2, max F, LSE[0, 63]
    "A": (
        {"a": 1.0},
        {},
        "432.6275551052 501.8371172754 -37.6143914624 87.0395240948 221.6099053307 1438.6176023969",
        "20.53810680 2.4724088396",
    ),
    "A_half": (
        {"a": 0.5},
        {},
        "388.0632842804 250.0594965442 -26.3494418195 69.2852997575 130.7257180177 608.9934377370",
        "5.13452670 2.8244166905",
    ),
    "B_two_kv_heads": (
        {"a": 0.5, "Hkv": 2},
        {"enable_gqa": True},
        "302.3894429291 204.3360546670 -49.1661042289 87.5498780721 149.0884122816 1121.5299490792",
        "5.13452670 2.8244166905",
    ),
    "C_window": (
        {"a": 0.5},
        {"window": 16},
        "257.5648411435 322.7957431182 -39.2527803294 125.3504772877 272.2690101681 976.8144031028",
        "1.34445596 2.4704816929",
    ),
    "D_left_padded": (
        {"a": 0.5},
        {"attn_mask": torch.arange(64).reshape(1, 1, 1, 64) >= 5},
        "74.0013384873 230.3518232346 23.5722359263 35.8707537108 90.7314708591 564.8307920314",
        "4.87496430 2.8285979931",
    ),
    "E_gamma": (
        {"a": 0.5},
        {"gamma": 0.25},
        "418.4453486033 211.0192791418 -16.1380787394 14.0302734617 25.9156748969 408.1742902989",
        "5.13452670 3.6793502446",
    ),
    "F_first_not_protected": (
        {"a": 0.5},
        {"protect_first": False},
        "308.7797345198 259.9606946144 -28.1222695750 78.8103832544 145.4021104880 611.8663868827",
        "5.13452670 2.7645257124",
    ),
}


def seen_in(arguments):
    seen = causal(64)
    if "window" in arguments:
        seen = seen & (torch.arange(64)[:, None] - torch.arange(64) < arguments["window"])
    if "attn_mask" in arguments:
        seen = seen & arguments["attn_mask"][0, 0]
    return seen


class TestWorkedExample:
    def test_votes_and_penalty(self, worked, table):
        found = parts(worked.query, worked.key, causal(5))
        logits = table("[1 .5 1 0 .5] [2 1.5 .5 1 1] [-.5 1 2 -1.5 2] [1.5 1 1.5 1 2] [2.5 1 -1 2.5 0]")
        penalty = table("[0 0 0 0 0] [0 0 0 0 0] [0 0 0 0 0] [0 1 0 0 0] [0 2 1.5 0 0]")
        torch.testing.assert_close(found.logits[0, 0], logits, **CLOSE)
        torch.testing.assert_close(found.penalty[0], penalty, **CLOSE)
        torch.testing.assert_close(found.state[0], table("[0 3 1.5 2.5 0]")[0], **CLOSE)

    def test_weights_and_logsumexp(self, worked, assert_prints):
        found = parts(worked.query, worked.key, causal(5))
        assert_prints(found.weights[0, 0, 3], "[.35339925 .07885403 .35339925 .21434748 0]")
        assert_prints(found.weights[0, 0, 4], "[.47191619 .01425063 .00317975 .47191619 .03873724]")
        assert_prints(found.weights[0, 1, 4], "[.40003976 .01991681 .03283726 .14716640 .40003976]")
        assert_prints(found.lse[0, 0], "[1 2.47407698 2.37153903 2.54015685 3.25095387]")
        assert_prints(found.lse[0, 1], "[0 .97407698 1.79437677 2.28733867 1.91619133]")

    def test_output_and_loss(self, worked, assert_prints):
        out = selective_attention(worked.query, worked.key, worked.value)
        assert_prints(out[0, 0, 3], "[.35339925 .07885403 .35339925 .21434748]")
        assert_prints(out[0, 0, 4], "[.51065343 .05298787 .04191699 .51065343]")
        assert_prints(out[0, 1, 3], "[.43634652 1.00706292 .55659056 .44340944]")
        assert_prints(out[0, 1, 4], "[.48563110 .94724593 .16708321 1.23295655]")
        assert (out * worked.upstream).sum().item() == pytest.approx(7.363428978613921, rel=1e-15)

    def test_gradients(self, worked, assert_prints):
        gamma = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        out = selective_attention(worked.query, worked.key, worked.value, gamma=gamma)
        (out * worked.upstream).sum().backward()
        assert_prints(worked.query.grad[0, 0, 2], "[-.12923682 .01681896 .21402450 -.01952177]")
        assert_prints(worked.query.grad[0, 0, 3], "[.01135720 -.04588786 -.18178927 .13052752]")
        assert_prints(worked.key.grad[0, 0, 1], "[.22381696 -.05997860 -.08024074 .08605297]")
        assert_prints(worked.key.grad[0, 0, 2], "[-.04557903 .16523052 .05661080 -.15419875]")
        assert_prints(worked.value.grad[0, 0, 4], "[.03873724 -.03873724 .03873724 -.03873724]")
        assert gamma.grad.item() == pytest.approx(-0.015447785022497662, rel=1e-13)

    def test_gradients_of_logits_and_votes(self, worked, assert_prints, table):
        logits = attention_logits(worked.query, worked.key).detach()
        voting = logits[:, 0].clone().requires_grad_()
        penalty, _ = selection_penalty(voting, causal(5))
        penalized = (logits - penalty.unsqueeze(1)).requires_grad_()
        penalized.retain_grad()
        out = masked_softmax(penalized, causal(5)) @ worked.value.detach()
        (out * worked.upstream).sum().backward()
        summed = penalized.grad.sum(1)[0]
        assert_prints(summed[4], "[.70401246 -.02271440 .02183772 -.53039661 -.17273917]")
        torch.testing.assert_close(summed.sum(-1), torch.zeros(5, dtype=torch.float64), **CLOSE)
        expected = torch.zeros(5, 5, dtype=torch.float64)
        expected[2, 1], expected[3, 1], expected[3, 2] = -0.00540561, 0.02271440, -0.02183772
        torch.testing.assert_close(voting.grad[0], expected, rtol=0, atol=5.001e-9)
        assert (voting.grad[0] != 0).sum() == 3

    def test_soft_count_of_needed_keys(self, worked, assert_prints):
        found = parts(worked.query, worked.key, causal(5))
        assert_prints(needed_keys(found.penalty, causal(5))[0], "[1 2 3 3 3]")

    def test_window(self, worked):
        out = selective_attention(worked.query, worked.key, worked.value, window=3)
        assert (out * worked.upstream).sum().item() == pytest.approx(6.4153369182, abs=5.1e-11)

    @pytest.mark.parametrize(
        ("mistake", "row", "loss"),
        [
            ({"inclusive": True}, "[.9154564 .0788432 .0751452 .1388897]", 8.6636568608),
            ({"protect": None}, "[.0977033 .0977033 .0772899 .9415840]", 6.3698842271),
            ({"own_votes": True}, "[.7423672 .0609372 .0569402 .3086993]", 8.3885181439),
            ({"future_votes": True}, "[.7206851 .0134371 .0013248 .2652780]", 7.5168147607),
        ],
        ids=["inclusive_sum", "first_not_protected", "own_votes", "future_votes"],
    )
    def test_wrong_variants_are_told_apart(self, worked, table, mistake, row, loss):
        wrong = dense_formula(worked.query, worked.key, worked.value, **mistake)
        torch.testing.assert_close(wrong[0, 0, 4], table(row)[0], rtol=0, atol=5.1e-8)
        assert (wrong * worked.upstream).sum().item() == pytest.approx(loss, abs=5.1e-11)
        right = selective_attention(worked.query, worked.key, worked.value)
        assert (right - wrong).abs().max() > 0.05

    def test_without_protection(self, worked):
        out = selective_attention(worked.query, worked.key, worked.value, protect_first=False)
        assert (out * worked.upstream).sum().item() == pytest.approx(6.3698842271, abs=5.1e-11)

    def test_plain_attention(self, worked, table):
        out = selective_attention(worked.query, worked.key, worked.value, gamma=0.0)
        assert (out * worked.upstream).sum().item() == pytest.approx(7.3400367728, abs=1e-10)
        torch.testing.assert_close(out[0, 0, 4], table("[.4633378 .1306900 .0480782 .4633378]")[0], rtol=0, atol=5.1e-8)


class TestFormulaFixtures:
    @pytest.mark.parametrize("case", CASES)
    def test_case(self, case, formulas, assert_prints):
        inputs, arguments, sums, extremes = CASES[case]
        data = formulas(**inputs)
        out = selective_attention(data.query, data.key, data.value, **arguments)
        real = seen_in(arguments).any(-1, keepdim=True)  # a padded query's row takes no part in sums and loss
        loss = (out * data.upstream * real).sum()
        loss.backward()
        found = [out.sum(), squared_norm(out), loss]
        found += [squared_norm(tensor.grad) for tensor in (data.query, data.key, data.value)]
        assert_prints(torch.stack(found), sums)
        seen = seen_in(arguments)
        inner = parts(
            data.query,
            data.key,
            seen,
            gamma=arguments.get("gamma", 1.0),
            protect_first=arguments.get("protect_first", True),
        )
        assert_prints(torch.stack([inner.penalty[0][seen].max(), inner.lse[0, 0, 63]]), extremes)

    def test_details_of_case_a_half(self, formulas, assert_prints):
        data = formulas(0.5)
        gamma = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        out = selective_attention(data.query, data.key, data.value, gamma=gamma)
        (out * data.upstream).sum().backward()
        assert_prints(out[0, 0, 63, :4], "[-.1208475266 .0779293577 .1733431620 .2266555974]")
        assert_prints(data.key.grad[0, 0, 3, :3], "[.2225905707 -.8483823315 -1.2639726705]")
        assert_prints(gamma.grad, "-11.6012291828")
        plain = selective_attention(data.query, data.key, data.value, gamma=0.0)
        assert_prints((plain * data.upstream).sum(), "-12.1292654058")

    @pytest.mark.parametrize(
        ("case", "most", "row"),
        [("A", "7.5837884293", 14), ("A_half", "10.1880225933", 63), ("C_window", "9.6211508483", 15)],
    )
    def test_most_keys_needed(self, case, most, row, formulas, assert_prints):
        inputs, arguments, *_ = CASES[case]
        data = formulas(**inputs)
        seen = seen_in(arguments)
        needed = needed_keys(parts(data.query, data.key, seen).penalty, seen)[0]
        assert_prints(needed.max(), most)
        assert needed.argmax() == row

    def test_votes_stay_away_from_zero(self, formulas):
        data = formulas(0.5)
        logits = attention_logits(data.query, data.key)[0, 0]
        pairs = causal(64).tril(-1)
        pairs[:, 0] = False
        assert logits[pairs].abs().min().item() == pytest.approx(3.1e-4, abs=5e-6)


class TestLatestAssignmentWins:
    """Closed form: m assignments to one variable, then a query; each logit of the variable is beta."""

    @pytest.mark.parametrize(
        ("beta", "m", "selective", "plain"),
        [(4, 3, 0.9476136621, 0.3293122900), (2, 5, 0.7007042131, 0.1897291791)],
    )
    def test_weight_of_the_newest(self, beta, m, selective, plain):
        query, key, value = self.variables(beta, m)
        newest = selective_attention(query, key, value)[0, 0, -1, m - 1].item()
        formula = math.exp(beta) / (2 + sum(math.exp(beta - r * beta) for r in range(m)))
        assert newest == pytest.approx(formula, rel=1e-14)
        assert newest == pytest.approx(selective, abs=5.1e-11)
        ordinary = F.scaled_dot_product_attention(query, key, value, is_causal=True)[0, 0, -1, m - 1].item()
        assert ordinary == pytest.approx(math.exp(beta) / (2 + m * math.exp(beta)), rel=1e-14)
        assert ordinary == pytest.approx(plain, abs=5.1e-11)

    def test_penalty_of_the_query(self, table):
        query, key, _ = self.variables(4, 3)
        found = parts(query, key, causal(5)).penalty[0, -1]
        torch.testing.assert_close(found, table("[0 8 4 0 0]")[0], **CLOSE)

    @staticmethod
    def variables(beta, m, D=8):
        query = torch.zeros(1, 1, m + 2, D, dtype=torch.float64)
        query[..., 1:, 0] = math.sqrt(beta * math.sqrt(D))
        key = query.clone()
        key[..., -1, :] = 0
        value = torch.zeros(1, 1, m + 2, D, dtype=torch.float64)
        value[0, 0, 1 : m + 1, :m] = torch.eye(m, dtype=torch.float64)
        return query, key, value


class TestGradients:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"window": 3},
            {"protect_first": False},
            {"softcap": 1.5, "scale": 0.7},
            {"selection_head": 1, "attn_mask": torch.arange(6) >= 2},
        ],
        ids=["causal", "window", "first_not_protected", "softcap", "left_padded"],
    )
    def test_against_finite_differences(self, random_qkv, arguments):
        tensors = random_qkv(1, 2, 1, 6, 3, seed=3)
        gamma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

        def run(query, key, value, gamma):
            return selective_attention(query, key, value, gamma=gamma, enable_gqa=True, **arguments)

        assert torch.autograd.gradcheck(run, (*tensors, gamma))

    def test_bias_against_finite_differences(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 5, 3, seed=4)
        bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        bias.requires_grad_()
        assert torch.autograd.gradcheck(lambda bias: selective_attention(query, key, value, attn_mask=bias), (bias,))

    def test_a_penalty_moves_weight_and_makes_none(self, random_qkv):
        tensors = random_qkv(1, 3, 3, 12, 8)
        bias = torch.zeros(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
        out = selective_attention(*tensors, attn_mask=bias)
        (grad,) = torch.autograd.grad((out**3).sum(), bias)
        others = grad[0, 1:].sum(-1)  # head 0's logits also vote
        torch.testing.assert_close(others, torch.zeros_like(others), rtol=0, atol=1e-14)
        assert (grad[0].masked_select(~causal(12)) == 0).all()

    def test_gamma_at_zero_is_alive(self, random_qkv):
        tensors = random_qkv(1, 2, 2, 12, 8)
        gamma = torch.tensor(0.0, requires_grad=True)
        out = selective_attention(*tensors, gamma=gamma)
        (out**3).sum().backward()
        assert gamma.grad.abs() > 1e-4
