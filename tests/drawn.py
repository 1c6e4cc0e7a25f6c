"""Random tensors on the device that Triton kernels are tested on: a GPU, else the CPU, in the interpreter."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.fixture(autouse=True)
def seed():
    """For the modules that import it."""
    torch.manual_seed(0)
