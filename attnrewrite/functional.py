"""The attentions as plain functions, with the argument names and layout of torch's own."""

from attnrewrite.kernels.dense.choice import kernels
from attnrewrite.kernels.routing.op import routing_attention
from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.kernels.sea.op import sea_attention
from attnrewrite.kernels.selective.decode import SelectionState, selective_decode
from attnrewrite.kernels.selective.memory import selective_memory
from attnrewrite.kernels.selective.op import selective_attention
from attnrewrite.kernels.ssa.op import ssa_attention
from attnrewrite.kernels.symmetric.op import symmetric_attention
from attnrewrite.kernels.symmetric.reference import pairwise_query

__all__ = [
    "SelectionState",
    "attention",
    "kernels",
    "pairwise_query",
    "routing_attention",
    "sea_attention",
    "selective_attention",
    "selective_decode",
    "selective_memory",
    "ssa_attention",
    "symmetric_attention",
]
