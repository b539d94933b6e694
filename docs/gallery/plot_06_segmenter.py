"""
A segmenter as guide, before and after
======================================

A U-Net of segmentation_models_pytorch guides a small denoiser. The same denoiser is trained twice from the same weights
on the same noise, with MSE alone and with the task term, and both are looked at through the U-Net.
"""

import matplotlib.pyplot as plt
import segmentation_models_pytorch as smp
import torch
from scipy import ndimage
from skimage import data, filters
from torch import nn

from taskloss import Fidelity, GradientBalancer, LossSum, TaskOrientedLoss

picture = data.coins().astype("float32") / 255
picture = picture - ndimage.gaussian_filter(picture, 40) + 0.4  # the light falls off to one side
mask = ndimage.binary_fill_holes(ndimage.binary_opening(filters.gaussian(picture, 2) > 0.42, iterations=3))
image = torch.from_numpy(picture)[None, None, :288, :384]
label = torch.from_numpy(mask)[None, :288, :384].long()
train, test = (..., slice(0, 192)), (..., slice(192, 384))


def crops(n: int, size: int = 64):
    """Random crops of the left half, with their labels."""
    places = [(int(torch.randint(0, 288 - size, ())), int(torch.randint(0, 192 - size, ()))) for _ in range(n)]
    cut = lambda x: torch.cat([x[..., r : r + size, c : c + size] for r, c in places])  # noqa: E731
    return cut(image[train]), cut(label[train])


unet = smp.Unet(
    "resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 8), in_channels=1, classes=2
)
dice = smp.losses.DiceLoss("multiclass", classes=[1])
adam = torch.optim.Adam(unet.parameters(), lr=2e-3)
for _ in range(40):
    clean, where = crops(4)
    adam.zero_grad()
    dice(unet(clean + 0.05 * torch.randn(clean.shape)), where).backward()
    adam.step()

# %%
# Twice the same training
# -----------------------


def trained(with_task: bool) -> nn.Module:
    """A denoiser; nothing else depends on the losses."""
    torch.manual_seed(0)
    denoiser = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)
    )
    loss = LossSum(mse=Fidelity(nn.MSELoss()))
    if with_task:
        loss = loss + LossSum(task=TaskOrientedLoss(unet, dice))
    balancer = GradientBalancer(loss, shares={"mse": 1.0, "task": 0.5} if with_task else {"mse": 1.0})
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for _ in range(80):
        clean, where = crops(4)
        noisy = clean + 0.25 * torch.randn(clean.shape)
        optimiser.zero_grad()
        balancer.backward(denoiser(noisy), reference=clean, label=where)
        optimiser.step()
    return denoiser.eval()


denoisers = {"MSE": trained(with_task=False), "MSE + task": trained(with_task=True)}

# %%
# The other half of the picture
# -----------------------------
# One picture and one seed are no evidence; :doc:`the study </findings>` is. But this is how one looks at it.

torch.manual_seed(1)
noisy = image[test] + 0.25 * torch.randn(image[test].shape)
shown = {"clean": image[test], "noisy": noisy, **{name: net(noisy) for name, net in denoisers.items()}}
figure, panels = plt.subplots(2, 4, figsize=(11, 8.4), layout="constrained")
unet.eval()
with torch.no_grad():
    for column, (name, x) in zip(panels.T, shown.items(), strict=True):
        seen = unet(x).argmax(1)
        score = 2 * (seen * label[test]).sum() / (seen + label[test]).sum()
        error = (x - image[test]).square().mean().sqrt()
        column[0].imshow(x[0, 0], cmap="gray", vmin=0, vmax=1)
        column[0].set_title(f"{name}\nRMSE {error:.3f}")
        column[1].imshow(seen[0])
        column[1].set_title(f"Dice {score:.3f}")
for panel in panels.flat:
    panel.set_axis_off()
