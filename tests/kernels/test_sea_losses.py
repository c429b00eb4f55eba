"""Distillation of the estimate: closed forms against the dense definitions."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sea_support import CLOSE, draw_tensors, visible_keys, worked_example

from attnrewrite.kernels.diagnostics import LoweringError
from attnrewrite.kernels.sea import losses
from attnrewrite.kernels.sea.losses import (
    approximation_loss,
    attention_loss,
    divergence_gradients,
    divergences,
    slice_widths,
    teacher_statistics,
)


@st.composite
def cases(draw):
    L = draw(st.integers(1, 12))
    is_causal = draw(st.booleans())
    return SimpleNamespace(
        L=L,
        M=draw(st.integers(1, 8)),
        is_causal=is_causal,
        window=draw(st.none() | st.integers(1, 13)) if is_causal else None,
        real=draw(st.lists(st.booleans(), min_size=L, max_size=L)),
        seed=draw(st.integers(0, 2**16)),
    )


def dense(query, key, estimated, seen, widths):
    """Teacher and student as matrices, and the two divergences of every row, for one batch row."""
    H, L, _ = estimated.shape
    kl, squared = (torch.zeros(H, L, dtype=torch.float64) for _ in range(2))
    for h in range(H):
        for i in range(L):
            if seen[i]:
                p = (key[h, seen[i]] @ query[h, i] / math.sqrt(query.shape[-1])).softmax(0)
                student = estimated[h, i].repeat_interleave(widths[i]).softmax(0)
                kl[h, i] = (p * (p.log() - student.log())).sum()
                squared[h, i] = (p - student).square().sum()
    return kl, squared


class TestWorkedExample:
    def test_slices_and_divergences(self, assert_prints):
        data = worked_example()
        teacher = teacher_statistics(data.query, data.key, 4, is_causal=True)
        widths = slice_widths(6, 4, is_causal=True)
        kl, squared = divergences(data.estimated, teacher, widths)
        d_kl, _ = divergence_gradients(data.estimated, teacher, widths)
        assert_prints(teacher.mass[0, 0, 5], "0.1012992455 0.1472877038 0.6038698238 0.1475432270")
        assert_prints(torch.stack([kl[0, 0, 5], squared[0, 0, 5]]), "0.3409653340 0.1006845238")
        assert_prints(d_kl[0, 0, 5], "0.1882567992 0.1881408071 -0.2609804734 -0.1154171329")
        assert_prints(teacher.mass[0, 1, 2], "0.2919155416 0.2993949506 0 0.4086895078")
        assert_prints(torch.stack([kl[0, 1, 2], squared[0, 1, 2]]), "0.2802874035 0.1563401431")


class TestClosedForms:
    @settings(max_examples=40, deadline=None)
    @given(case=cases())
    def test_equal_the_dense_ones_with_their_gradients(self, case):
        query, key, _, estimated, *_ = draw_tensors(1, 2, 2, case.L, 4, case.M, seed=case.seed)
        real = torch.tensor(case.real)
        visibility = {"is_causal": case.is_causal, "window": case.window, "attn_mask": real}
        teacher = teacher_statistics(query, key, case.M, **visibility)
        widths = slice_widths(case.L, case.M, **visibility)
        seen = visible_keys(case.L, is_causal=case.is_causal, window=case.window, real=case.real)
        assert widths[0].sum(-1).tolist() == [len(keys) for keys in seen]
        found = divergences(estimated, teacher, widths)
        expected = dense(query[0], key[0], estimated[0], seen, widths[0])
        closed = divergence_gradients(estimated.detach(), teacher, widths)
        for ours, theirs, formula in zip(found, expected, closed, strict=True):
            torch.testing.assert_close(ours[0], theirs, **CLOSE)
            if any(case.real):
                (by_autograd,) = torch.autograd.grad(ours.sum(), estimated, retain_graph=True)
                (by_definition,) = torch.autograd.grad(theirs.sum(), estimated, retain_graph=True)
                torch.testing.assert_close(by_autograd, by_definition, **CLOSE)
                torch.testing.assert_close(formula, by_definition, **CLOSE)

    def test_number_of_queries_at_a_time_changes_nothing(self, monkeypatch):
        query, key, *_ = draw_tensors(2, 4, 2, 19, 4, 5)
        bias = torch.randn(4, 19, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        options = {"is_causal": True, "enable_gqa": True, "attn_mask": bias}
        whole = teacher_statistics(query, key, 5, **options)
        monkeypatch.setattr(losses, "_CHUNK", 400)
        for ours, theirs in zip(teacher_statistics(query, key, 5, **options), whole, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)

    def test_perfect_estimate_leaves_what_slices_average_away(self):
        query, key, *_ = (t.detach() for t in draw_tensors(1, 2, 2, 16, 4, 4))
        teacher = teacher_statistics(query, key, 4)
        widths = slice_widths(16, 4)
        best = (teacher.mass / widths).log()
        kl, squared = divergences(best, teacher, widths)
        p = (query @ key.mT / 2).softmax(-1)
        flat = (teacher.mass / widths).repeat_interleave(4, dim=-1)
        torch.testing.assert_close(kl, (p * (p / flat).log()).sum(-1), **CLOSE)
        torch.testing.assert_close(squared, (p - flat).square().sum(-1), **CLOSE)
        assert divergence_gradients(best, teacher, widths)[0].abs().max() < 1e-15

    def test_teacher_that_is_constant_on_slices_is_matched(self):
        query = draw_tensors(1, 2, 2, 16, 4, 4)[0].detach()
        key = query[:, :, :4].repeat_interleave(4, dim=2)
        teacher = teacher_statistics(query, key, 4)
        found = divergences(teacher.mass.log(), teacher, slice_widths(16, 4))
        assert all(tensor.abs().max() < 1e-14 for tensor in found)

    def test_teacher_has_no_gradient_and_no_square(self):
        query, key, _, estimated, *_ = draw_tensors(1, 2, 2, 16, 4, 4, dtype=torch.bfloat16)
        teacher = teacher_statistics(query, key, 4, is_causal=True)
        assert [t.shape for t in teacher] == [(1, 2, 16, 4), (1, 2, 16), (1, 2, 16)]
        assert all(t.dtype == torch.float32 and not t.requires_grad for t in teacher)
        loss = approximation_loss(estimated, teacher, slice_widths(16, 4, is_causal=True))
        assert torch.autograd.grad(loss, estimated)[0].isfinite().all()

    def test_loud_estimates_of_empty_slices_are_ignored(self):
        query, key, _, estimated, *_ = draw_tensors(1, 2, 2, 3, 4, 8)
        widths, teacher = slice_widths(3, 8), teacher_statistics(query, key, 8)
        loud = estimated.detach().masked_fill((widths == 0).unsqueeze(1), 5000.0).requires_grad_()
        loss = approximation_loss(loud, teacher, widths)
        torch.testing.assert_close(loss, approximation_loss(estimated, teacher, widths), **CLOSE)
        (grad,) = torch.autograd.grad(loss, loud)
        assert grad.isfinite().all()
        assert (grad[:, :, (widths == 0)[0]] == 0).all()

    def test_loss_is_the_mean_over_rows_and_entries(self):
        query, key, _, estimated, *_ = draw_tensors(2, 2, 2, 6, 4, 4)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool().reshape(2, 1, 1, 6)
        teacher = teacher_statistics(query, key, 4, attn_mask=mask)
        widths = slice_widths(6, 4, attn_mask=mask)
        kl, squared = divergences(estimated, teacher, widths)
        expected = 0.1 * kl.sum() / (10 * 2) + squared.sum() / (10 * 2 * 6)
        torch.testing.assert_close(approximation_loss(estimated, teacher, widths), expected, **CLOSE)

    @pytest.mark.parametrize(
        ("function", "says"),
        [
            (lambda q, t: teacher_statistics(q, q[..., :2], 4), ("4", "2")),
            (lambda q, t: teacher_statistics(q, q, 4, torch.ones(6, 6, dtype=torch.bool)), ("6 queries",)),
            (lambda q, t: approximation_loss(q[:, :, :5], t, slice_widths(6, 4)), ("1 x 2 x 5 x 4", "1 x 2 x 6 x 4")),
        ],
    )
    def test_wrong_arguments_say_both_sides(self, function, says):
        query = torch.zeros(1, 2, 6, 4)
        with pytest.raises(LoweringError) as raised:
            function(query, teacher_statistics(query, query, 4))
        assert raised.value.code == "AR402"
        assert all(part in raised.value.detail for part in says)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_loss_of_dense_attention_is_that_of_its_definition(is_causal: bool) -> None:
    """0.1 KL + MSE of two matrices written out, with a bias and with padding, whose rows count nothing."""
    source = torch.Generator().manual_seed(4)
    q, k, tq, tk = (torch.randn(2, h, 7, 4, generator=source, dtype=torch.float64) for h in (4, 2, 4, 2))
    bias = torch.randn(1, 4, 7, 7, generator=source, dtype=torch.float64)
    real = torch.arange(7) >= torch.tensor([[2], [0]])
    seen = (real[:, None, None] & real[:, None, :, None]).expand(2, 4, 7, 7)
    seen = seen & torch.ones(7, 7).tril().bool() if is_causal else seen
    log = [
        (x @ y.repeat_interleave(2, 1).mT * 0.5 + bias).masked_fill(~seen, -torch.inf).log_softmax(-1)[seen.any(-1)]
        for x, y in ((q, k), (tq, tk))
    ]
    student, p = (x.exp() for x in log)
    kl = torch.where(p > 0, p * (log[1] - log[0]), 0.0).sum(-1).mean()
    expected = 0.1 * kl + (student - p).square().mean()
    how = {"is_causal": is_causal, "scale": 0.5, "enable_gqa": True, "padding": real}
    found = attention_loss(q.requires_grad_(), k, tq, tk, bias, **how)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
