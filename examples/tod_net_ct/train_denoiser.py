"""Stage 4: the denoisers. One loop for all of them; only the loss differs."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientBalancer,
    LossSum,
    TaskOrientedLoss,
    WassersteinCritic,
    WeightClipping,
    gradient_maps,
)

from .data import Cases
from .networks import Denoiser, save_checkpoint
from .settings import Settings
from .stage import begin, digest, finish, is_done, progress, write_text
from .train_task import dice_loss, endless, load_task


def loss_of(name: str, settings: Settings, critic: WassersteinCritic, task_model: nn.Module) -> LossSum:
    """The denoiser's loss: Eq. 8 of the paper for TOD-Net, the same without the task for MSE-WGAN."""
    terms = {"adv": settings.weight_adv * AdversarialLoss(critic)}
    if name == "tod_net":
        terms["task"] = settings.weight_task * TaskOrientedLoss(task_model, dice_loss())
    terms["mse"] = settings.weight_mse * Fidelity(nn.MSELoss())
    return LossSum(**terms)


def train_denoiser(name: str, settings: Settings, run: Path) -> Path:
    """Train one denoiser and write ``denoisers/<name>/best.pt`` (best on validation), ``half.pt`` (halfway, for
    Fig. 2) and ``log.csv`` (every term, its effective weight and gradient norm at x_hat).
    """
    folder = run / "denoisers" / name
    names = (
        "seed", "width", "norm", "critic_channels", "steps", "batch", "optimizer", "learning_rate",
        "decay_learning_rate", "clip", "weight_adv", "weight_mse", "balance", "share_adv",
        "share_mse", "validate_every",
    )  # fmt: skip
    facts: dict[str, Any] = {field: getattr(settings, field) for field in names}
    facts |= {"denoiser": name, "low_dose": digest(run / "low_dose" / "manifest.json")}
    if name == "tod_net":
        facts |= {field: getattr(settings, field) for field in ("weight_task", "share_task")}
        facts |= {"task": digest(run / "task" / "unet.pt")}
    if is_done(folder, facts):
        return folder

    begin(folder)
    torch.manual_seed(settings.seed)  # the same initial weights, whatever the loss
    denoiser = Denoiser(settings.width, norm=settings.norm).to(memory_format=torch.channels_last_3d)
    critic = WassersteinCritic(
        patch_size=settings.shape, channels=settings.critic_channels, constraint=WeightClipping(settings.clip)
    )
    loss = loss_of(name, settings, critic, load_task(settings, run))
    shares = {"adv": settings.share_adv, "task": settings.share_task, "mse": settings.share_mse}
    balancer = GradientBalancer(loss, shares={term: shares[term] for term in loss.weights})
    opt_g, opt_d = (_optimizer(network, settings) for network in (denoiser, critic))
    schedule = (
        torch.optim.lr_scheduler.CosineAnnealingLR(opt_g, settings.steps) if settings.decay_learning_rate else None
    )

    best = float("inf")
    log: list[dict[str, float]] = []
    batches = endless(Cases(run, "train"), settings.batch, settings.seed)
    steps = progress(range(1, settings.steps + 1), f"train {name}", settings.steps)
    for step, (low, normal, mask) in zip(steps, batches, strict=False):
        x_hat = denoiser(low.to(memory_format=torch.channels_last_3d))
        game = critic.step(opt_d, x_hat.detach(), normal)
        opt_g.zero_grad()
        if settings.balance:
            value = balancer.backward(x_hat, reference=normal, label=mask)
        else:
            value = loss.breakdown(x_hat, reference=normal, label=mask)
            value.total.backward()
        opt_g.step()
        if schedule is not None:
            schedule.step()
        row = {"step": step, **value.floats("g/"), **game.floats("d/")}
        if step % settings.validate_every == 0 or step == 1:
            maps = gradient_maps(loss, x_hat, reference=normal, label=mask)
            row |= {f"norm/{term}": norm for term, norm in maps.norms().items()}
            row |= {f"weight/{term}": weight for term, weight in value.weights.items()}
        if step % settings.validate_every == 0 or step == settings.steps:
            row["validation/mse"] = score = validate(denoiser, run)
            if score < best:
                best = score
                save_checkpoint(folder / "best.pt", denoiser, denoiser=name, seed=settings.seed, step=step)
        if step == (settings.steps + 1) // 2:
            save_checkpoint(folder / "half.pt", denoiser, denoiser=name, seed=settings.seed, step=step)
        log.append(row)
    write_text(folder / "log.csv", _as_csv(log))
    finish(folder, facts, best_validation_mse=best, digest=digest(folder / "best.pt"))
    return folder


@torch.no_grad()
def validate(denoiser: nn.Module, run: Path) -> float:
    """Mean squared error on the validation cases: the rule that picks every denoiser's weights."""
    denoiser.eval()
    cases = Cases(run, "validation")
    errors = []
    for i in range(len(cases)):
        low, normal, _ = cases[i]
        errors.append(float((denoiser(low[None]).clamp(0, 1) - normal).square().mean()))
    denoiser.train()
    return sum(errors) / len(errors)


def _optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer not in ("adam", "rmsprop"):
        raise ValueError(f"optimizer: expected adam or rmsprop, got {settings.optimizer!r}; --set optimizer=rmsprop")
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.RMSprop
    return kind(network.parameters(), lr=settings.learning_rate)


def _as_csv(rows: list[dict[str, float]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
