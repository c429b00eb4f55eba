"""The names of the kernels that a call will run, before it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attnrewrite.kernels.dense.call import Call, options
from attnrewrite.kernels.dense.catalogue import OF_VALUES, kernel
from attnrewrite.kernels.dense.decode import few
from attnrewrite.kernels.dense.selective import Selection, in_passing, skips
from attnrewrite.kernels.dense.shared import paired, shares
from attnrewrite.kernels.generation.emit import Flag
from attnrewrite.kernels.selective.ballot import selector
from attnrewrite.kernels.symmetric.reference import pairwise_query

OPERATORS = tuple(f"attnrewrite::{name}" for name in ("dense_attention", "selective_kernels", "symmetric_kernels"))


def kernel_names(operator: str, values: Sequence[Any], *, learns: bool) -> list[str]:
    """Return the files, without suffix, of the kernels that one of the ``OPERATORS`` runs.

    values: its arguments, which may be fake tensors; a length that is not known counts as a long one.
    learns: whether backward will run too.
    """
    return [kernel(name, flags).stem for name, flags in _used(operator, values, learns)]


def _used(operator: str, values: Sequence[Any], learns: bool) -> Iterator[tuple[str, dict[str, Flag]]]:
    if operator == OPERATORS[0]:
        query, key, value, mask, tau, rho, sinks, slopes, _, scale, dropout_p, causal, window, softcap = values
        how = options(scale, dropout_p, causal, window, softcap, sinks, slopes)
        call = Call(query, key, value, how, mask, query_temperature=tau, value_temperature=rho)
        yield from _dense(call, call.flags(), learns)
        return
    if operator == OPERATORS[2]:
        shared, value, pair, mask, sinks, slopes, _, scale, dropout_p, causal, window, softcap = values
        how = options(scale, dropout_p, causal, window, softcap, sinks, slopes)
        call = Call(shared if pair is None else pairwise_query(shared, pair), shared, value, how, mask)
        forward = {**call.flags(), "PAIR": paired(shared, value, pair, mask, None, how, on_chip=True).pair is not None}
        yield from _dense(call, forward, learns=False)
        if learns and shares(call):
            yield from ((name, call.flags()) for name in ("delta", "backward_shared"))
        elif learns:
            yield from _backward(call.flags())
        return
    query, key, value, gamma, votes, mask, vote_query, vote_key, sinks, slopes, protected, *rest = values
    position, _, scale, dropout_p, causal, window, softcap, offset, head, _ = rest
    how = options(scale, dropout_p, causal, window, softcap, sinks, slopes, offset)
    call = Call(query, key, value, how, mask, strength=gamma)
    who = Selection(head, protected, votes, position, selector(vote_query, vote_key))
    flags = {**call.flags(), "PLACED": position is not None}
    if _short(call) and in_passing(call, who):
        yield from _dense(call, {**flags, "VOTES": True}, learns=False)
        return
    flags["SKIPS"] = not _short(call) and (not isinstance(key.shape[2], int) or skips(call, who))
    own = {**flags, **who.voter(call).flags(call)}
    yield "votes", own
    yield from _dense(call, {**flags, "PENALTY": True}, learns)
    if learns:
        yield "backward_logits", flags
        yield "backward_votes", own


def _dense(call: Call, flags: dict[str, Flag], learns: bool) -> Iterator[tuple[str, dict[str, Flag]]]:
    names = ["decode", "merge"] if _short(call) else ["live", "forward"] if flags["SKIPS"] else ["forward"]
    yield from ((name, flags) for name in names)
    if learns:
        yield from _backward(flags)


def _backward(flags: dict[str, Flag]) -> Iterator[tuple[str, dict[str, Flag]]]:
    yield "delta", flags
    yield "backward_keys", flags
    if flags["GRADIENTS"] == "keys":
        yield "backward_values", {**flags, **OF_VALUES}
    yield "backward_queries", flags


def _short(call: Call) -> bool:
    return isinstance(call.query.shape[2], int) and few(call)
