"""
A detector as guide
===================

torchvision's detectors compute their loss in training mode only, and want lists of images and targets. Give no
criterion: the containers then run in training mode while normalisation and dropout stay in eval, and nothing moves.
"""

import torch
from scipy import ndimage
from skimage import data, filters
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from taskloss import Fidelity, LossSum, TaskOrientedLoss, gradient_maps, plot_gradient_maps

picture = data.coins().astype("float32") / 255
picture = picture - ndimage.gaussian_filter(picture, 40) + 0.4  # the light falls off to one side
mask = ndimage.binary_fill_holes(ndimage.binary_opening(filters.gaussian(picture, 2) > 0.42, iterations=3))
coins, _ = ndimage.label(mask)


def crop(top: int, left: int, size: int = 160):
    """An image of three channels and the boxes of the coins that are wholly in it."""
    image = torch.from_numpy(picture[top : top + size, left : left + size]).expand(1, 3, size, size)
    boxes = [
        [s[1].start - left, s[0].start - top, s[1].stop - left, s[0].stop - top]
        for s in ndimage.find_objects(coins)
        if s[0].start >= top and s[0].stop <= top + size and s[1].start >= left and s[1].stop <= left + size
        and min(s[0].stop - s[0].start, s[1].stop - s[1].start) > 20
    ]  # fmt: skip
    return image, {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.ones(len(boxes)).long(),
    }


# %%
# A small detector, trained for a moment
# --------------------------------------

backbone = nn.Sequential(
    nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
)  # fmt: skip
backbone.out_channels = 32
detector = FCOS(
    backbone,
    num_classes=2,
    anchor_generator=AnchorGenerator(((8,),), ((1.0,),)),
    min_size=160,
    max_size=160,
    image_mean=[0.4] * 3,
    image_std=[0.2] * 3,
)
detector.train()
adam = torch.optim.Adam(detector.parameters(), lr=2e-3)
for _ in range(40):
    image, target = crop(int(torch.randint(0, 130, ())), int(torch.randint(0, 60, ())))
    losses = detector(list(image), [target])
    adam.zero_grad()
    sum(losses.values()).backward()
    adam.step()
print({name: round(value.item(), 2) for name, value in losses.items()})

# %%
# The detector as a term
# ----------------------
# ``label`` is the detector's own list of targets; ``output`` adds up the losses that it returns.

loss = LossSum(
    mse=Fidelity(nn.MSELoss()),
    detection=TaskOrientedLoss(
        detector,
        None,
        preprocess=lambda x: list(x.expand(-1, 3, -1, -1)),
        output=lambda losses: sum(losses.values()),
    ),
)
reference, target = crop(20, 200)
reference = reference[:, :1]
x_hat = reference + 0.1 * torch.randn(reference.shape)
maps = gradient_maps(loss, x_hat, reference=reference, label=[target])
region = torch.zeros_like(reference)
for left, top, right, bottom in target["boxes"].int().tolist():
    region[..., top:bottom, left:right] = 1
figure = plot_gradient_maps(maps, roi=region, titles={"mse": "MSE"})

# %%
# The outlines are the boxes. MSE asks for changes wherever there is noise, the detector where its boxes would move.

for name, focus in maps.focus(region).items():
    print(f"{name}: {focus.share:.0%} of the gradient's energy in the boxes, {focus.ratio:.1f} times their area")
