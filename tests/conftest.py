"""Every test starts from the same random state, on one thread: the suite runs one process per core."""

import pytest
import torch

torch.set_num_threads(1)
torch.manual_seed(0)  # for what the files draw while they are collected


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
