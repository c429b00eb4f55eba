"""Selective attention on a GPU: the votes first, then the dense family with their penalty, and the way back.

The penalty F takes L S numbers. Where they would be too many, the queries go in strips, from the first to the last and
back, and the votes are carried from one to the next: the same work, in the memory of one strip.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnrewrite.kernels.dense.call import Call, named
from attnrewrite.kernels.dense.configs import Config
from attnrewrite.kernels.dense.decode import Voting, decode, few
from attnrewrite.kernels.dense.heights import strips_of
from attnrewrite.kernels.dense.launch import NOTHING_MORE, Gradients, Wanted, backward, forward, run
from attnrewrite.kernels.dense.voter import Selector, Voter, voter

_ROW = 16
"""Rows of the penalty start at multiples of so many entries, so that a tile is loaded in whole words."""
SHORTEST_SKIP = 1024
"""From so many keys on it is worth finding out which of them count for nothing any more."""
NEGLIGIBLE = 2.0**-24
"""What the weights left out may sum up to: half of what float32 can tell from 1."""
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Who votes, and how matters stand before the first query.

    ``head`` is the selection head, in the place of which a ``selector`` may vote, whose queries begin with the first
    one. On the keys ``protected`` ``[B or 1, S]`` nobody may vote. ``earlier`` ``[B, S]`` are the votes received so
    far, in float32. ``position``, one int64, is where the first query stands among the keys, where that is not the
    offset of the call.
    """

    head: int
    protected: Tensor
    earlier: Tensor
    position: Tensor | None = None
    selector: Selector | None = None

    def voter(self, call: Call) -> Voter:
        """Return who votes for the queries of a call."""
        own = None if self.selector is None else (self.selector[0][:, : call.sizes[3]], self.selector[1])
        return voter(call, self.head, own)

    def after(self, rows: int, votes: Tensor) -> Selection:
        """Return how matters stand so many queries later."""
        position = None if self.position is None else self.position + rows
        own = None if self.selector is None else (self.selector[0][:, rows:], self.selector[1])
        return dataclasses.replace(self, earlier=votes, position=position, selector=own)


@dataclasses.dataclass(frozen=True, eq=False)
class Votes:
    """What the votes of some queries do.

    ``penalty`` ``[B, L, S]`` is F log2(e), times the strength if not ``exact``; ``received`` ``[B, S]`` are the votes
    after the last query; ``death`` ``[B, S]`` the first row from which on a key counts for nothing, None where that is
    not known.
    """

    penalty: Tensor
    received: Tensor
    death: Tensor | None


def selective_forward(call: Call, who: Selection, recent: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``launch.forward`` does, and the votes after each of the last ``recent`` queries ``[B, recent, S]``.

    ``call`` has a strength.
    """
    L, strength = call.sizes[3], call.strength
    assert strength is not None
    if in_passing(call, who):
        received = torch.empty_like(who.earlier)
        return *decode(call, Voting(who.earlier, who.protected, who.position, who.head, received)), received[:, None]
    if L == 0:
        return *forward(call), who.earlier[:, None].expand(-1, recent, -1).clone()
    outs, after = [], []
    for rows in strips_of(call):
        part = call.rows(rows)
        votes = count(part, who, exact=recent > 1)
        penalty = votes.penalty
        if recent > 1:
            penalty = torch.where(penalty.isinf(), torch.inf, penalty * strength)
        attend = decode if few(part) else forward
        outs.append(attend(dataclasses.replace(part, penalty=penalty, death=votes.death)))
        first = max(rows.start, L - recent)
        if first < rows.stop:
            after.append(votes.penalty[:, first - rows.start + 1 :].float() / LOG2E)
            after.append(votes.received[:, None])
        who = who.after(rows.stop - rows.start, votes.received)
    out, lse = (_joined(x, 2) for x in zip(*outs, strict=True))
    return out, lse, _joined(after, 1)


def in_passing(call: Call, who: Selection) -> bool:
    """Whether the kernel that attends counts the votes: those that one query's heads cast."""
    return call.sizes[3] == 1 and few(call) and who.selector is None


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


@dataclasses.dataclass
class SelectiveGradients:
    """By query, key, value and bias; by the strength; by the votes before the first query ``[B, S]``; by a selector."""

    dense: Gradients
    strength: Tensor
    earlier: Tensor
    selector: Selector | None = None


def selective_backward(
    call: Call,
    who: Selection,
    out: Tensor,
    lse: Tensor,
    upstream: Tensor,
    later: Tensor,
    wanted: Wanted = NOTHING_MORE,
) -> SelectiveGradients:
    """Return the gradients. ``later`` ``[B, S]`` is that by the votes after the last query."""
    parts = list(strips_of(call))
    before = [who]
    for rows in parts[:-1]:
        before.append(before[-1].after(rows.stop - rows.start, count(call.rows(rows), before[-1]).received))
    wide = len(parts) > 1
    found: list[SelectiveGradients] = []
    for rows, state in zip(reversed(parts), reversed(before), strict=True):
        part, own = call.rows(rows), lse[:, :, rows].contiguous()
        given = (part, state, out[:, :, rows], own, upstream[:, :, rows], later)
        found.append(_backward_strip(*given, wanted, wide=wide))
        later = found[-1].earlier
    return found[0] if len(found) == 1 else _together(call, found[::-1])


def _together(call: Call, found: Sequence[SelectiveGradients]) -> SelectiveGradients:
    """Put the gradients of strips together, from the first to the last."""
    key, value = (torch.stack([getattr(x.dense, name) for x in found]).sum(0) for name in ("key", "value"))
    dense = Gradients(torch.cat([x.dense.query for x in found], 2), key.to(call.key.dtype), value.to(call.value.dtype))
    if found[0].dense.bias is not None:
        dense.bias = torch.cat([x.dense.bias for x in found if x.dense.bias is not None], 2)
    for name in ("sinks", "slopes"):
        parts = [getattr(x.dense, name) for x in found]
        setattr(dense, name, None if parts[0] is None else torch.stack(parts).sum(0))
    pairs = [x.selector for x in found if x.selector is not None]
    own = (torch.cat([x for x, _ in pairs], 1), torch.stack([x for _, x in pairs]).sum(0)) if pairs else None
    return SelectiveGradients(dense, torch.stack([x.strength for x in found]).sum(0), found[0].earlier, own)


def _backward_strip(
    call: Call,
    who: Selection,
    out: Tensor,
    lse: Tensor,
    upstream: Tensor,
    later: Tensor,
    wanted: Wanted,
    *,
    wide: bool,
) -> SelectiveGradients:
    B, H, Hkv, L, S = call.sizes
    strength = call.strength
    assert strength is not None
    votes = count(call, who, cleared=True)
    call = dataclasses.replace(call, penalty=votes.penalty, death=votes.death)
    found, delta = backward(call, out, lse, upstream, wanted, wide=wide)
    own = who.voter(call)
    selected = lse.new_empty(own.key.shape)
    by_strength, by_earlier = (lse.new_empty(B, S) for _ in range(2))
    # What was the penalty of a pair becomes the gradient by its logits, and then by its vote: one tile, one program.
    by_vote = votes.penalty if call.query.dtype == torch.float32 else votes.penalty.view(call.query.dtype)
    more = {"DOut": upstream, "Lse": lse, "Delta": delta, "DLogits": by_vote, **named("g", "bhmd", upstream)}

    def tiles(config: Config) -> int:
        return B * -(-L // config.block_m) * -(-S // config.block_n)

    run("backward_logits", call, more, tiles)
    more = {
        "DLogits": by_vote,
        "DVotes": by_vote,
        "Later": later,
        "DSelected": selected,
        "DStrength": by_strength,
        "DEarlier": by_earlier,
        "stride_pb": by_vote.stride(0),
        "stride_pm": by_vote.stride(1),
        **_state(call, who),
        **own.arguments(),
    }
    through_bias = found.bias is not None and who.selector is None
    if found.bias is not None and through_bias:
        more |= {"DBias": found.bias[:, who.head], "stride_ab": found.bias.stride(0)}
    by_slope = None if found.slopes is None or own.slope is None else lse.new_empty(B, S)
    more["DSlopes"] = by_slope
    flags = {**own.flags(call), "PLACED": who.position is not None, "BIAS_GRADIENT": through_bias}
    flags["SLOPE_GRADIENT"] = by_slope is not None
    run("backward_votes", call, more, lambda config: B * -(-S // config.block_n), flags)
    if found.slopes is not None and by_slope is not None:
        found.slopes[who.head] += by_slope.sum()
    result = SelectiveGradients(found, by_strength.sum().to(strength.dtype), by_earlier)
    by_voter = by_vote @ own.key
    if who.selector is not None:
        result.selector = by_voter, selected.to(own.key.dtype)
        return result
    found.query[:, who.head] += by_voter
    found.key[:, who.head // (H // Hkv)] += selected.to(found.key.dtype)
    return result


def count(call: Call, who: Selection, *, exact: bool = False, cleared: bool = False) -> Votes:
    """Count the votes of the queries of a call.

    The penalty has 16 bit for 16-bit inputs, if not ``exact``: then it is in float32, without the strength, and nothing
    is said about deaths. It is 0 for pairs that positions hide if ``exact`` or ``cleared``, and else for them whatever
    lay there.
    """
    B, _, _, L, S = call.sizes
    dtype = torch.float32 if exact or call.query.dtype == torch.float32 else torch.float16
    make = torch.zeros if exact or cleared else torch.empty
    penalty = make(B, L, -(-S // _ROW) * _ROW, dtype=dtype, device=call.query.device)[:, :, :S]
    received = torch.empty_like(who.earlier)
    limit = death = None
    if skips(call, who) and not exact:
        limit, death = _limit(call), torch.empty(B, S, dtype=torch.int32, device=call.query.device)
    own = who.voter(call)
    more = {
        "Strength": received.new_ones(()) if exact else call.strength,
        "Penalty": penalty,
        "Received": received,
        "Limit": limit,
        "Death": death,
        "largest": torch.finfo(dtype).max,
        "stride_pb": penalty.stride(0),
        "stride_pm": penalty.stride(1),
        **_state(call, who),
        **own.arguments(),
    }
    flags = {**own.flags(call), "PLACED": who.position is not None, "SKIPS": death is not None}
    run("votes", call, more, lambda config: B * -(-S // config.block_n), flags)
    return Votes(penalty, received, death)


def skips(call: Call, who: Selection) -> bool:
    """Whether every query sees itself, on which nobody votes: then a key with enough votes counts for nothing."""
    B, _, _, L, S = call.sizes
    how = call.how
    itself = how.is_causal and how.offset + L <= S and call.mask is None and who.position is None
    return itself and how.window is None and how.slopes is None and not few(call) and S >= SHORTEST_SKIP and B > 0


def _limit(call: Call) -> Tensor:
    """Return the penalty, times log2(e), that leaves no weight worth counting, ``[B]``.

    The weight of key j for query i is at most exp(z_ij - F_ij - z_ii), as key i is penalised by nobody, and logits are
    at most scale |q| |k|.
    """
    _, H, Hkv, _, S = call.sizes
    query, key = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(2) for x in (call.query, call.key))
    logit: Tensor = abs(call.how.scale) * (query * key.repeat_interleave(H // Hkv, 1)).amax(1)
    if call.how.softcap is not None:
        logit = logit.clamp(max=call.how.softcap)
    return LOG2E * 2 * logit + math.log2(S / NEGLIGIBLE)


def _state(call: Call, who: Selection) -> dict[str, object]:
    protected = who.protected.view(torch.uint8).expand(call.query.shape[0], -1)
    return {
        "Protected": protected,
        "stride_cb": protected.stride(0),
        "Earlier": who.earlier,
        "Position": who.position,
    }
