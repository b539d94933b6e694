"""A task network on a whole volume: on the voxel size that it was trained with, whatever the scan's sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dose import to_unit
from ..networks import SIDE_MULTIPLE

MAX_VOXELS = 2**22  # in one pass; a larger volume goes through in overlapping windows
WINDOW = (64, 256, 256)  # slices, rows, columns


@torch.no_grad()
def segment(
    network: nn.Module,
    volume_hu: Tensor,
    voxel_mm: Sequence[float] | None = None,
    training_voxel_mm: Sequence[float] | None = None,
    *,
    device: str | torch.device = "cpu",
    max_voxels: int = MAX_VOXELS,
    window: Sequence[int] = WINDOW,
) -> Tensor:
    """The network's label map of a volume, on the volume's own grid.

    Where the two voxel sizes differ, the volume is resampled linearly to the training's and the label map comes back
    by nearest neighbour, as in the published code. Sides are padded with their edge to a multiple of 16 and cropped
    again. A volume of more than `max_voxels` goes through in overlapping windows blended by MONAI.

    Args:
        network: in eval mode, with scores `(N, K, D, H, W)` out of an image in [0, 1].
        volume_hu: `(D, H, W)`.
        voxel_mm: of the volume, `(dz, dy, dx)`.
        training_voxel_mm: of the network's training images; None for both takes the volume as it is.
        device: where the network works; it is expected there.
        max_voxels, window: the bound on memory; window sides divide by 16.

    Returns:
        `(D, H, W)` int64 on the CPU.
    """
    from monai.inferers import sliding_window_inference

    shape = volume_hu.shape
    image = volume_hu.float()[None, None]
    size = list(shape)
    if voxel_mm is not None and training_voxel_mm is not None:
        size = [max(1, round(n * float(a) / b)) for n, a, b in zip(shape, voxel_mm, training_voxel_mm, strict=True)]
    if size != list(shape):
        image = F.interpolate(image, size=size, mode="trilinear", align_corners=False)
    image = to_unit(image)
    image = F.pad(image, [p for n in reversed(size) for p in (0, -n % SIDE_MULTIPLE)], mode="replicate")
    if image.numel() <= max_voxels:
        scores = network(image.to(device))
    else:
        roi = [min(side, n) for side, n in zip(window, image.shape[2:], strict=True)]
        scores = sliding_window_inference(
            image, roi, 1, network, overlap=0.25, mode="gaussian", sw_device=device, device="cpu"
        )
    depth, height, width = size
    label = scores.argmax(1, keepdim=True)[..., :depth, :height, :width].cpu()
    if size != list(shape):
        label = F.interpolate(label.to(torch.uint8), size=tuple(shape), mode="nearest-exact").long()
    return label[0, 0]
