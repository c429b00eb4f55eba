"""The attentions as plain functions, with the argument names and layout of torch's own."""

from attnrewrite.kernels.routing.reference import routing_attention
from attnrewrite.kernels.sdpa.reference import attention
from attnrewrite.kernels.selective.reference import selective_attention
from attnrewrite.kernels.ssa.reference import ssa_attention

__all__ = ["attention", "routing_attention", "selective_attention", "ssa_attention"]
