"""Selective attention: worked example, formula fixtures, exact properties (arXiv 2410.02703)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.sdpa.reference import attention_logits, eager_attention, masked_softmax
from attnrewrite.kernels.selective.reference import selection_penalty, selective_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def causal(L):
    return torch.ones(L, L, dtype=torch.bool).tril()


def parts(query, key, seen, *, gamma=1.0, selection_head=0, protect_first=True):
    """Everything between the logits and the weights; ``seen`` is [L, L] or [B, L, L]."""
    logits = attention_logits(query, key)
    penalty, state = selection_penalty(logits[:, selection_head], seen, protect_first=protect_first)
    mask = seen if seen.dim() == 2 else seen.unsqueeze(1)
    penalized = logits - gamma * penalty.unsqueeze(1)
    return SimpleNamespace(
        logits=logits,
        penalty=penalty,
        state=state,
        penalized=penalized,
        weights=masked_softmax(penalized, mask),
        lse=penalized.masked_fill(~mask, -math.inf).logsumexp(-1),
    )


def dense_formula(query, key, value, *, seen=None, inclusive=False, protect=0, own_votes=False, future_votes=False):
    """The definition, pair by pair, with switches for the usual mistakes; selection head 0, one batch row."""
    L, H, Hkv = query.shape[2], query.shape[1], key.shape[1]
    seen = causal(L) if seen is None else seen
    heads = [h * Hkv // H for h in range(H)]
    logits = torch.stack([query[0, h] @ key[0, g].T for h, g in enumerate(heads)]) / math.sqrt(query.shape[-1])
    votes = torch.zeros(L, L, dtype=torch.float64)
    for i in range(L):
        for j in range(L):
            may = (seen[i, j] or future_votes) and (i != j or own_votes) and j != protect
            votes[i, j] = max(logits[0, i, j].item(), 0.0) if may else 0.0
    penalty = torch.zeros(L, L, dtype=torch.float64)
    for i in range(L):
        penalty[i] = votes[: i + 1 if inclusive else i].sum(0)
    out = torch.zeros(1, H, L, value.shape[-1], dtype=torch.float64)
    for h, g in enumerate(heads):
        for i in range(L):
            if seen[i].any():
                keys = seen[i].nonzero().flatten()
                out[0, h, i] = torch.softmax(logits[h, i, keys] - penalty[i, keys], 0) @ value[0, g, keys]
    return out


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


class TestExactProperties:
    def test_no_positive_vote_equals_sdpa(self, random_qkv):
        query, key, value = random_qkv(2, 3, 3, 17, 8)
        query = query.detach().abs()
        key = -key.detach().abs()
        out = selective_attention(query, key, value)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, is_causal=True), **CLOSE)

    @pytest.mark.parametrize("gamma", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_gamma_zero_equals_eager_attention_bit_for_bit(self, random_qkv, gamma, dtype):
        tensors = random_qkv(2, 4, 2, 19, 8, dtype=dtype)
        out = selective_attention(*tensors, gamma=gamma, enable_gqa=True, softcap=20.0, window=7)
        plain = eager_attention(*tensors, is_causal=True, enable_gqa=True, softcap=20.0, window=7)
        assert torch.equal(out, plain)
        upstream = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        for ours, theirs in zip(
            torch.autograd.grad(out, tensors, upstream),
            torch.autograd.grad(plain, tensors, upstream),
            strict=True,
        ):
            assert torch.equal(ours, theirs)

    def test_first_three_rows_equal_sdpa(self, random_qkv):
        tensors = random_qkv(2, 3, 3, 17, 8)
        out = selective_attention(*tensors)
        plain = F.scaled_dot_product_attention(*tensors, is_causal=True)
        torch.testing.assert_close(out[:, :, :3], plain[:, :, :3], **CLOSE)
        assert (out[:, :, 5:] - plain[:, :, 5:]).abs().amax((0, 1, 3)).min() > 1e-3

    @pytest.mark.parametrize("L", [1, 2, 3])
    def test_up_to_three_tokens_equal_sdpa(self, random_qkv, L):
        tensors = random_qkv(2, 2, 2, L, 8)
        plain = F.scaled_dot_product_attention(*tensors, is_causal=True)
        torch.testing.assert_close(selective_attention(*tensors), plain, **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_penalty_grows_and_spares_self_successor_and_first(self, random_qkv, dtype):
        query, key, _ = random_qkv(2, 2, 2, 63, 8, dtype=dtype)
        penalty, state = selection_penalty(attention_logits(query, key)[:, 1], causal(63))
        assert (penalty >= 0).all()
        assert (penalty.diff(dim=1) >= 0).all()
        assert (state >= penalty[:, -1]).all()
        assert (penalty.diagonal(dim1=-2, dim2=-1) == 0).all()
        assert (penalty.diagonal(offset=-1, dim1=-2, dim2=-1) == 0).all()
        assert (penalty[:, :, 0] == 0).all()
        assert penalty.max() > 1

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_no_leak_from_the_future(self, random_qkv, dtype):
        tensors = [tensor.detach() for tensor in random_qkv(2, 4, 2, 33, 8, dtype=dtype)]
        changed = [tensor.clone() for tensor in tensors]
        for tensor in changed:
            tensor[:, :, 20:] = 3 * tensor[:, :, 20:].flip(2) + 1
        before = selective_attention(*tensors, enable_gqa=True)
        after = selective_attention(*changed, enable_gqa=True)
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert not torch.equal(before[:, :, 20:], after[:, :, 20:])

    @pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
    @pytest.mark.parametrize("pad", [1, 2, 5])
    def test_left_padding_changes_nothing(self, random_qkv, pad, additive):
        tensors = random_qkv(2, 4, 2, 21, 8)
        mask = torch.arange(21).reshape(1, 1, 1, 21) >= pad
        if additive:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
        out = selective_attention(*tensors, attn_mask=mask, enable_gqa=True)
        alone = selective_attention(*(tensor[:, :, pad:] for tensor in tensors), enable_gqa=True)
        torch.testing.assert_close(out[:, :, pad:], alone, **CLOSE)
        assert (out[:, :, :pad] == 0).all()
        grads = torch.autograd.grad(out.square().sum(), tensors)
        assert all((grad[:, :, :pad] == 0).all() and grad.isfinite().all() for grad in grads)

    def test_rows_of_a_batch_with_different_padding(self, random_qkv):
        tensors = random_qkv(3, 2, 2, 16, 8)
        pads = (0, 3, 7)
        mask = (torch.arange(16) >= torch.tensor(pads)[:, None]).reshape(3, 1, 1, 16)
        out = selective_attention(*tensors, attn_mask=mask)
        for row, pad in enumerate(pads):
            alone = selective_attention(*(tensor[row : row + 1, :, pad:] for tensor in tensors))
            torch.testing.assert_close(out[row : row + 1, :, pad:], alone, **CLOSE)

    def test_packed_documents_equal_separate_runs(self, random_qkv):
        tensors = random_qkv(2, 4, 2, 30, 8)
        ends = (7, 8, 19, 30)
        document = torch.bucketize(torch.arange(30), torch.tensor(ends), right=True)
        packed = selective_attention(
            *tensors, attn_mask=document[:, None] == document, enable_gqa=True, protect_first=True
        )
        for start, end in zip((0, *ends), ends, strict=False):
            alone = selective_attention(*(tensor[:, :, start:end] for tensor in tensors), enable_gqa=True)
            torch.testing.assert_close(packed[:, :, start:end], alone, **CLOSE)

    @pytest.mark.parametrize("window", [20, 21, 1000])
    def test_window_of_the_whole_length_is_no_window(self, random_qkv, window):
        tensors = random_qkv(1, 2, 2, 20, 8)
        assert torch.equal(selective_attention(*tensors, window=window), selective_attention(*tensors))

    def test_window_of_one_key_is_the_value(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 9, 4)
        torch.testing.assert_close(selective_attention(query, key, value, window=1), value, **CLOSE)

    def test_causal_mask_equals_is_causal(self, random_qkv):
        tensors = random_qkv(1, 2, 2, 20, 8)
        masked = selective_attention(*tensors, attn_mask=causal(20), is_causal=False)
        assert torch.equal(masked, selective_attention(*tensors))

    def test_logits_of_pairs_that_may_not_vote_are_ignored(self):
        source = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 12, 12, generator=source, dtype=torch.float64)
        seen = causal(12) & (torch.arange(12) >= torch.tensor([0, 3])[:, None, None])
        may_not = ~seen | torch.eye(12, dtype=torch.bool)
        may_not[0, :, 0] = may_not[1, :, 3] = True
        for other in (1e4, math.inf, math.nan):
            changed = logits.masked_fill(may_not, other)
            for ours, theirs in zip(selection_penalty(changed, seen), selection_penalty(logits, seen), strict=True):
                assert torch.equal(ours, theirs)

    def test_votes_come_from_raw_logits_and_leave_them_unchanged(self, random_qkv):
        query, key, _ = random_qkv(1, 2, 2, 12, 8)
        logits = attention_logits(query, key).detach()
        before = logits.clone()
        selection_penalty(logits[:, 0], causal(12))
        assert torch.equal(logits, before)

    def test_scaling_values_scales_the_output(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 20, 8)
        out = selective_attention(query, key, value)
        assert torch.equal(selective_attention(query, key, 4 * value), 4 * out)

    def test_all_heads_share_the_votes_of_the_selection_head(self, random_qkv):
        query, key, value = random_qkv(2, 4, 4, 20, 8)
        order = torch.tensor([2, 0, 1, 3])
        chosen = selective_attention(query, key, value, selection_head=2)
        moved = selective_attention(query[:, order], key[:, order], value[:, order])
        torch.testing.assert_close(chosen[:, order], moved, **CLOSE)
        assert (chosen - selective_attention(query, key, value)).abs().max() > 1e-3

    def test_one_kv_head_per_group_equals_repeated_kv(self, random_qkv):
        query, key, value = random_qkv(2, 6, 2, 20, 8)
        for head in (0, 5):
            grouped = selective_attention(query, key, value, enable_gqa=True, selection_head=head)
            repeated = [tensor.repeat_interleave(3, dim=1) for tensor in (key, value)]
            assert torch.equal(grouped, selective_attention(query, *repeated, selection_head=head))

    def test_query_without_keys_gives_zero_and_casts_no_vote(self, random_qkv):
        tensors = random_qkv(1, 2, 2, 10, 8)
        mask = causal(10)
        mask[4] = False
        out = selective_attention(*tensors, attn_mask=mask, is_causal=False)
        assert (out[:, :, 4] == 0).all()
        grads = torch.autograd.grad(out.sum(), tensors)
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, :, 4] == 0).all()
        louder = [tensor.detach().clone() for tensor in tensors]
        louder[0][:, :, 4] *= 100
        assert torch.equal(selective_attention(*louder, attn_mask=mask, is_causal=False), out)

    def test_rows_that_see_only_invisible_keys_make_no_nan_in_anomaly_mode(self, random_qkv):
        tensors = random_qkv(1, 1, 1, 6, 4)
        mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~causal(6), -math.inf)
        mask[2] = -math.inf
        mask.requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True):
            out = selective_attention(*tensors, attn_mask=mask, is_causal=False)
            out.square().sum().backward()
        assert mask.grad.isfinite().all()

    def test_bias_is_part_of_the_vote(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 10, 8)
        low = torch.zeros(2, 10, 10, dtype=torch.float64)
        low[0] = -100.0  # shifts every logit of head 0 alike: its softmax stays, its votes go
        out = selective_attention(query, key, value, attn_mask=low)
        plain = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(out, plain, rtol=1e-11, atol=1e-12)

    def test_bias_per_head_is_added_after_the_soft_cap(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 10, 8)
        slope = -torch.tensor([0.5, 0.25], dtype=torch.float64).reshape(2, 1, 1)
        bias = slope * (torch.arange(10)[:, None] - torch.arange(10)).abs()
        logits = 2.0 * torch.tanh(query @ key.mT / math.sqrt(8) / 2.0) + bias
        penalty, _ = selection_penalty(logits[:, 0], causal(10))
        expected = masked_softmax(logits - penalty[:, None], causal(10)) @ value
        out = selective_attention(query, key, value, attn_mask=bias, softcap=2.0)
        torch.testing.assert_close(out, expected, **CLOSE)

    def test_dropout_keeps_the_mean(self, random_qkv):
        tensors = [tensor.detach().expand(2000, -1, -1, -1) for tensor in random_qkv(1, 1, 1, 5, 2)]
        torch.manual_seed(0)
        dropped = selective_attention(*tensors, dropout_p=0.25)
        whole = selective_attention(*tensors)
        assert not torch.equal(dropped, whole)
        torch.testing.assert_close(dropped.mean(0), whole[0], rtol=0, atol=0.1)
        assert (selective_attention(*tensors, dropout_p=1.0) == 0).all()


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


@st.composite
def shapes(draw):
    Hkv = draw(st.integers(1, 3))
    return SimpleNamespace(
        Hkv=Hkv,
        H=Hkv * draw(st.integers(1, 3)),
        L=draw(st.integers(1, 12)),
        D=draw(st.integers(1, 8)),
        Dv=draw(st.integers(1, 8)),
        window=draw(st.none() | st.integers(1, 14)),
        pad=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


class TestShapes:
    @settings(max_examples=40, deadline=None)
    @given(shape=shapes())
    def test_equals_the_definition_pair_by_pair(self, shape):
        source = torch.Generator().manual_seed(shape.seed)
        L, pad = shape.L, min(shape.pad, shape.L - 1)
        query, key, value = (
            torch.randn(1, heads, L, D, generator=source, dtype=torch.float64)
            for heads, D in ((shape.H, shape.D), (shape.Hkv, shape.D), (shape.Hkv, shape.Dv))
        )
        real = torch.arange(L) >= pad
        seen = causal(L) & real
        if shape.window is not None:
            seen &= torch.arange(L)[:, None] - torch.arange(L) < shape.window
        out = selective_attention(query, key, value, attn_mask=real, enable_gqa=True, window=shape.window)
        torch.testing.assert_close(out, dense_formula(query, key, value, seen=seen, protect=pad), **CLOSE)

    @pytest.mark.parametrize("L", [1, 2, 3, 63, 111])
    def test_odd_lengths(self, random_qkv, L):
        tensors = random_qkv(1, 2, 1, L, 16, Dv=5)
        out = selective_attention(*tensors, enable_gqa=True)
        assert out.shape == (1, 2, L, 5)
        torch.testing.assert_close(out, dense_formula(*(tensor.detach() for tensor in tensors)), **CLOSE)

    def test_sparse_votes(self, sparse_votes):
        tensors = sparse_votes(1, 2, 2, 111, 16)
        found = parts(*tensors[:2], causal(111))
        voting = (found.logits[0, 0] > 0) & causal(111).tril(-1)
        assert 0.005 < voting.sum() / causal(111).tril(-1).sum() < 0.05
        out = selective_attention(*tensors)
        torch.testing.assert_close(out, dense_formula(*(tensor.detach() for tensor in tensors)), **CLOSE)

    def test_strided_inputs(self, random_qkv):
        tensors = random_qkv(2, 3, 3, 17, 8)
        strided = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        assert not any(tensor.is_contiguous() for tensor in strided)
        torch.testing.assert_close(selective_attention(*strided), selective_attention(*tensors), **CLOSE)

    def test_queries_of_another_order_without_a_causal_mask(self, random_qkv):
        query, key, value = (tensor.detach() for tensor in random_qkv(1, 2, 2, 9, 4))
        out = selective_attention(query, key, value, is_causal=False)
        everything = torch.ones(9, 9, dtype=torch.bool)
        torch.testing.assert_close(out, dense_formula(query, key, value, seen=everything), **CLOSE)


def ordinary_selective(query, key, value):
    """What one writes in 16 bit: products in 16 bit, votes and softmax in float32."""
    L, D = query.shape[2:]
    logits = (query @ key.mT / math.sqrt(D)).float()
    votes = logits[:, 0].relu() * causal(L).tril(-1)
    votes[:, :, 0] = 0
    penalty = votes.cumsum(1) - votes
    weights = (logits - penalty[:, None]).masked_fill(~causal(L), -math.inf).softmax(-1)
    return weights.to(query.dtype) @ value


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("inputs", ["random_qkv", "sparse_votes"])
    def test_no_worse_than_ordinary_pytorch(self, request, assert_no_worse, inputs, dtype):
        for seed in range(3):
            tensors = request.getfixturevalue(inputs)(2, 4, 4, 111, 32, dtype=dtype, seed=seed)
            exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
            exact = selective_attention(*exact_tensors)
            ours, ordinary = selective_attention(*tensors), ordinary_selective(*tensors)
            assert ours.dtype == dtype
            assert_no_worse(ours, ordinary, exact, "output")
            upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            grads = zip(
                torch.autograd.grad(ours, tensors, upstream),
                torch.autograd.grad(ordinary, tensors, upstream),
                torch.autograd.grad(exact, exact_tensors, upstream.double()),
                strict=True,
            )
            for name, trio in zip(("dq", "dk", "dv"), grads, strict=True):
                assert_no_worse(*trio, name)

    def test_votes_are_summed_in_float32(self):
        logits = torch.full((1, 4096, 4096), 0.01, dtype=torch.float32)
        penalty, state = selection_penalty(logits, causal(4096))
        assert penalty.dtype == state.dtype == torch.float32
        torch.testing.assert_close(state[0, 1].item(), 0.01 * 4094, rtol=1e-5, atol=0)

    def test_autocast_does_not_reach_the_votes(self, sparse_votes):
        tensors = sparse_votes(1, 2, 2, 40, 16, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            under = selective_attention(*tensors)
        assert torch.equal(under, selective_attention(*tensors))

    def test_autocast_takes_mixed_inputs(self, random_qkv):
        query, key, value = random_qkv(1, 2, 2, 12, 8, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = selective_attention(query, key, value.bfloat16())
        expected = selective_attention(query, key, value.bfloat16().float())
        torch.testing.assert_close(out, expected)


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
