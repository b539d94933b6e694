"""Every denoiser by name: its network, its critic and its loss. What is not said here, all of them share.

A name may carry changed settings, as in ``tod_net@balance=false`` or ``tod_net@guides=unet+vnet;share_task=4``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientPenalty,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    Term,
    WassersteinCritic,
    WeightClipping,
    soft_kl,
)

from ..dose import WINDOW_HU, to_unit
from ..inference import denoise_volume, keep_outside
from ..networks import (
    Denoiser,
    SelfAttentionDenoiser,
    ThreeLayerCNN,
    as_slices,
    bm3d,
    critic_network,
    load_denoiser,
    non_local_means,
    perceptual_loss,
)
from ..run import Settings, check_intact, load_tensors, results_of
from .autoencoder import load_autoencoder
from .task_network import dice_loss, load_task


@dataclass(frozen=True)
class Recipe:
    """What one denoiser does not share with the others."""

    title: str
    terms: tuple[str, ...]
    constraint: str = "clip"  # of the critic: "clip" (WGAN) or "penalty" (WGAN-GP)
    network: str = "tod_net"  # or "sacnn", "cnn"

    @property
    def is_guided(self) -> bool:
        """Whether one of its terms looks through a task network."""
        return not {"task", "consistency"}.isdisjoint(self.terms)


RECIPES = {
    "tod_net": Recipe("TOD-Net", ("adv", "task", "mse")),
    "mse_wgan": Recipe("MSE-WGAN", ("adv", "mse")),
    "vgg_wgan": Recipe("VGG-WGAN", ("adv", "perceptual"), constraint="penalty"),
    # MSE beside the autoencoder's distance, as its first author's published script and the public port have it
    "sa_wgan": Recipe("SA-WGAN", ("adv", "autoencoder", "mse"), constraint="penalty", network="sacnn"),
    "mse": Recipe("MSE", ("mse",)),
    "sacnn_mse": Recipe("SACNN, MSE", ("mse",), network="sacnn"),
    "cnn_mse": Recipe("CNN, MSE", ("mse",), network="cnn"),
    "label_free": Recipe("TOD-Net, label-free", ("adv", "consistency", "mse")),
}
FILTERS: dict[str, tuple[str, Callable[[Tensor, float], Tensor]]] = {
    "nlm": ("Non-local means", non_local_means),
    "bm3d": ("BM3D", bm3d),
}


def parse(name: str, settings: Settings) -> tuple[str, Settings]:
    """A denoiser's name without its changes, and the settings with what was tuned for it, then with its changes.

    Raises:
        ValueError: the denoiser or a changed setting does not exist.
    """
    kind, _, changes = name.partition("@")
    if kind not in RECIPES and kind not in FILTERS:
        raise ValueError(f"denoisers: expected some of {', '.join((*RECIPES, *FILTERS))}; got {name!r}")
    tuned = [entry.partition("@")[2] for entry in settings.tuned if entry.partition("@")[0] == kind]
    items = [item.partition("=") for item in ";".join([*tuned, changes]).split(";") if item]
    return kind, settings.with_overrides({field: value for field, _, value in items})


def network_of(recipe: Recipe, settings: Settings) -> nn.Module:
    """A new denoiser; `width` scales every kind of network by the same factor from its paper's size."""
    if recipe.network in ("sacnn", "cnn"):
        sacnn = recipe.network == "sacnn"
        network = SelfAttentionDenoiser(max(1, settings.width // 2)) if sacnn else ThreeLayerCNN(2 * settings.width)
        if settings.start_from:
            network.load_state_dict(load_tensors(Path(settings.start_from)))
        return network
    denoiser = Denoiser(settings.width, norm=settings.norm, final_activation=settings.final_activation)
    if settings.recompute and settings.norm == "batch":
        raise ValueError("recompute: batch norm would count every batch twice; --set norm=instance, or recompute=false")
    denoiser.recompute = settings.recompute
    if settings.start_from:
        trained = load_denoiser(settings.start_from)
        if trained.config != denoiser.config:
            raise ValueError(f"start_from: {settings.start_from} has {trained.config}, the settings {denoiser.config}")
        denoiser.load_state_dict(trained.state_dict())
    return denoiser


def critic_of(recipe: Recipe, settings: Settings) -> WassersteinCritic | None:
    """The recipe's critic; None where no term is adversarial."""
    if "adv" not in recipe.terms:
        return None
    patch, channels = settings.seen_shape, settings.critic_channels
    if recipe.constraint == "penalty":  # a penalty needs a critic whose samples do not mix: no batch norm
        network = critic_network(patch, channels, "none")
        return WassersteinCritic(network=network, constraint=GradientPenalty(settings.penalty_weight))
    constraint = WeightClipping(settings.clip, skip_norm=not settings.clip_norm_layers)
    if settings.critic_norm != "batch":
        return WassersteinCritic(network=critic_network(patch, channels, settings.critic_norm), constraint=constraint)
    return WassersteinCritic(patch_size=patch, channels=channels, constraint=constraint)


def loss_of(recipe: Recipe, settings: Settings, run: Path, critic: WassersteinCritic | None) -> LossSum:
    """The denoiser's loss: Eq. 8 of the paper for TOD-Net, the same without the task for MSE-WGAN."""

    def term(name: str) -> tuple[float, Term]:
        if name == "adv":
            assert critic is not None
            return settings.weight_adv, AdversarialLoss(critic)
        if name == "mse":
            return settings.weight_mse, Fidelity(nn.MSELoss())
        if name == "task":
            guides = [load_task(settings, run, guide) for guide in settings.guides]
            return settings.weight_task, TaskOrientedLoss(guides, dice_loss(settings.dice))
        if name == "consistency":
            guide = load_task(settings, run, settings.guides[0])
            return settings.weight_task, TaskConsistencyLoss(guide, soft_kl)
        if name == "autoencoder":
            encode = load_autoencoder(run).encode
            return settings.weight_perceptual, TaskConsistencyLoss(encode, nn.MSELoss(), preprocess=as_slices)
        perceptual = perceptual_loss(settings.perceptual_network)
        if perceptual is None:
            raise ValueError("vgg_wgan: needs an ImageNet network; pip install 'taskloss[ct]'")
        return settings.weight_perceptual, perceptual

    terms = {name: term(name) for name in recipe.terms}
    return LossSum(**{name: weight * part for name, (weight, part) in terms.items()})


SHARES = {
    "adv": "share_adv", "mse": "share_mse", "task": "share_task", "consistency": "share_task",
    "perceptual": "share_perceptual", "autoencoder": "share_perceptual",
}  # fmt: skip


def shares_of(recipe: Recipe, settings: Settings) -> dict[str, float]:
    """Each term's share of the gradient norm at x_hat."""
    return {name: getattr(settings, SHARES[name]) for name in recipe.terms}


def restorer(
    name: str, settings: Settings, run: Path, device: str | torch.device = "cpu"
) -> Callable[[Tensor], Tensor]:
    """A trained denoiser as a function from a volume `(D, H, W)` in HU to its like."""
    kind, settings = parse(name, settings)
    folder = run / "denoisers" / name
    check_intact(folder)
    if kind in FILTERS:
        sigma = results_of(folder)["sigma"]
        return lambda volume_hu: restore(lambda unit: FILTERS[kind][1](unit, sigma), volume_hu)
    if RECIPES[kind].network == "tod_net":
        denoiser = load_denoiser(folder / "best.pt")
        return lambda volume_hu: denoise_volume(denoiser, volume_hu, WINDOW_HU, device=device)
    network = network_of(RECIPES[kind], settings)
    network.load_state_dict(load_tensors(folder / "best.pt"))
    network.eval().to(device)
    return lambda volume_hu: restore(lambda unit: slide(network, unit, settings.seen_shape, device), volume_hu)


@torch.no_grad()
def slide(network: nn.Module, unit: Tensor, patch: tuple[int, int, int], device: str | torch.device) -> Tensor:
    """A network over a volume of any size, in patches of its training size (MONAI's sliding window)."""
    if tuple(unit.shape) == tuple(patch):
        return network(unit[None, None].to(device))[0, 0].cpu()
    from monai.inferers import SlidingWindowInferer

    fitting = [min(side, n) for side, n in zip(patch, unit.shape, strict=True)]  # else it would pad with air
    infer = SlidingWindowInferer(fitting, overlap=0.25, mode="gaussian", sw_device=device, device="cpu")
    restored: Any = infer(unit[None, None], network)  # MONAI: as many tensors as the network gives
    return restored[0, 0]


def restore(network: Callable[[Tensor], Tensor], volume_hu: Tensor) -> Tensor:
    """Apply a function on [0, 1] to a volume in HU; what lies outside the window is treated as in `denoise_volume`."""
    return keep_outside(volume_hu, network(to_unit(volume_hu)), WINDOW_HU)
