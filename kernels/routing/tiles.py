"""The windows of rule ``argmax_window`` in tiles: queries that share most of their keys are scored as matrices.

Queries are sorted by the rank at which their window ends, keys lie in tiles of ``width`` ranks. A window that ends in
one tile begins there or in the tile before. The sorted queries are cut wherever the tile changes and after every M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnrewrite.kernels.routing.selection import Block, Selection, Windows


@dataclass(frozen=True)
class Tiles:
    """Groups of up to ``size`` queries whose windows end in the same tile, with the keys of two tiles."""

    windows: Windows
    by_end: Tensor  # [B, H, L], queries by the end of their window
    starts: Tensor  # [B, H, G + 1], where each group starts in ``by_end``; some are empty
    size: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, queries in each, keys in each."""
        own = self.size if self.windows.alone is not None else 0
        return self.starts.shape[2] - 1, self.size, 2 * self.windows.width + own

    def block(self, start: int, stop: int) -> Block:
        """Return the groups from ``start`` to before ``stop``."""
        first, after = self.starts[:, :, start:stop, None], self.starts[:, :, start + 1 : stop + 1, None]
        place = first + torch.arange(self.size, device=first.device)  # [B, H, G, M]
        query = _at(self.by_end, place)
        low, high = _at(self.windows.low, query).unsqueeze(-1), _at(self.windows.high, query).unsqueeze(-1)
        rank = self._ranks(high[:, :, :, 0]).unsqueeze(-2)  # [B, H, G, 1, 2 W]
        pairs = (rank >= low) & (rank < high)
        order = self.windows.order.repeat_interleave(query.shape[1] // self.windows.order.shape[1], dim=1)
        keys = _at(order, rank.squeeze(-2).clamp(min=0))
        if self.windows.alone is not None:
            own = torch.eye(self.size, dtype=torch.bool, device=query.device)
            pairs = torch.cat((pairs, own & _at(self.windows.alone, query).unsqueeze(-1)), dim=-1)
            keys = torch.cat((keys, query + self.windows.first), dim=-1)
        real = place < after
        if self.windows.valid is not None:
            real = real & _at(self.windows.valid.unsqueeze(1).expand_as(self.by_end), query)
        return Block(torch.where(real, query, -1), keys, pairs)

    def _ranks(self, high: Tensor) -> Tensor:
        """Return the ranks of the tile in which a window ends at ``high`` ``[B, H, G, 1]``, and of the one before."""
        width = self.windows.width
        return (tile_of(high, width) - 1) * width + torch.arange(2 * width, device=high.device)


def tiled(selection: Selection) -> Selection:
    """Return the same pairs in tiles where the rule is ``argmax_window``, else the selection itself."""
    if not isinstance(selection, Windows):
        return selection
    L, S, width = selection.high.shape[-1], selection.order.shape[-1], selection.width
    size = max(1, width // 2)
    ends, by_end = selection.high.sort(dim=-1, stable=True)
    tile = tile_of(ends, width)
    tiles = torch.arange(-(-S // width) + 1, device=ends.device).expand(*ends.shape[:2], -1).contiguous()
    changes = torch.searchsorted(tile, tiles[:, :, 1:].contiguous())  # of which the last is L
    regular = torch.arange(0, L, size, device=ends.device).expand(*ends.shape[:2], -1)
    return Tiles(selection, by_end, torch.cat((regular, changes), dim=-1).sort(dim=-1).values, size)


def tile_of(end: Tensor, width: int) -> Tensor:
    """Return the tile of the last rank before ``end``; an empty window at rank 0 counts to the first."""
    return (end - 1).clamp(min=0) // width


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Read ``values`` ``[B, H, N]`` at ``index`` ``[B, H, ...]``, beyond the end at the last."""
    inside = index.clamp(max=values.shape[-1] - 1)
    return values.gather(-1, inside.flatten(2)).reshape(index.shape)
