"""Every number of a run in one place, and the presets that people start from."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

DENOISERS = ("mse_wgan", "tod_net")
ALL_TASK_NETWORKS = ("unet", "vnet", "res_unet", "vox_resnet")


@dataclass(frozen=True)
class Settings:
    """What a run does; every field can be given on the command line as ``--set field=value``.

    Units are in the names. Fields where the paper and its published code differ say which is followed.
    """

    seed: int = 0

    # Data: phantoms, unless ``data`` names a folder of scans (LiTS, KiTS, MSD, scan + mask, DICOM, or dose pairs).
    data: str = ""
    organ: str = "liver"
    n_train: int = 400  # 0 for scans: split all of them by patient, as ``split`` says
    n_validation: int = 12
    n_test: int = 40
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)  # LiTS in the paper; KiTS: 0.6, 0.2, 0.2
    reuse: bool = False  # patients may serve in several splits where there are too few: for trying out only
    shape: tuple[int, int, int] = (16, 64, 64)  # slices, rows, columns of a training sub-volume
    overlap: float = 0.5  # of neighbouring sub-volumes along the body; the paper says overlapping, not by how much
    voxel_mm: tuple[float, float, float] = (6.0, 6.0, 6.0)

    # Low dose
    i0_photons: float = 1.5e4
    electronic_noise_photons: float = 3.2
    kernel: str = "ramp"  # on a coarse grid a soft kernel would need photon starvation for the same noise
    n_views: int = 96
    bowtie: bool = False  # less fluence towards the body's sides
    dose_fraction: float = 0.0  # if positive, scans are noisy at i0_photons and this share of their dose is left
    route: str = "fast"  # or "catsim": a full scanner simulation, about half a minute a slice
    jobs: int = 1  # processes that simulate

    # Task networks: Dice loss on normal dose. All judge; those in ``guides`` also guide TOD-Net.
    task_networks: tuple[str, ...] = ("unet",)
    guides: tuple[str, ...] = ("unet",)
    task_width: int = 8
    task_steps: tuple[int, ...] = (2000,)  # one for all task networks, or one for each
    task_batch: int = 4
    task_learning_rate: float = 3e-3
    dice: str = "batch"  # Dice over the whole batch, as in the published code; or "sample"

    # Denoisers: the same optimiser, schedule, steps and balancing for all; only the loss differs
    denoisers: tuple[str, ...] = DENOISERS
    width: int = 4  # the paper: 32
    norm: str = "instance"  # as in the published code; the paper does not say
    final_activation: str = "none"  # the published code: tanh, which cannot pass a clean image
    critic_channels: tuple[int, int, int] = (8, 16, 32)  # the paper: 32, 64, 128
    critic_norm: str = "batch"  # the paper; "instance" or "none" make several processes equal one
    critic_steps: int = 1  # per step of the denoiser, as in the published code; WGAN-GP papers take 4
    clip: float = 0.01
    clip_norm_layers: bool = True  # the published code clamps the scales of batch norm too
    penalty_weight: float = 10.0  # of the gradient penalty (VGG-WGAN, SA-WGAN)
    perceptual_network: str = "efficientnet"  # or "vgg19", the original's, which downloads its weights
    start_from: str = ""  # a checkpoint of TOD-Net's denoiser to go on from (fine-tuning on another scanner)
    steps: int = 250
    epochs: int = 0  # if positive, takes the place of steps
    batch: int = 2  # over all processes together
    optimizer: str = "adam"  # the paper: rmsprop
    learning_rate: float = 2e-3  # the paper: 5e-4
    decay_learning_rate: bool = True  # cosine to zero; the paper keeps it constant
    balance: bool = True  # shares of the gradient norm at x_hat in place of the weights
    weight_adv: float = 1.0
    weight_task: float = 1.0
    weight_mse: float = 0.5  # the paper's lambda
    weight_perceptual: float = 0.1  # of the WGAN-VGG paper
    share_adv: float = 0.3
    share_task: float = 2.0
    share_mse: float = 1.0
    share_perceptual: float = 1.0
    tuned: tuple[str, ...] = ()  # what a denoiser has of its own, as in vgg_wgan@share_adv=0.03; see `study --tune`
    validate_every: int = 50
    save_every: int = 50  # steps between checkpoints from which a killed run resumes
    select_best: str = "mse"  # on validation; the paper does not say which performance; or "dice", of the first guide

    # Machine: Lightning Fabric's words
    accelerator: str = "auto"
    devices: str = "auto"
    nodes: int = 1
    precision: str = "32-true"  # "bf16-mixed", "16-mixed" where the hardware has it
    compile: bool = False
    recompute: bool = False  # the denoiser's activations in the backward pass: less memory for more time
    workers: int = 0  # processes that load batches

    def with_overrides(self, overrides: Mapping[str, str]) -> Settings:
        """These settings with some fields read from text.

        Raises:
            ValueError: for a field that does not exist (the nearest is offered) or text of the wrong type.
        """
        hints = typing.get_type_hints(Settings)
        values: dict[str, Any] = {}
        for name, text in overrides.items():
            if name not in hints:
                close = difflib.get_close_matches(name, hints, n=1)
                offer = f"did you mean {close[0]!r}?" if close else "see examples/tod_net_ct/run/settings.py"
                raise ValueError(f"--set {name}: there is no such setting; {offer}")
            values[name] = _parse(name, text, hints[name])
        return replace(self, **values)

    def steps_of(self, task_network: str) -> int:
        """How long a task network is trained."""
        if len(self.task_steps) == 1:
            return self.task_steps[0]
        if len(self.task_steps) != len(self.task_networks) or task_network not in self.task_networks:
            raise ValueError(
                f"task_steps: expected one number, or one for each of {', '.join(self.task_networks)}; "
                f"got {len(self.task_steps)}; --set task_steps=2000"
            )
        return self.task_steps[self.task_networks.index(task_network)]

    def total_steps(self, n_train: int) -> int:
        """Steps of a denoiser's training: given, or as many as the epochs over `n_train` sub-volumes need."""
        return self.epochs * -(-n_train // self.batch) if self.epochs else self.steps

    def to_yaml(self) -> str:
        """The settings as a file that ``--config`` reads."""
        import yaml

        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        text: str = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)
        return text

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)


PRESETS: dict[str, Settings] = {
    "smoke": Settings(
        n_train=4, n_validation=2, n_test=3, task_networks=("unet", "vox_resnet"), task_steps=(6,), steps=4,
        validate_every=2, save_every=2, width=2, task_width=4, critic_channels=(2, 4, 4), n_views=60,
    ),
    "demo": Settings(),
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


def from_yaml(path: Path, settings: Settings) -> Settings:
    """Settings with the fields of a YAML file in place of theirs.

    Raises:
        ValueError: the file is missing or no mapping, or a field is unknown or of the wrong type.
    """
    import yaml

    try:
        fields_ = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected a YAML file of settings; {str(error).splitlines()[0]}") from error
    if not isinstance(fields_, dict):
        raise ValueError(f"{path}: expected lines like 'steps: 500', got a {type(fields_).__name__}")
    try:
        return settings.with_overrides({name: _as_text(value) for name, value in fields_.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('--set ')}") from error


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _parse(name: str, text: str, kind: Any) -> Any:
    expected = getattr(kind, "__name__", str(kind))
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            # a plus parts names, but not within a name that carries settings, as in tod_net@guides=unet+vnet
            between = ("+" if "@" not in text else ",") if inner[0] is str else "x"
            parts = [part for part in text.replace(between, ",").split(",") if part]
            if len(inner) > 1 and inner[1] is not Ellipsis and len(parts) != len(inner):
                raise ValueError
            return tuple(inner[0](part) for part in parts)
        return kind(text)
    except (ValueError, KeyError) as error:
        expected = str(kind) if typing.get_origin(kind) else expected
        raise ValueError(
            f"--set {name}: expected {expected}, got {text!r}; for example {name}={_example(name)}"
        ) from error


def _example(name: str) -> str:
    value = next(f.default for f in fields(Settings) if f.name == name)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
