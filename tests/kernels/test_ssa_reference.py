"""SSA attention: worked example, formula fixtures, exact properties (arXiv 2411.12892)."""

import math
from types import SimpleNamespace

import pytest
import torch
from ssa_support import CLOSE, causal, spikiness_of, weights_and_lse

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.ssa.op import ssa_attention as in_strips
from attnrewrite.kernels.ssa.reference import ssa_attention, temperature

pytestmark = [
    pytest.mark.usefixtures("in_both_forms"),
    pytest.mark.parametrize(
        "in_both_forms",
        [
            ("ssa_attention", ssa_attention, 1 << 22),
            ("ssa_attention", in_strips, 1 << 22),
            ("ssa_attention", in_strips, 60),
        ],
        ids=["dense", "one strip", "strips"],
        indirect=True,
    ),
]


def scalar(number):
    return torch.tensor(number, dtype=torch.float64, requires_grad=True)


def run(data, q_gain, v_gain):
    """A whole causal layer: the raw projections are query and value themselves."""
    positions = torch.arange(1, data.query.shape[2] + 1)
    data.tau_q = temperature(data.query, data.q_gate, q_gain, positions)
    data.tau_v = temperature(data.value, data.v_gate, v_gain, positions)
    for tau in (data.tau_q, data.tau_v):
        if tau.requires_grad:
            tau.retain_grad()
    data.out = ssa_attention(data.query, data.key, data.value, data.tau_q, data.tau_v, is_causal=True)
    data.loss = (data.out * data.upstream).sum()
    return data


@pytest.fixture
def worked(table):
    """The worked example: B 1, H 1, L 4, D 2, scale 1 / sqrt 2, causal."""
    tensors = {
        "query": "[1 0] [0 1] [1 1] [-1 1]",
        "key": "[1 1] [2 0] [0 1] [1 -1]",
        "value": "[1 0] [0 1] [1 1] [2 -1]",
    }
    data = SimpleNamespace(**{name: table(text)[None, None].requires_grad_() for name, text in tensors.items()})
    data.upstream = table("[1 0] [0 1] [1 1] [1 -1]")[None, None]
    data.q_gate, data.v_gate = table("[.5 -.25]").requires_grad_(), table("[-.5 .75]").requires_grad_()
    data.q_alpha, data.v_alpha = scalar(-1.0), scalar(-2.0)
    return data


class TestWorkedExample:
    def test_temperatures(self, worked, assert_prints):
        run(worked, worked.q_alpha.sigmoid(), worked.v_alpha.sigmoid())
        assert_prints(worked.tau_q, "1.39749672 .97912772 1.50275061 1.09100662")
        assert_prints(worked.tau_v, "0.60250328 1.64137147 1.33824606 .36610551")

    def test_token_part_before_the_tanh(self, worked, assert_prints):
        for projection, gate, printed in (
            (worked.query, worked.q_gate, ".42067237 -.21033619 .21033619 -.28966381"),
            (worked.value, worked.v_gate, "-.42067237 .63100856 .21033619 -1.09624131"),
        ):
            token = temperature(projection, gate, 0.0, torch.ones(4)) - 1
            assert_prints(token.atanh(), printed)

    def test_weights_output_and_loss(self, worked, assert_prints):
        run(worked, worked.q_alpha.sigmoid(), worked.v_alpha.sigmoid())
        weights, lse = weights_and_lse(worked.query, worked.key, worked.tau_q)
        assert_prints(weights[0, 0, 1, :2], "[.66648901 .33351099]")
        assert_prints(weights[0, 0, 2, :3], "[.42633844 .42633844 .14732313]")
        assert_prints(weights[0, 0, 3], "[.27851806 .05953513 .60241168 .05953513]")
        assert_prints(lse, ".98817941 1.09807948 2.97773210 1.27827238")
        assert_prints(worked.out, "[.60250328 0] [.40156182 .54741541] [.45402490 .89693434] [1.01757538 .88209819]")
        assert worked.loss.item() == pytest.approx(2.6363551361800934, rel=1e-15)

    def test_gradients(self, worked, assert_prints):
        run(worked, worked.q_alpha.sigmoid(), worked.v_alpha.sigmoid()).loss.backward()
        assert_prints(
            worked.query.grad,
            "[0 0] [.19087557 -.18573292] [-.14752299 -.09577479] [-.01906278 -.00953488]",
        )
        assert_prints(
            worked.key.grad,
            "[-.43942014 -.49132559] [.21317392 .30255724] [.27046834 .14454623] [-.04422212 .04422212]",
        )
        assert_prints(
            worked.value.grad,
            "[.24964118 1.02893019] [.67707951 1.54083280] [.85058988 -.37991080] [-.01322548 -.02582916]",
        )
        assert_prints(worked.tau_q.grad, "[0 -.25798534 -.13808498 .01082669]")
        assert_prints(worked.tau_v.grad, "[1.70485649 .70031429 .29464626 .17860539]")
        assert_prints(worked.q_gate.grad, "[-.11276641 -.31052774]")
        assert_prints(worked.v_gate.grad, "[1.57113099 .63226452]")
        assert worked.q_alpha.grad.item() == pytest.approx(-0.06203395175260936, rel=1e-13)
        assert worked.v_alpha.grad.item() == pytest.approx(0.11094908582444148, rel=1e-13)

    def test_without_gates(self, worked, assert_prints):
        worked.q_gate, worked.v_gate = (torch.zeros(1, 2, dtype=torch.float64) for _ in range(2))
        assert_prints(
            run(worked, 0.0, 0.0).out,
            "[1 0] [.66976155 .33023845] [.59888791 .59888791] [1 .57709559]",
        )
        small = 1 / (1 + math.exp(7.4))
        assert_prints(
            run(worked, small, small).out,
            "[1 0] [.66982777 .33031203] [.59898295 .59915281] [1.00050447 .57769551]",
        )
        # An alpha of 0 is far from plain attention: the wrong start for a pretrained model.
        assert_prints(run(worked, 0.5, 0.5).out[0, 0, 3], "[1.43289892 1.13456865]")


class TestFormulaFixtures:
    @pytest.mark.parametrize(
        ("q_alpha", "v_alpha", "sums", "alphas", "lse_last", "spikiness"),
        [
            (
                -1.0,
                -2.0,
                (
                    "469.9318297540 582.9236421578 -3.2863056260 212.1709294226 533.4126866283 "
                    "966.7461744370 110.5316850971 2170.3732468552"
                ),
                "2.0506256391 -1.5290768816",
                "4.6946841780",
                "0.5332764256",
            ),
            (
                -7.4,
                -7.4,
                (
                    "447.2174923621 337.7827829145 -4.2196606039 83.4095323918 160.5859790895 619.7656535120 "
                    "138.4555966850 1919.6578769356"
                ),
                "0.0063807405 -0.0106883406",
                "4.2077446041",
                "0.7447876547",
            ),
        ],
        ids=["case_1", "case_2"],
    )
    def test_case(self, formulas, assert_prints, q_alpha, v_alpha, sums, alphas, lse_last, spikiness):
        data = self.layer(formulas)
        q_alpha, v_alpha = scalar(q_alpha), scalar(v_alpha)
        run(data, q_alpha.sigmoid(), v_alpha.sigmoid()).loss.backward()
        found = [data.out.sum(), data.out.square().sum(), data.loss]
        graded = (data.query, data.key, data.value, data.q_gate, data.v_gate)
        found += [tensor.grad.square().sum() for tensor in graded]
        assert_prints(torch.stack(found), sums)
        assert_prints(torch.stack([q_alpha.grad, v_alpha.grad]), alphas)
        weights, lse = weights_and_lse(data.query, data.key, data.tau_q)
        assert_prints(lse[0, 0, 63], lse_last)
        assert_prints(spikiness_of(weights, causal(64)).mean(), spikiness)

    def test_details_of_case_1(self, formulas, assert_prints):
        data = self.layer(formulas)
        run(data, torch.sigmoid(scalar(-1.0)), torch.sigmoid(scalar(-2.0)))
        assert_prints(torch.stack([data.tau_q.min(), data.tau_q.max()]), "0.5269511045 2.7703352991")
        assert_prints(data.tau_q[0, 0, :3], "1.17244364 1.57030535 1.82454618")
        assert_prints(data.tau_v[0, 3, 63], "2.2629552757")
        assert_prints(data.out[0, 0, 63, :4], ".06639737 .10412927 .05452065 -.04866483")

    @staticmethod
    def layer(formulas):
        """Gates w_q[h,d] = .3 sin(1.1 d + .5 h) and w_v[h,d] = .3 cos(.8 d - .4 h)."""
        data = formulas(1.0)
        d = torch.arange(16, dtype=torch.float64)
        h = torch.arange(4, dtype=torch.float64).unsqueeze(-1)
        data.q_gate = (0.3 * torch.sin(1.1 * d + 0.5 * h)).requires_grad_()
        data.v_gate = (0.3 * torch.cos(0.8 * d - 0.4 * h)).requires_grad_()
        return data


class TestTemperature:
    def test_zero_parameters_give_exactly_one(self, random_qkv):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            projection, *_ = random_qkv(2, 3, 3, 9, 8, dtype=dtype)
            tau = temperature(projection, torch.zeros(3, 8), 0.0, torch.arange(1, 10))
            assert tau.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert (tau == 1).all()

    def test_first_position_has_no_position_part(self, random_qkv):
        projection, *_ = random_qkv(2, 3, 3, 9, 8)
        gate = torch.zeros(3, 8, dtype=torch.float64)
        tau = temperature(projection, gate, 0.7, torch.arange(1, 10))
        assert (tau[:, :, 0] == 1).all()
        torch.testing.assert_close(tau[0, 0], 1 + 0.7 * torch.arange(1, 10, dtype=torch.float64).log(), **CLOSE)

    def test_padded_positions_count_as_the_first(self, random_qkv):
        projection, *_ = random_qkv(2, 3, 3, 5, 8)
        gain = scalar(0.5)
        gate = torch.ones(3, 8, dtype=torch.float64)
        padded = temperature(projection, gate, gain, torch.tensor([-1, 0, 0, 1, 2]))
        first = temperature(projection, gate, gain, torch.tensor([1, 1, 1, 1, 2]))
        assert torch.equal(padded, first)
        (grad,) = torch.autograd.grad(padded.sum(), gain)
        assert grad.item() == pytest.approx(6 * math.log(2), rel=1e-14)

    @pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
    def test_lies_between_zero_and_two_plus_the_position_part(self, random_qkv, gain):
        projection, *_ = random_qkv(2, 3, 3, 63, 8)
        positions = torch.arange(1, 64)
        tau = temperature(projection, torch.ones(3, 8, dtype=torch.float64), gain, positions)
        assert (tau > 0).all()
        assert (tau < 2 + gain * positions.log()).all()

    def test_positions_of_each_row_and_head(self, random_qkv):
        projection, *_ = random_qkv(2, 3, 3, 4, 8)
        gate = torch.ones(3, 8, dtype=torch.float64)
        positions = torch.tensor([[1, 2, 3, 4], [1, 1, 1, 2]])
        whole = temperature(projection, gate, 0.5, positions.unsqueeze(1))
        for row in range(2):
            alone = temperature(projection[row : row + 1], gate, 0.5, positions[row])
            assert torch.equal(whole[row : row + 1], alone)

    def test_log_and_sum_are_float32_for_16_bit_projections(self, random_qkv):
        projection, *_ = random_qkv(1, 2, 2, 111, 32, dtype=torch.bfloat16)
        gate = torch.linspace(-0.2, 0.2, 64, dtype=torch.float32).reshape(2, 32)
        positions = torch.arange(4001, 4112)
        tau = temperature(projection, gate, 0.5, positions)
        exact = temperature(projection.double(), gate.double(), 0.5, positions)
        torch.testing.assert_close(tau.double(), exact, rtol=2e-6, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(temperature(projection, gate, 0.5, positions), tau)

    @pytest.mark.parametrize("heads", [3, 1])
    def test_gates_on_the_projections_of_all_heads(self, random_qkv, heads):
        projection, *_ = random_qkv(2, 3, 3, 5, 4)
        gate = torch.randn(heads, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        flat = torch.nn.functional.gelu(projection).transpose(1, 2).flatten(2)  # [B, L, H·D]
        token = (flat @ gate.flatten(1).T).mT.expand(-1, 3, -1)
        tau = temperature(projection, gate, 0.5, torch.arange(1, 6))
        torch.testing.assert_close(tau, token.tanh() + 1 + 0.5 * torch.arange(1, 6).double().log(), rtol=1e-12, atol=0)
        own = torch.diag_embed(gate[0].mT).permute(1, 2, 0)  # "head" is "full" with a gate on other heads of 0
        assert torch.equal(
            temperature(projection, own, 0.0, torch.ones(5)), temperature(projection, gate[0], 0.0, torch.ones(5))
        )
        with pytest.raises(LoweringError, match="gate"):
            temperature(projection, gate[:, :2], 0.0, torch.ones(5))

    def test_gradients_against_finite_differences(self, random_qkv):
        projection, *_ = random_qkv(1, 2, 2, 4, 3)
        gate = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
        positions = torch.arange(0, 4)
        assert torch.autograd.gradcheck(lambda *given: temperature(*given, positions), (projection, gate, scalar(0.3)))

    def test_parameters_at_the_identity_are_alive(self, random_qkv):
        for L in (1, 9):
            query, key, value = random_qkv(1, 2, 2, L, 8)
            gates = [torch.zeros(2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
            gains = [scalar(0.0), scalar(0.0)]
            positions = torch.arange(1, L + 1)
            taus = [
                temperature(projection, gate, gain, positions)
                for projection, gate, gain in zip((query, value), gates, gains, strict=True)
            ]
            out = ssa_attention(query, key, value, *taus, is_causal=True)
            q_gate, v_gate, q_gain, v_gain = torch.autograd.grad((out**3).sum(), (*gates, *gains))
            assert (v_gate != 0).all()
            if L == 1:
                assert (q_gain == 0, v_gain == 0) == (True, True)
                assert q_gate.abs().max() < 1e-15
            else:
                assert (q_gain != 0, v_gain != 0) == (True, True)
                assert (q_gate != 0).all()


class TestImbalancedTokens:
    """Proposition 2: two token types, scores 1 and 0; the target gives each type a fixed share."""

    @staticmethod
    def mix(tau, counts, total):
        """Attention of one query over ``counts`` minority tokens and the rest; returns the two shares."""
        losses = []
        for n, minority in zip(total, counts, strict=True):
            key = torch.zeros(1, 1, n, 2, dtype=torch.float64)
            key[..., :minority, 0] = 1
            key[..., minority:, 1] = 1
            query = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
            tau_q = tau(n, minority).reshape(1, 1, 1)
            shares = ssa_attention(query, key, key, tau_q, torch.ones(1, 1, n, dtype=torch.float64), scale=1.0)
            losses.append((shares[0, 0, 0] - torch.tensor([0.5, 0.5], dtype=torch.float64)).square().sum())
        return torch.stack(losses).mean().item()

    counts, total = [1, 2, 1, 2], [2, 4, 5, 10]  # imbalance 1, 1, 4, 4

    def test_position_dependent_temperature_is_exact(self):
        def exact(n, minority):
            return torch.tensor(math.log((n - minority) / minority), dtype=torch.float64)

        assert self.mix(exact, self.counts, self.total) < 1e-30

    def test_no_flat_temperature_comes_near(self):
        losses = [
            self.mix(lambda n, m, flat=flat: torch.tensor(flat, dtype=torch.float64), self.counts, self.total)
            for flat in torch.linspace(-2, 4, 121).tolist()
        ]
        assert min(losses) > 1 / 500

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
    def test_any_share_is_reached(self, share):
        n, minority = 12, 3
        tau = math.log((n - minority) / minority) + math.log(share / (1 - share))
        key = torch.zeros(1, 1, n, 2, dtype=torch.float64)
        key[..., :minority, 0] = 1
        key[..., minority:, 1] = 1
        out = ssa_attention(
            torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64),
            key,
            key,
            torch.full((1, 1, 1), tau, dtype=torch.float64),
            torch.ones(1, 1, n, dtype=torch.float64),
            scale=1.0,
        )
        assert out.flatten().tolist() == pytest.approx([share, 1 - share], rel=1e-14)
