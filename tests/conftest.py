"""Without a GPU triton interprets its kernels. It reads this when it is imported, so it is said before all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
