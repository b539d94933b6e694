r"""
What four losses ask of one image
=================================

Every loss reaches the restorer through one thing: its gradient at the restored image. Drawn side by side, the gradients
of MSE, L1, a perceptual and a task loss show how little they have in common. This is Fig. 2 of
:cite:t:`zhang2021task`, here on a photograph of coins that scikit-image ships.
"""

# %%
# A task: where are the coins?
# ----------------------------
# A small network learns to find them on half of the picture; the other half is for us to look at. The label comes from
# a threshold after smoothing, good enough to learn from.

import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage import data, filters
from torch import nn

from taskloss import Fidelity, LossSum, TaskConsistencyLoss, TaskOrientedLoss, gradient_maps, plot_gradient_maps

picture = data.coins().astype("float32") / 255
picture = picture - ndimage.gaussian_filter(picture, 40) + 0.4  # the light falls off to one side
mask = ndimage.binary_fill_holes(ndimage.binary_opening(filters.gaussian(picture, 2) > 0.42, iterations=3))
clean = torch.from_numpy(picture)[None, None, :296, :368]
label = torch.from_numpy(mask)[None, :296, :368].long()

segmenter = nn.Sequential(
    nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(),
    nn.Conv2d(12, 12, 3, padding=2, dilation=2), nn.ReLU(),
    nn.Conv2d(12, 12, 3, padding=4, dilation=4), nn.ReLU(),
    nn.Conv2d(12, 2, 1),
)  # fmt: skip
adam = torch.optim.Adam(segmenter.parameters(), lr=1e-2)
for _ in range(60):
    rows = torch.randint(0, 296 - 128, ()).item()
    noisy = clean[..., rows : rows + 128, :184] + 0.05 * torch.randn(1, 1, 128, 184)
    task_loss = F.cross_entropy(segmenter(noisy), label[:, rows : rows + 128, :184])
    adam.zero_grad()
    task_loss.backward()
    adam.step()
print(f"cross-entropy {task_loss.item():.2f}")

# %%
# A restored image
# ----------------
# Noise, and the mildest of denoisers: a Gaussian filter. What it leaves is what the losses complain about.

reference, roi = clean[..., :184, 184:], label[:, :184, 184:]
noisy = reference + 0.15 * torch.randn(reference.shape)
x_hat = torch.from_numpy(ndimage.gaussian_filter(noisy.numpy(), (0, 0, 1.2, 1.2)))

# %%
# Four terms, four gradients
# --------------------------
# Four kinds of loss are one sum of named terms. The perceptual term compares features of the same network.

loss = LossSum(
    mse=Fidelity(nn.MSELoss()),
    l1=Fidelity(nn.L1Loss()),
    perceptual=TaskConsistencyLoss(segmenter, nn.MSELoss(), layers=["3"]),
    task=TaskOrientedLoss(segmenter, nn.CrossEntropyLoss()),
)
maps = gradient_maps(loss, x_hat, reference=reference, label=roi)
figure = plot_gradient_maps(
    maps, prediction=loss.terms["task"].predict(x_hat), roi=roi, titles={"mse": "MSE", "l1": "L1"}
)

# %%
# The numbers behind the picture: how long each gradient is, and whether two of them agree.

for name, norm in maps.norms().items():
    print(f"{name:12s} norm {norm:.1e}, cosine with MSE {maps.cosines()[name]['mse']:+.2f}")
