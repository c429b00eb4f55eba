"""Index symbols through layout operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrewrite.passes.graph.axes import AxisError, Layout, Symbol, arrange, flat, reshape, symbols


def layout(*sizes: int) -> Layout:
    return tuple((Symbol(f"s{n}", size),) for n, size in enumerate(sizes))


def names(found: Layout) -> list[list[str]]:
    return [[s.name for s in flat(dim)] for dim in found]


def test_folding_two_dims_keeps_both_symbols() -> None:
    assert names(reshape(layout(2, 4, 12, 8), (2, 4, 12, 8), (8, 12, 8))) == [["s0", "s1"], ["s2"], ["s3"]]


def test_splitting_a_dim_splits_its_symbol_everywhere() -> None:
    before = layout(2, 12, 32)
    after = reshape(before, (2, 12, 32), (2, 12, 4, 8))
    assert names(after) == [["s0"], ["s1"], ["s20"], ["s21"]]
    assert names(before) == [["s0"], ["s1"], ["s20", "s21"]]


def test_a_view_across_symbols_is_refused() -> None:
    with pytest.raises(AxisError):
        reshape(layout(6, 4), (6, 4), (4, 6))


def test_size_one_dims_come_and_go() -> None:
    assert names(reshape(layout(2, 12), (2, 12), (2, 1, 12, 1))) == [["s0"], [], ["s1"], []]
    assert names(reshape(layout(2, 1, 12), (2, 1, 12), (2, 1, 12))) == [["s0"], ["s1"], ["s2"]]


@settings(deadline=None, max_examples=60)
@given(st.permutations(range(4)), st.lists(st.sampled_from([2, 3, 5, 7]), min_size=4, max_size=4), st.booleans())
def test_arrange_moves_values_as_their_symbols(order: list[int], sizes: list[int], fold: bool) -> None:
    have = layout(*sizes)
    want: Layout = tuple(have[n] for n in order)
    if fold:
        want = (want[0] + want[1], *want[2:])
    value = torch.arange(torch.Size(sizes).numel()).view(sizes)
    expected = value.permute(order)
    expected = expected.flatten(0, 1) if fold else expected
    by_size = {s: s.size for s in symbols(have)}
    found = arrange(value, have, want, by_size.__getitem__)
    assert torch.equal(found, expected)
    assert torch.equal(arrange(found, want, have, by_size.__getitem__), value)


def test_arrange_expands_missing_symbols() -> None:
    a, b = Symbol("a", 2), Symbol("b", 3)
    found = arrange(torch.tensor([1.0, 2.0]), ((a,),), ((b,), (a,)), lambda s: s.size)
    assert found.tolist() == [[1, 2]] * 3
