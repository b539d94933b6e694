"""Segmentation of whole volumes on any grid."""

from __future__ import annotations

import pytest
import torch

from examples.tod_net_ct.inference import segment
from tests.tod_net_ct.doubles import Bright

pytest.importorskip("monai")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_any_sides_are_padded_and_cropped_again() -> None:
    volume = torch.randn(5, 21, 34) * 100
    assert torch.equal(segment(Bright(), volume), (volume > 0).long())


def test_windows_give_what_one_pass_gives() -> None:
    volume = torch.randn(20, 40, 70) * 100
    found = segment(Bright(), volume, max_voxels=10_000, window=(16, 16, 32))
    assert torch.equal(found, (volume > 0).long())


def test_another_voxel_size_is_resampled_there_and_back() -> None:
    seen = []

    class Watching(Bright):
        def forward(self, image):
            seen.append(tuple(image.shape[2:]))
            return super().forward(image)

    z, y, x = torch.meshgrid(torch.arange(16), torch.arange(64), torch.arange(64), indexing="ij")
    ball = ((z - 8) * 3.0) ** 2 + (y - 32) ** 2 + (x - 32) ** 2 < 18**2
    found = segment(Watching(), 200.0 * ball - 100, (3.0, 1.0, 1.0), (1.5, 2.0, 2.0))
    assert seen == [(32, 32, 32)] and found.shape == ball.shape
    assert 2 * (found * ball).sum() / (found.sum() + ball.sum()) > 0.95


def test_the_training_voxel_size_is_left_alone() -> None:
    volume = torch.randn(16, 16, 16) * 100
    assert torch.equal(segment(Bright(), volume, (3.0, 1.0, 1.0), (3.0, 1.0, 1.0)), (volume > 0).long())
