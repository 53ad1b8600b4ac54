from __future__ import annotations

import pytest
import torch

from rayva.training.engine import init_distributed


@pytest.fixture(scope="session")
def process_group() -> None:
    """A process group of this process alone, with DeepSpeed ready."""
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
