"""A converted model in DistributedDataParallel whose gradients fill more than one bucket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from two_processes import IDS, converted, gradients, train_one_of_two


@pytest.mark.slow
def test_buckets_that_cut_a_layer_are_named_and_without_them_gradients_are_those_of_the_batch(tmp_path: Path) -> None:
    mp.spawn(train_one_of_two, (str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)
    expected = gradients(converted(), IDS)
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    assert expected
    for name, value in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-4, atol=1e-7)
