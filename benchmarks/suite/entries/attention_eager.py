"""One attention layer of the Llama, forward and forward + backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suite.figures import Goal, Result
from suite.llama import Attention, hidden_states
from suite.versus import compare

if TYPE_CHECKING:
    from attnrewrite.bench.clock import Tick
    from suite.registry import Size


def run(size: Size, tick: Tick) -> Result:
    return compare(lambda name: Attention(size, name), hidden_states(size), size, 1, Goal(">=", 1.8), tick)
