"""Every number of a run in one place, and the presets that people start from."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

DENOISERS = ("mse_wgan", "tod_net")


@dataclass(frozen=True)
class Settings:
    """What a run does; every field can be given on the command line as ``--set field=value``.

    Units are in the names. Fields where the paper and its published code differ say which is followed.
    """

    seed: int = 0

    # Data: phantoms, unless ``data`` names a folder in LiTS or KiTS layout.
    data: str = ""
    organ: str = "liver"
    n_train: int = 400
    n_validation: int = 12
    n_test: int = 40
    shape: tuple[int, int, int] = (16, 64, 64)  # slices, rows, columns of a training volume
    voxel_mm: tuple[float, float, float] = (6.0, 6.0, 6.0)

    # Low dose
    i0_photons: float = 1.5e4
    electronic_noise_photons: float = 3.2
    kernel: str = "ramp"  # on a coarse grid a soft kernel would need photon starvation for the same noise
    n_views: int = 96

    # Task network: Dice loss on normal dose
    task_width: int = 8
    task_steps: int = 2000
    task_batch: int = 4
    task_learning_rate: float = 3e-3

    # Denoisers: the same optimiser, schedule, steps and balancing for all; only the loss differs
    denoisers: tuple[str, ...] = DENOISERS
    width: int = 6  # the paper: 32
    norm: str = "instance"  # as in the published code; the paper does not say
    critic_channels: tuple[int, int, int] = (8, 16, 32)  # the paper: 32, 64, 128
    steps: int = 250
    batch: int = 2
    optimizer: str = "adam"  # the paper: rmsprop
    learning_rate: float = 2e-3  # the paper: 5e-4
    decay_learning_rate: bool = True  # cosine to zero; the paper keeps it constant
    clip: float = 0.01
    weight_adv: float = 1.0
    weight_task: float = 1.0
    weight_mse: float = 0.5  # the paper's lambda
    balance: bool = True  # shares of the gradient norm at x_hat in place of the weights
    share_adv: float = 0.3
    share_task: float = 2.0
    share_mse: float = 1.0
    validate_every: int = 50

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
                offer = f"did you mean {close[0]!r}?" if close else "see examples/tod_net_ct/settings.py"
                raise ValueError(f"--set {name}: there is no such setting; {offer}")
            values[name] = _parse(name, text, hints[name])
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)


PRESETS: dict[str, Settings] = {
    "smoke": Settings(
        n_train=4, n_validation=2, n_test=3, task_steps=6, steps=4, validate_every=2, width=2, task_width=4,
        critic_channels=(2, 4, 4), n_views=60,
    ),
    "demo": Settings(),
}  # fmt: skip


def _parse(name: str, text: str, kind: Any) -> Any:
    expected = getattr(kind, "__name__", str(kind))
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            parts = [p for p in text.replace("x", ",").split(",") if p] if inner[0] is not str else text.split(",")
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
