"""Every test starts from the same random state, on one thread: the suite runs one process per core."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
