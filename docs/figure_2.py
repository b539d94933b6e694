"""The picture of the README and the start page: the paper's Fig. 2, drawn by the library on committed example data.

    python -m docs.figure_2            # docs/images/fig2.npz -> fig2.png, fig2.json
    python -m docs.figure_2 --data     # make fig2.npz anew: phantoms, low dose, a U-Net, a denoiser (some minutes)

The data are one slice of a seeded phantom in HU (normal dose, low dose denoised, liver) and the U-Net's weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from examples.tod_net_ct.dose import ParallelBeam, to_hu, to_unit
from examples.tod_net_ct.dose.simulate import low_dose
from examples.tod_net_ct.networks.perceptual import efficientnet_lite0
from examples.tod_net_ct.scans import abdominal_phantom, organ_mask
from taskloss import (
    Fidelity,
    GradientMaps,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    gradient_maps,
    plot_gradient_maps,
)

IMAGES = Path(__file__).parent / "images"
WINDOW_HU = (-200.0, 200.0)
VOXEL_MM = (12.0, 2.0, 2.0)
SHAPE = (6, 160, 208)
I0_PHOTONS = 4e3  # about 60 HU of noise in the liver: a low dose that one sees


def unet() -> nn.Module:
    """A small 2-D U-Net with two classes."""
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(8, 8, 16, 32, 32, 8))


def draw() -> None:
    """From the committed data to the picture and its numbers."""
    with np.load(IMAGES / "fig2.npz") as stored:
        images = {name: torch.from_numpy(stored[name].astype("float32")) for name in ("reference_hu", "x_hat_hu")}
        liver = torch.from_numpy(stored["liver"]).long()[None]
        network = unet()
        network.load_state_dict({k: torch.from_numpy(stored[f"unet/{k}"]).float() for k in network.state_dict()})
    reference, x_hat = (to_unit(image, WINDOW_HU)[None, None] for image in images.values())
    maps, prediction = maps_of(network, x_hat, reference, liver)
    titles = {"mse": "MSE", "l1": "L1", "perceptual": "perceptual", "task": "task (segmentation)"}
    figure = plot_gradient_maps(maps, prediction=prediction, roi=liver, titles=titles)
    figure.savefig(IMAGES / "fig2.png", dpi=110, metadata={"Software": None})
    focus = {name: {"share": found.share, "ratio": found.ratio} for name, found in maps.focus(liver).items()}
    (IMAGES / "fig2.json").write_text(json.dumps(focus, indent=1) + "\n")


def maps_of(network: nn.Module, x_hat: Tensor, reference: Tensor, liver: Tensor) -> tuple[GradientMaps, Tensor]:
    """The gradients of the paper's four losses at one restored slice, and T's output."""
    loss = LossSum(
        mse=Fidelity(nn.MSELoss()),
        l1=Fidelity(nn.L1Loss()),
        perceptual=TaskConsistencyLoss(
            efficientnet_lite0(),
            nn.MSELoss(),
            layers=["blocks.1", "blocks.2"],
            preprocess=lambda x: x.expand(-1, 3, -1, -1) * 2 - 1,
        ),
        task=TaskOrientedLoss(network, nn.CrossEntropyLoss()),
    )
    with torch.no_grad():
        prediction = network.eval()(x_hat)
    return gradient_maps(loss, x_hat, reference=reference, label=liver), prediction


def make_data(n_patients: int = 60, steps: int = 600) -> None:
    """Phantoms, low dose, a U-Net trained on normal dose, a denoiser trained with MSE; the last patient is kept."""
    torch.manual_seed(0)
    beam = ParallelBeam(SHAPE[1:], 360, VOXEL_MM[2])
    clean, liver, low = [], [], []
    for seed in range(n_patients):
        phantom = abdominal_phantom(seed, SHAPE, VOXEL_MM)
        noisy = low_dose(phantom.volume_hu, VOXEL_MM, I0_PHOTONS, generator=seed, beam=beam)
        clean.append(to_unit(phantom.volume_hu, WINDOW_HU))
        low.append(to_unit(noisy.volume_hu, WINDOW_HU))
        liver.append(organ_mask(phantom.label, "liver"))
    normal, degraded, mask = (torch.cat(part)[:, None] for part in (clean, low, liver))
    train, kept = slice(0, (n_patients - 1) * SHAPE[0]), (n_patients - 1) * SHAPE[0] + 4
    segmenter = fit(
        unet(),
        normal[train] + 0.02 * torch.randn(normal[train].shape),
        mask[train][:, 0].long(),
        nn.CrossEntropyLoss(),
        steps,
    )
    denoiser = nn.Sequential(
        nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.Conv2d(24, 24, 5, padding=2), nn.ReLU(),
        nn.Conv2d(24, 1, 5, padding=2),
    )  # fmt: skip
    fit(denoiser, degraded[train], normal[train], nn.MSELoss(), steps // 2)
    with torch.no_grad():
        x_hat = denoiser(degraded[kept : kept + 1]).clamp(0, 1)
    arrays = {
        "reference_hu": to_hu(normal[kept, 0], WINDOW_HU).round().numpy().astype("int16"),
        "x_hat_hu": to_hu(x_hat[0, 0], WINDOW_HU).round().numpy().astype("int16"),
        "liver": mask[kept, 0].numpy(),
    }
    weights = {f"unet/{k}": v.numpy().astype("float16") for k, v in segmenter.state_dict().items()}
    np.savez_compressed(IMAGES / "fig2.npz", **arrays, **weights)


def fit(network: nn.Module, images: Tensor, targets: Tensor, criterion: nn.Module, steps: int) -> nn.Module:
    """Train on random slices."""
    adam = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        index = torch.randint(0, len(images), (4,))
        adam.zero_grad()
        value = criterion(network(images[index]), targets[index])
        value.backward()
        adam.step()
        schedule.step()
        if step % 50 == 0:
            print(step, f"{value.item():.4f}", flush=True)
    return network.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="store_true", help="make the data anew")
    if parser.parse_args().data:
        make_data()
    draw()
