"""Every test starts from the same random state and on few threads."""

import os

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
