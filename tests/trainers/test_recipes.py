"""Every block of the page runs in its framework, before and after, and trains the denoiser alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from taskloss import Frozen
from tests.trainers.recipes import recipes

RECIPES = recipes()
NEEDS = {
    "Fabric": "lightning",
    "Accelerate": "accelerate",
    "Hugging Face Trainer": "transformers",
    "MONAI": "monai",
    "MONAI, adversarial": "monai",
    "Ignite": "ignite",
    "DeepInverse": "deepinv",
    "Hydra": "hydra",
    "CompressAI": "compressai",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some frameworks write where they are


def moved(before: nn.Module, after: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("mark", ["-", "+"], ids=["before", "after"])
@pytest.mark.parametrize("name", NEEDS)
def test_the_denoiser_moves_and_the_task_network_does_not(name: str, mark: str) -> None:
    pytest.importorskip(NEEDS[name])
    start = RECIPES[name].run("")
    after = RECIPES[name].run(mark)
    trained = "model" if name == "CompressAI" else "denoiser"
    assert Frozen(after["segmenter"]).digest() == Frozen(start["segmenter"]).digest()
    assert all(p.grad is None for p in after["segmenter"].parameters())
    assert all(torch.isfinite(p).all() for p in after[trained].parameters())
    if trained in start:
        assert moved(start[trained], after[trained])
