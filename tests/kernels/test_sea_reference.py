"""SEA attention: worked example, slices, sets, exact cases (arXiv 2310.01777)."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from sea_support import (
    CLOSE,
    attended,
    chosen,
    draw_tensors,
    half_up,
    selected_sets,
    visible_keys,
    worked_example,
)

from attnrewrite.kernels.sea.reference import sea_attention
from attnrewrite.kernels.sea.slices import Rule, boundaries, most_kept, most_tokens, slice_of, slices_kept

BOUNDARIES = """
[0 0 1 1 1] [0 1 1 2 2] [0 1 2 2 3] [0 1 2 3 4] [0 1 3 4 5] [0 2 3 5 6] [0 2 4 5 7] [0 2 4 6 8]
"""
PAPER = """
[0.1837691310 0.1837691310] [0.3597578160 0.4734453849] [0.5017858556 0.5569861625]
[0.8272161198 0.2972386536] [0.7810353995 -0.2868072391] [0.7958958496 0.5509767496]
[0.4434686232 0.4434686232] [0.5855858474 0.6468314681] [0.7208029879 0.5434365989]
[0.8370586838 0.1029738284] [0.8050838172 -0.1994247125] [0.7508701412 0.4708976755]
"""
EXACT = PAPER.replace("[0.5017858556 0.5569861625]", "[0.4635731105 0.4466774653]")
SETS = [[{0}, {0, 1}, {0, 1, 2}, {2, 3}, {3, 4}, {2}], [{0}, {0, 1}, {0, 2}, {2, 3}, {3}, {0, 1, 2}]]


@pytest.fixture
def worked():
    return worked_example()


def run(data, **options):
    options = {"is_causal": True, "budget": 2, "scale_prob": data.scale_prob, "mix": data.mix} | options
    return sea_attention(data.query, data.key, data.value, data.estimated, **options)


class TestWorkedExample:
    def test_boundaries(self, assert_prints):
        assert_prints(boundaries(torch.arange(1, 9), 4), BOUNDARIES)

    def test_slices_kept(self):
        n = torch.arange(1, 7)
        assert slices_kept(n, 2, 4, Rule(2, "paper")).tolist() == [8, 8, 5, 4, 3, 3]
        assert slices_kept(n, 2, 4, Rule(2)).tolist() == [2, 4, 4, 4, 3, 3]

    def test_sets(self, worked):
        assert selected_sets(worked.estimated, Rule(2, "paper"), is_causal=True) == SETS
        exact = selected_sets(worked.estimated, Rule(2), is_causal=True)
        assert exact == [[*SETS[0][:2], {0, 2}, *SETS[0][3:]], SETS[1]]
        assert [sum(len(head[i]) for head in exact) for i in range(6)] == [2, 4, 4, 4, 3, 4]

    def test_output(self, worked, assert_prints):
        assert_prints(run(worked, budget_rule="paper"), PAPER)
        assert_prints(run(worked), EXACT)

    def test_capped_slices(self):
        sets = selected_sets(torch.zeros(1, 1, 16, 2).double(), Rule(3, grouping="per_query"), is_causal=True)
        # Of two equal slices of 8 the first wins; its 3 tokens count from its right end.
        assert sets[0][15] == {7, 5, 2}
        second = torch.tensor([0.0, 1.0]).double().expand(1, 1, 16, 2)
        assert selected_sets(second, Rule(3), is_causal=True)[0][15] == {15, 13, 10}


class TestFingerprints:
    """The usual mistakes change the worked example, or one like it; the definition without them agrees."""

    def test_definition_agrees(self, worked):
        for rule in ("exact", "paper"):
            sets = chosen(worked.estimated[0], visible_keys(6), budget=2, rule=rule)
            assert sets == selected_sets(worked.estimated, Rule(2, rule), is_causal=True)
            sparse = attended(worked.query[0], worked.key[0], worked.value[0], sets)
            torch.testing.assert_close(run(worked, budget_rule=rule, scale_prob=None, mix=None)[0], sparse, **CLOSE)

    @pytest.mark.parametrize(
        ("wrong", "budget", "L"),
        [({"rounding": round}, 2, 6), ({"rounding": math.floor}, 2, 6), ({"capped": False}, 1, 12)],
        ids=["half_to_even", "floor", "uncapped"],
    )
    def test_mistake_shows(self, wrong, budget, L):
        estimated = draw_tensors(1, 2, 2, L, 4, 4)[3].detach()
        seen = visible_keys(L)
        ours = selected_sets(estimated, Rule(budget), is_causal=True)
        assert ours == chosen(estimated[0], seen, budget=budget)
        assert ours != chosen(estimated[0], seen, budget=budget, **wrong)

    def test_budget_halves_are_rounded_up(self):
        assert slices_kept(torch.tensor([8]), 1, 4, Rule(5)).tolist() == [3]  # 2.5
        assert slices_kept(torch.tensor([2]), 1, 5, Rule(1, "paper")).tolist() == [3]

    def test_heads_compete_by_probability_not_by_logit(self, worked):
        shifted = worked.estimated + torch.tensor([0.0, 100.0]).double().reshape(2, 1, 1)
        assert selected_sets(shifted, Rule(2), is_causal=True) == selected_sets(
            worked.estimated, Rule(2), is_causal=True
        )

    def test_probabilities_that_underflow_do_not_tie(self):
        estimated = torch.tensor([0.0, -300.0, -200.0, 0.0]).reshape(1, 1, 1, 4).expand(1, 1, 4, 4)
        assert selected_sets(estimated.float(), Rule(3), is_causal=True)[0][3] == {0, 2, 3}


class TestSlices:
    @pytest.mark.parametrize("M", [1, 2, 3, 7, 32])
    def test_boundaries_are_the_rounded_fractions(self, M):
        n = torch.arange(0, 100)
        edges = boundaries(n, M)
        assert edges.tolist() == [[half_up(Fraction(m * k, M)) for m in range(M + 1)] for k in range(100)]
        widths = edges.diff(dim=-1)
        assert (edges[:, 0] == 0).all()
        assert (edges[:, -1] == n).all()
        assert (widths >= (n // M)[:, None]).all()
        assert (widths <= ((n + M - 1) // M)[:, None]).all()
        assert ((widths > 0).sum(-1) == n.clamp(max=M)).all()

    @pytest.mark.parametrize("M", [1, 2, 3, 7, 32])
    def test_slice_of_a_rank_lies_between_its_boundaries(self, M):
        for n in range(1, 80):
            rank, edges = torch.arange(n), boundaries(torch.tensor(n), M)
            assert torch.equal(slice_of(rank, torch.tensor(n), M), torch.searchsorted(edges[1:], rank, right=True))

    @pytest.mark.parametrize("rule", ["exact", "paper"])
    @pytest.mark.parametrize(("heads", "M", "budget"), [(1, 1, 3), (1, 7, 1), (3, 5, 4), (2, 16, 5), (4, 3, 40)])
    def test_slots_hold_whatever_is_kept(self, rule, heads, M, budget):
        """Even if the widest slices of all heads are the best ones."""
        n, chosen_by = torch.arange(1, 400), Rule(budget, rule)
        kept = slices_kept(n, heads, M, chosen_by)
        widths = boundaries(n, M).diff(dim=-1).clamp(max=budget).repeat(1, heads).sort(-1, descending=True).values
        tokens = widths.cumsum(-1).gather(-1, kept.unsqueeze(-1) - 1).squeeze(-1)
        for i in range(len(n)):
            assert kept[i] <= most_kept(i + 1, i + 1, heads, M, chosen_by)
            assert tokens[i] <= most_tokens(i + 1, i + 1, heads, M, chosen_by)
            assert kept[: i + 1].max() <= most_kept(1, i + 1, heads, M, chosen_by)
            assert tokens[: i + 1].max() <= most_tokens(1, i + 1, heads, M, chosen_by)
            assert tokens[i:].max() <= most_tokens(i + 1, 399, heads, M, chosen_by)
        assert most_tokens(1, 10**6, heads, M, chosen_by) <= 3 * heads * max(budget, M)

    def test_large_numbers(self):
        edges = boundaries(torch.tensor(10**9), 4096)
        assert edges[-1] == 10**9
        assert slices_kept(torch.tensor(10**9), 128, 4096, Rule(4096)).item() == 2


class TestExactCases:
    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize(("L", "M"), [(1, 4), (3, 7), (16, 4), (13, 1), (9, 9)])
    def test_budget_of_the_whole_length_is_sdpa(self, is_causal, L, M):
        query, key, value, estimated, *_ = draw_tensors(2, 4, 2, L, 8, M)
        plain = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
        for grouping in ("causal_per_batch", "per_query"):
            for budget in (L, L + 5):
                out = sea_attention(
                    query, key, value, estimated, is_causal=is_causal, enable_gqa=True, budget=budget, grouping=grouping
                )
                torch.testing.assert_close(out, plain, **CLOSE)

    def test_rows_of_up_to_k_keys_see_them_all(self):
        estimated = draw_tensors(1, 3, 3, 20, 4, 6)[3]
        for budget in (1, 4, 9):
            sets = selected_sets(estimated, Rule(budget), is_causal=True)
            assert all(head[i] == set(range(i + 1)) for head in sets for i in range(budget))

    def test_paper_counts_empty_slices(self):
        estimated = draw_tensors(1, 3, 3, 20, 4, 16)[3]
        sets = selected_sets(estimated, Rule(4, "paper"), is_causal=True)
        assert sets != selected_sets(estimated, Rule(4), is_causal=True)

    @pytest.mark.parametrize("budget", [2, 5, 8])
    def test_number_of_keys(self, budget):
        H, L, M = 3, 60, 8
        estimated = draw_tensors(1, H, H, L, 4, M)[3]
        sets = selected_sets(estimated, Rule(budget), is_causal=True)
        for i in range(M - 1, L):
            assert sum(len(head[i]) for head in sets) <= H * budget + math.ceil((i + 1) / M) * H
            assert all(max(head[i], default=0) <= i for head in sets)

    def test_larger_budgets_only_add_keys_while_no_slice_is_capped(self):
        estimated = draw_tensors(1, 3, 3, 32, 4, 8)[3]
        before = selected_sets(estimated, Rule(4), is_causal=True)
        for budget in range(5, 33):
            after = selected_sets(estimated, Rule(budget), is_causal=True)
            assert all(a <= b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))
            before = after

    def test_heads_may_be_permuted_with_their_estimates(self):
        tensors = draw_tensors(1, 4, 4, 12, 4, 4)
        order = torch.tensor([2, 0, 3, 1])
        query, key, value, estimated, scale_prob, mix = tensors
        out = sea_attention(query, key, value, estimated, is_causal=True, budget=2, scale_prob=scale_prob, mix=mix)
        moved = [tensor[:, order] for tensor in tensors]
        again = sea_attention(*moved[:4], is_causal=True, budget=2, scale_prob=moved[4], mix=moved[5])
        torch.testing.assert_close(again, out[:, order], **CLOSE)

    def test_equal_slices_the_lower_head_then_column_wins(self):
        sets = selected_sets(torch.zeros(1, 2, 8, 4).double(), Rule(2), is_causal=True)
        assert sets[0][7] == set(range(4))  # 2 slices of 2
        assert sets[1][7] == set()
        bfloat = selected_sets(torch.zeros(1, 2, 8, 4).bfloat16(), Rule(2), is_causal=True)
        assert bfloat == sets

    def test_mix_and_scale(self, worked):
        sparse = run(worked, scale_prob=None, mix=None)
        mean = worked.value.cumsum(2) / torch.arange(1, 7)[:, None]
        torch.testing.assert_close(run(worked), 0.75 * 0.9 * sparse + 0.25 * mean, **CLOSE)
        torch.testing.assert_close(run(worked, mix=torch.zeros(()).double()), mean, **CLOSE)
        assert torch.equal(run(worked, mix=torch.ones(()).double(), scale_prob=None), sparse)

    @pytest.mark.parametrize("L", [3, 11, 16])
    @pytest.mark.parametrize("pooling", ["width", "paper"])
    def test_pooled_value_without_a_causal_mask(self, L, pooling):
        M = 4
        *tensors, estimated, _, _ = draw_tensors(1, 2, 2, L, 4, M)
        out = sea_attention(*tensors, estimated, budget=2, mix=torch.zeros(1, 2, 1).double(), pooling=pooling)
        mean = estimated.softmax(-1).mean(2)[0]  # [H, M]
        edges = boundaries(torch.tensor(L), M)
        for h in range(2):
            weights = torch.zeros(L).double()
            for m in range(M):
                width = max(edges[m + 1] - edges[m], 1) if pooling == "width" else 1
                weights[edges[m] : edges[m + 1]] = mean[h, m] / width
            weights = weights / weights.sum() if pooling == "width" else weights
            pooled = weights @ tensors[2][0, h]
            torch.testing.assert_close(out[0, h], pooled.expand(L, -1), **CLOSE)
        assert L < M or pooling == "paper" or weights.sum().item() == pytest.approx(1, rel=1e-14)
