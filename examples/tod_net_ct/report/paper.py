"""What the paper states: its settings (section 3), and the numbers of its three tables, to be read beside a run's."""

from __future__ import annotations

from typing import Any

SOURCE = "Task-Oriented Low-Dose CT Image Denoising (TOD-Net), MICCAI 2021"

SETTINGS: dict[str, Any] = {
    "shape": (32, 256, 256),
    "voxel_mm": (1.0, 1.5, 1.5),
    "task_networks": ("unet", "vox_resnet", "vnet", "res_unet"),
    "guides": ("unet",),
    "denoisers": ("vgg_wgan", "mse_wgan", "sa_wgan", "tod_net"),
    "width": 32,
    "critic_channels": (32, 64, 128),
    "critic_norm": "batch",
    "clip": 0.01,
    "perceptual_network": "vgg19",
    "epochs": 50,
    "batch": 4,
    "optimizer": "rmsprop",
    "learning_rate": 5e-4,
    "decay_learning_rate": False,
    "balance": False,
    "weight_adv": 1.0,
    "weight_task": 1.0,
    "weight_mse": 0.5,
}

QUALITY_COLUMNS = ("ROI SSIM (%)", "ROI RMSE (HU)", "ROI PSNR (dB)", "SSIM (%)", "RMSE (HU)", "PSNR (dB)")
DICE_COLUMNS = ("U-Net", "Vox-ResNet", "V-Net", "Res-U-Net")

# By organ: LiTS is the liver, KiTS the kidney
TABLE_1: dict[str, dict[str, tuple[float, ...]]] = {
    "liver": {
        "VGG-WGAN": (29.5, 53.0, 17.7, 72.3, 32.9, 22.3),
        "MSE-WGAN": (35.1, 41.8, 19.8, 74.7, 31.8, 22.3),
        "SA-WGAN": (37.5, 40.1, 20.1, 73.1, 31.1, 22.7),
        "TOD-Net": (40.7, 35.4, 21.3, 76.7, 28.5, 23.3),
    },
    "kidney": {
        "VGG-WGAN": (46.7, 58.3, 16.9, 67.4, 37.8, 21.1),
        "MSE-WGAN": (50.0, 53.5, 17.6, 65.9, 37.0, 21.9),
        "SA-WGAN": (54.5, 53.7, 18.3, 67.2, 34.9, 22.0),
        "TOD-Net": (61.1, 45.5, 19.0, 69.3, 32.9, 22.0),
    },
}
TABLE_2: dict[str, dict[str, tuple[float, ...]]] = {
    "liver": {
        "No denoiser": (88.75, 79.82, 89.75, 90.36),
        "VGG-WGAN": (92.34, 90.44, 91.21, 91.82),
        "MSE-WGAN": (92.45, 89.49, 91.76, 91.95),
        "SA-WGAN": (92.99, 89.26, 91.37, 91.46),
        "TOD-Net": (93.91, 91.86, 92.44, 92.77),
    },
    "kidney": {
        "No denoiser": (75.30, 43.09, 80.75, 80.57),
        "VGG-WGAN": (89.43, 86.88, 88.06, 89.67),
        "MSE-WGAN": (88.82, 86.58, 88.46, 88.66),
        "SA-WGAN": (88.87, 86.39, 88.66, 88.75),
        "TOD-Net": (90.21, 89.81, 89.83, 90.03),
    },
}
TABLE_3: dict[str, dict[str, tuple[float, ...]]] = {
    "liver": {"No denoiser": (94.33, 92.19, 92.82, 93.51), "TOD-Net": (95.01, 92.43, 93.44, 93.21)},
    "kidney": {"No denoiser": (90.93, 89.39, 89.58, 89.81), "TOD-Net": (91.52, 90.41, 91.37, 91.03)},
}


def paper_tables(organ: str) -> list[tuple[str, tuple[str, ...], dict[str, tuple[float, ...]]]]:
    """Caption, columns and rows of the paper's tables for an organ; none for an organ that it did not study."""
    if organ not in TABLE_1:
        return []
    data = {"liver": "LiTS", "kidney": "KiTS"}[organ]
    return [
        (f"Table 1, image quality, LD-{data}", QUALITY_COLUMNS, TABLE_1[organ]),
        (f"Table 2, Dice (%), LD-{data}", DICE_COLUMNS, TABLE_2[organ]),
        (f"Table 3, Dice (%), {data} at normal dose", DICE_COLUMNS, TABLE_3[organ]),
    ]


def departures(settings: Any) -> list[tuple[str, str, str]]:
    """Every setting that the paper states and this run has otherwise: name, this run's, the paper's."""
    found = []
    for name, stated in SETTINGS.items():
        own = getattr(settings, name)
        same = set(own) == set(stated) if name in ("denoisers", "task_networks", "guides") else own == stated
        if not same:
            found.append((name, _text(own), _text(stated)))
    return found


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
