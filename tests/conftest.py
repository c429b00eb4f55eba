"""Without a GPU triton interprets its kernels. It reads this when it is imported, so it is said before all tests."""

import gc
import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"


# Tracing models leaves millions of objects behind, and to go over all of them takes seconds each time.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def on_the_device():
    """Tensors are made on the GPU if there is one."""
    with torch.device("cuda" if GPU else "cpu"):
        yield


@pytest.fixture
def poisoned():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=GPU)  # on a GPU some of torch's own operators are not
    yield
    torch.use_deterministic_algorithms(False)
