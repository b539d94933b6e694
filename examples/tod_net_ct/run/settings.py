"""Every number of a run in one place, in groups; and what a stage may read of them."""

from __future__ import annotations

import difflib
import functools
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from typing import Any

from .parsing import parse_text
from .ranges import check_ranges

DENOISERS = ("mse_wgan", "tod_net")


def aside(default: Any) -> Any:
    """A field that says how a result is come by, or is in its stage's facts in another form: it decides nothing."""
    return field(default=default, metadata={"decides": False})


@dataclass(frozen=True)
class Seed:
    """The source of everything that is drawn."""

    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Phantoms, unless `data` names a folder of scans (LiTS, KiTS, MSD, scan + mask, DICOM, or dose pairs).

    Phantoms are free of noise at normal dose, unless a positive `dose_fraction` scans them at `i0_photons` first.
    """

    data: str = ""
    organ: str = "liver"  # classes with + between them, the later inside the earlier: "liver+tumour", or "1,2+2"
    n_train: int = 400  # 0 for scans: split all of them by patient, as `split` says
    n_validation: int = 12
    n_test: int = 40
    assume_hu: bool = False  # take a scan's values for HU although they do not look like them


@dataclass(frozen=True)
class Split:
    """How patients are dealt to training, validation and test; phantoms are numbered."""

    split: tuple[float, float, float] = (0.7, 0.1, 0.2)  # LiTS in the paper; KiTS: 0.6, 0.2, 0.2
    test_patients: tuple[str, ...] = ()  # these by name, and the two below, in place of a draw (cross-validation)
    validation_patients: tuple[str, ...] = ()
    reuse: bool = False  # patients may serve in several splits where there are too few: for trying out only


@dataclass(frozen=True)
class Patches:
    """What training sees of a scan."""

    shape: tuple[int, int, int] = (16, 64, 64)  # slices, rows, columns of a training sub-volume
    patch: tuple[int, int, int] = (0, 0, 0)  # what a step sees of a sub-volume, half of them at the organ; 0: all of it
    overlap: float = 0.5  # of neighbouring sub-volumes along the body; the paper says overlapping, not by how much
    voxel_mm: tuple[float, float, float] = (6.0, 6.0, 6.0)

    @property
    def seen_shape(self) -> tuple[int, int, int]:
        """What a training step sees of a sub-volume: a patch of it, or all."""
        return self.patch if any(self.patch) else self.shape


@dataclass(frozen=True)
class Dose:
    """The low dose that is simulated."""

    i0_photons: float = 1.5e4
    electronic_noise_photons: float = 3.2
    kernel: str = "ramp"  # on a coarse grid a soft kernel would need photon starvation for the same noise
    n_views: int = 96
    bowtie: bool = False  # less fluence towards the body's sides
    dose_fraction: float = 0.0  # if positive, normal dose is noisy at i0_photons and this share of it is left
    route: str = "fast"  # or "catsim": a full scanner simulation, about half a minute a slice


@dataclass(frozen=True)
class Choice:
    """Which networks are trained. All task networks judge; those in `guides` also guide TOD-Net."""

    task_networks: tuple[str, ...] = aside(("unet",))
    task_steps: tuple[int, ...] = aside((2000,))  # one for all task networks, or one for each
    denoisers: tuple[str, ...] = aside(DENOISERS)
    oracles: tuple[str, ...] = aside(())  # task networks that are trained on low dose too: the room there is
    tuned: tuple[str, ...] = aside(())  # what a denoiser has of its own, as in vgg_wgan@share_adv=0.03: `study --tune`

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


@dataclass(frozen=True)
class TaskNetworks:
    """The training of the task networks, with the Dice loss on normal dose."""

    task_width: int = 8
    task_batch: int = 4
    task_learning_rate: float = 3e-3
    task_dose: str = "normal"  # or "low": the same network trained on low dose, which tells what there is to gain
    task_validate_every: int = 0  # if positive, the weights that were best on validation are kept


@dataclass(frozen=True)
class TaskLoss:
    """The task's loss: it trains the task networks, and through those that guide it trains TOD-Net."""

    dice: str = "batch"  # Dice over the whole batch, as in the published code; or "sample"


@dataclass(frozen=True)
class Guidance:
    """What TOD-Net has and its opponents do not."""

    guides: tuple[str, ...] = ("unet",)
    weight_task: float = 1.0
    share_task: float = 2.0


@dataclass(frozen=True)
class Budget:
    """What any denoiser may cost."""

    width: int = 4  # the paper: 32
    steps: int = 250
    epochs: int = 0  # if positive, takes the place of steps
    batch: int = 2  # over all processes together

    def total_steps(self, n_train: int) -> int:
        """Steps of a denoiser's training: given, or as many as the epochs over `n_train` sub-volumes need."""
        return self.epochs * -(-n_train // self.batch) if self.epochs else self.steps


@dataclass(frozen=True)
class Networks:
    """The denoiser, and the critic and the networks that its loss takes."""

    norm: str = "instance"  # as in the published code; the paper does not say
    final_activation: str = "none"  # the published code: tanh, which cannot pass a clean image
    critic_channels: tuple[int, int, int] = (8, 16, 32)  # the paper: 32, 64, 128
    critic_norm: str = "batch"  # the paper; "instance" or "none" make several processes equal one
    critic_steps: int = 1  # per step of the denoiser, as in the published code; WGAN-GP papers take 4
    clip: float = 0.01
    clip_norm_layers: bool = True  # the published code clamps the scales of batch norm too
    penalty_weight: float = 10.0  # of the gradient penalty (VGG-WGAN, SA-WGAN)
    perceptual_network: str = "efficientnet"  # or "vgg19", the original's, which downloads its weights
    start_from: str = aside("")  # a checkpoint of TOD-Net's denoiser to go on from; its digest decides, not its place


@dataclass(frozen=True)
class Training:
    """The same optimiser, schedule and balancing for all denoisers; only the loss differs."""

    optimizer: str = "adam"  # the paper: rmsprop
    learning_rate: float = 2e-3  # the paper: 5e-4
    decay_learning_rate: bool = True  # cosine to zero; the paper keeps it constant
    balance: bool = True  # shares of the gradient norm at x_hat in place of the weights
    weight_adv: float = 1.0
    weight_mse: float = 0.5  # the paper's lambda
    weight_perceptual: float = 0.1  # of the WGAN-VGG paper
    share_adv: float = 0.3
    share_mse: float = 1.0
    share_perceptual: float = 1.0
    validate_every: int = 50
    select_best: str = "mse"  # on validation; the paper does not say which performance; or "dice", of the first guide


@dataclass(frozen=True)
class Machine:
    """Where the work is done, in Lightning Fabric's words; of these only the precision decides what comes out."""

    accelerator: str = aside("auto")
    devices: str = aside("auto")
    nodes: int = aside(1)
    precision: str = "32-true"  # "bf16-mixed", "16-mixed" where the hardware has it
    compile: bool = aside(False)
    recompute: bool = aside(False)  # the denoiser's activations in the backward pass: less memory for more time
    save_every: int = aside(50)  # steps between checkpoints from which a killed run resumes
    workers: int = aside(0)  # processes that load batches
    jobs: int = aside(1)  # processes that simulate


@dataclass(frozen=True)
class Settings(
    Machine, Training, Networks, Budget, Guidance, TaskLoss, TaskNetworks, Choice, Dose, Patches, Split, Data, Seed
):
    """What a run does; every field can be given on the command line as ``--set field=value``, or with its group's name
    as in ``--set dose.n_views=96``.

    Units are in the names. Fields where the paper and its published code differ say which is followed.
    """

    def with_overrides(self, overrides: Mapping[str, str]) -> Settings:
        """These settings with some fields read from text.

        Raises:
            ValueError: for a field that does not exist (the nearest is offered), that another group has, text of the
                wrong type, or a value out of the field's range.
        """
        hints, standard = typing.get_type_hints(Settings), Settings()
        values: dict[str, Any] = {}
        for given, text in overrides.items():
            name = _field_of(given)
            values[name] = parse_text(name, text, hints[name], getattr(standard, name))
        check_ranges(values, standard)
        return replace(self, **values)

    def to_yaml(self) -> str:
        """The settings as a file that ``--config`` reads, a paragraph for each group."""
        import yaml

        def line(name: str) -> str:
            value = getattr(self, name)
            text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
            return f"{name}: {text.removesuffix(f'...{chr(10)}')}"

        return "\n".join(f"# {name}\n" + "".join(line(f.name) for f in fields(group)) for name, group in GROUPS.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


GROUPS: dict[str, type] = {_snake(group.__name__): group for group in reversed(Settings.__bases__)}


def only(settings: Any, *groups: type) -> Any:
    """The fields of these groups and no others. A stage works on what this gives, and `decisive` of the same is in its
    facts: so it cannot read a setting that its manifest does not know.
    """
    together = _together(*groups)
    return together(**{f.name: getattr(settings, f.name) for f in fields(together)})


@functools.cache
def _together(*groups: type) -> Any:
    def reduce(self: Any) -> Any:  # to other processes as its groups and values: they know no class of this name
        return _rebuilt, (groups, {f.name: getattr(self, f.name) for f in fields(self)})

    name = "And".join(group.__name__ for group in groups)
    return make_dataclass(name, [], bases=groups[::-1], frozen=True, namespace={"__reduce__": reduce})


def _rebuilt(groups: tuple[type, ...], values: dict[str, Any]) -> Any:
    return _together(*groups)(**values)


def decisive(settings: Any) -> dict[str, Any]:
    """The fields that decide a result: all but those that are set `aside`."""
    return {f.name: getattr(settings, f.name) for f in fields(settings) if f.metadata.get("decides", True)}


def _field_of(given: str) -> str:
    """The field that a text names, with its group (``dose.n_views``) or without."""
    group, dot, name = given.rpartition(".")
    if dot and group not in GROUPS:
        raise ValueError(f"--set {given}: there is no group {group!r}; expected one of {', '.join(GROUPS)}")
    known = [f.name for f in fields(GROUPS[group] if dot else Settings)]
    if name in known:
        return name
    homes = [home for home, fellow in GROUPS.items() if name in (f.name for f in fields(fellow))]
    if homes:
        raise ValueError(
            f"--set {given}: {name} is in the group {homes[0]}; --set {homes[0]}.{name}=..., or {name}=..."
        )
    close = difflib.get_close_matches(name, known, n=1)
    offer = f"did you mean {close[0]!r}?" if close else "see examples/tod_net_ct/run/settings.py"
    raise ValueError(f"--set {given}: there is no such setting; {offer}")
