"""
Volumes, with MONAI
===================

Terms, maps and pictures take volumes as they take images. A MONAI network finds a ball in a noisy volume; the page at
the end scrolls through what each term asks for.
"""

from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from torch import nn

from taskloss import Fidelity, LossSum, TaskOrientedLoss, gradient_maps, plot_gradient_maps

axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (16, 40, 40)), indexing="ij")


def phantom():
    """A body of 0.4 with two organs of 0.6, one of them the task's, at a random place."""
    shift = 0.15 * torch.randn(3)
    far = lambda z, y, x, r: sum(((a - c) / r) ** 2 for a, c in zip(axes, (z, y, x), strict=True)).sqrt()  # noqa: E731
    organ = far(shift[0], -0.2 + shift[1], -0.3 + shift[2], 0.3) < 1
    other = far(-shift[0], 0.3, 0.4, 0.22) < 1
    image = 0.4 * (far(0, 0, 0, 0.9) < 1) + 0.2 * organ + 0.2 * other
    return image[None, None], organ[None, None].long()


network = BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(8, 8, 8, 16, 16, 8))
criterion = DiceCELoss(to_onehot_y=True, softmax=True)
adam = torch.optim.Adam(network.parameters(), lr=5e-3)
for _ in range(60):
    image, label = phantom()
    adam.zero_grad()
    criterion(network(image + 0.1 * torch.randn(image.shape)), label).backward()
    adam.step()

# %%
# The middle of the region is drawn unless another slice is asked for.

reference, label = phantom()
x_hat = reference + 0.1 * torch.randn(reference.shape)
loss = LossSum(mse=0.5 * Fidelity(nn.MSELoss()), l1=Fidelity(nn.L1Loss()), task=TaskOrientedLoss(network, criterion))
maps = gradient_maps(loss, x_hat, reference=reference, label=label)
prediction = loss.terms["task"].predict(x_hat)
figure = plot_gradient_maps(maps, prediction=prediction, roi=label, titles={"mse": "MSE", "l1": "L1"})

# %%
# One page to scroll through
# --------------------------
# ``to_html`` writes a single file that needs no network: slices by wheel or slider, terms by button or arrow key,
# values under the pointer. In a notebook, show it in an ``IFrame``.


class Page:
    """A page within a page."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text()

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.text)}" style="width:100%;height:760px;border:0" title="maps"></iframe>'


with TemporaryDirectory() as folder:
    page = Page(
        maps.to_html(Path(folder) / "maps.html", prediction=prediction, roi=label, titles={"mse": "MSE", "l1": "L1"})
    )
page  # noqa: B018 - shown below
