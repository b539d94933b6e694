"""The settings that people start from, and files of settings that differ from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .parsing import as_text
from .settings import Settings

ALL_TASK_NETWORKS = ("unet", "vnet", "res_unet", "vox_resnet")

PRESETS: dict[str, Settings] = {
    "smoke": Settings(
        n_train=4, n_validation=2, n_test=3, task_networks=("unet", "vox_resnet"), task_steps=(6,), steps=4,
        validate_every=2, save_every=2, width=2, task_width=4, critic_channels=(2, 4, 4), n_views=60,
    ),
    "demo": Settings(  # normal dose as noisy as a real scan's, and voxels that look like CT
        n_train=64, n_validation=4, n_test=10, shape=(16, 128, 128), patch=(16, 64, 64), voxel_mm=(3.0, 3.0, 3.0),
        i0_photons=1e5, dose_fraction=0.05, kernel="hann", n_views=120,
        task_steps=(600,), task_validate_every=100, oracles=("unet",), denoisers=("mse_wgan", "tod_net"),
        steps=120, share_adv=0.003,  # results/tuning.json
    ),
    "study": Settings(
        task_networks=ALL_TASK_NETWORKS, task_steps=(2000, 250, 700, 250),
        denoisers=("mse_wgan", "tod_net", "vgg_wgan", "sa_wgan", "cnn_mse", "nlm"),
        tuned=(  # results/tuning.json
            "vgg_wgan@share_adv=0.003", "mse_wgan@share_adv=0.003", "sa_wgan@share_adv=0.3", "tod_net@share_adv=0.003",
            "label_free@share_adv=0.003",  # TOD-Net without labels has what TOD-Net has
        ),
    ),
    "paper": Settings(  # section 3.3, on scans: --set data=FOLDER
        n_train=0, n_validation=0, n_test=0, shape=(32, 256, 256), voxel_mm=(1.0, 1.5, 1.5),
        i0_photons=3e4, kernel="hann", n_views=720,
        task_networks=ALL_TASK_NETWORKS, task_width=32, task_steps=(12000,), task_learning_rate=1e-3,
        denoisers=("mse_wgan", "tod_net", "vgg_wgan", "sa_wgan"),
        width=32, critic_channels=(32, 64, 128), epochs=50, batch=4, optimizer="rmsprop", learning_rate=5e-4,
        decay_learning_rate=False, balance=False, save_every=200,
    ),
}  # fmt: skip


_MOST_BYTES = 1_000_000  # of a file of settings


def from_yaml(path: Path, settings: Settings) -> Settings:
    """Settings with the fields of a YAML file in place of theirs: flat, or below the names of their groups.

    Raises:
        ValueError: the file is missing or no mapping, or a field is unknown or of the wrong type.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.safe_load(text) if len(text) < _MOST_BYTES else len(text)
    except (OSError, UnicodeDecodeError, RecursionError, ValueError, yaml.YAMLError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: expected a YAML file of settings; {reason}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected lines like 'steps: 500', got a {type(given).__name__}")
    flat: dict[str, str] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": _text(path, inner, part) for inner, part in value.items()}
        else:
            flat[str(name)] = _text(path, name, value)
    try:
        return settings.with_overrides(flat)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('--set ')}") from error


def _text(path: Path, name: Any, value: Any) -> str:
    """A value as `--set` takes it; aliases can make a short file a huge nest, which no setting is."""
    parts = value if isinstance(value, list) else [value]
    got = "a list of other things" if isinstance(value, list) else f"a {type(value).__name__}"
    if not all(isinstance(part, (str, int, float)) for part in parts):
        raise ValueError(
            f"{path}: {str(name)[:80]}: expected a number, a word or a list of them, got {got}; "
            "write for example 'steps: 500' or 'shape: [16, 64, 64]'"
        )
    return as_text(value)
