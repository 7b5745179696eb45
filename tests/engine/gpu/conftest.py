"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Device for the tensors that kernels get."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
