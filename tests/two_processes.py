"""What one of two processes does in the tests of DistributedDataParallel; a new process must find it by name."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attnrewrite
from attnrewrite import AttnRewriteError, SSAConfig

IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


def converted() -> nn.Module:
    """A model whose first bucket, of 1 MB, ends between the keys and the values of its last layer."""
    model = tiny.llama(hidden_size=128, intermediate_size=600)
    return attnrewrite.convert(model, SSAConfig(), example_inputs=(IDS,)).train()


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model(ids, use_cache=False).logits.square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def train_one_of_two(rank: int, store: str, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ids = IDS[rank : rank + 1]
    split = DistributedDataParallel(converted(), bucket_cap_mb=1)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        split(ids, use_cache=False)
    failure = caught.value.inner_exception
    assert isinstance(failure, AttnRewriteError)
    assert failure.code == "AR309"
    assert failure.layer == "model.layers.1.self_attn"
    assert "optimize_ddp = False" in failure.hint
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=False):
        whole = DistributedDataParallel(converted(), bucket_cap_mb=1)
        torch.save(gradients(whole, ids), f"{path}{rank}")
    torch.distributed.destroy_process_group()
