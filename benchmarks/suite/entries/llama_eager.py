"""A whole Llama with eager attention, forward and forward + backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.figures import Goal, Result
from suite.llama import Logits, token_ids
from suite.versus import compare

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size


def run(size: Size, tick: Tick) -> Result:
    layers = size["layers"]
    return compare(lambda name: Logits(size, name, layers), token_ids(size), size, layers, Goal(">=", 1.8), tick)
