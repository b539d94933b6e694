"""How the names of denoisers, networks and numbers are printed."""

from __future__ import annotations

from ..training import FILTERS, RECIPES

TITLES = {
    "none": "No denoiser",
    "oracle": "Trained on low dose (oracle)",
    "normal_dose": "Normal dose",
    "low_dose": "Low dose",
    "unet": "U-Net",
    "vnet": "V-Net",
    "res_unet": "Res-U-Net",
    "vox_resnet": "Vox-ResNet",
    "mse": "MSE",
    "l1": "L1",
    "adv": "adversarial",
    "ssim": "SSIM (%)",
    "rmse_hu": "RMSE (HU)",
    "psnr_db": "PSNR (dB)",
    "dice": "Dice (%)",
    "surface_mm": "surface distance (mm)",
}


def title(name: str) -> str:
    """How a name in the settings is printed: ``TOD-Net``, ``TOD-Net (balance=false)``, ``U-Net``."""
    kind, _, changes = name.partition("@")
    if kind in RECIPES or kind in FILTERS:
        words = RECIPES[kind].title if kind in RECIPES else FILTERS[kind][0]
        return f"{words} ({changes.replace(';', ', ')})" if changes else words
    return TITLES.get(name, name.replace("_", " "))


def heading(key: str) -> str:
    """How a column of ``cases.csv`` is printed: `roi_rmse_hu`, `vnet_dice`."""
    for what in ("_ssim", "_rmse_hu", "_psnr_db", "_dice", "_surface_mm"):
        if key.endswith(what):
            whose = {"roi": "ROI", "whole": "whole-image"}.get(key.removesuffix(what)) or title(key.removesuffix(what))
            return f"{whose} {title(what[1:])}"
    network, one_class, name = key.partition("_dice_")
    return f"{title(network)} {title('dice')}, {title(name)}" if one_class else title(key)
