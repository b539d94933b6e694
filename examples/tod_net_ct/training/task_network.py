"""Stage 3: the task networks, each trained on normal dose with the Dice loss before it judges or guides anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskloss import audit_task_model

from ..inference import segment
from ..metrics import dice
from ..networks import build, load_network, save_network
from ..run import (
    Machine,
    Patches,
    Seed,
    Settings,
    TaskLoss,
    TaskNetworks,
    begin,
    check_intact,
    decisive,
    digest,
    finish,
    is_done,
    load_tensors,
    only,
    progress,
    save_tensors,
)
from ..scans import Cases
from .loop import Board, Point, batches, machine, write_log

FOLDERS = {"normal": "task", "low": "oracle"}  # by the dose that a network was trained on


def dice_loss(kind: str = "batch") -> nn.Module:
    """Eq. 3 of the paper: one minus the foreground's soft Dice, over the batch as in the published code; with several
    classes the mean over them.
    """
    from monai.losses import DiceLoss

    if kind not in ("batch", "sample"):
        raise ValueError(f"dice: expected batch or sample, got {kind!r}; --set dice=batch")
    return DiceLoss(softmax=True, to_onehot_y=True, include_background=False, squared_pred=True, batch=kind == "batch")


def train_task(name: str, settings: Settings, run: Path, fabric: Any = None) -> Path:
    """Write ``task/<name>/weights.pt``, and refuse to go on with a network that the audit finds unfit to guide.

    With ``task_dose="low"`` the same network is trained on low dose and kept in ``oracle/<name>``: it judges nothing,
    but tells what a task can still see in low dose. With ``task_validate_every`` the weights with the best Dice on the
    whole validation volumes are kept, as `log.csv` tells.
    """
    folder, steps = folder_of(name, settings, run), settings.steps_of(name)
    settings = only(settings, Seed, Patches, TaskNetworks, TaskLoss, Machine)
    facts = facts_of(name, settings, steps, run)
    if is_done(folder, facts):
        return folder
    fabric = fabric or machine(settings)
    if fabric.is_global_zero:
        begin(folder, facts)
    fabric.barrier()
    torch.manual_seed(settings.seed)
    train = Cases(run, "train")
    parts = set_up(name, settings, steps, fabric, len(train.class_names))
    point = Point(folder / "last.pt", fabric, network=parts.own, optimizer=parts.optimizer, schedule=parts.schedule)
    start, log, least = point.load()  # the Dice loss on validation, where there is one
    board = Board(folder / "tensorboard", fabric, start)
    stream = batches(train, settings.task_batch, settings, fabric, start)
    for step, (low, normal, mask) in zip(progress(range(start + 1, steps + 1), f"train {name}"), stream, strict=False):
        value = one_step(parts, low if settings.task_dose == "low" else normal, mask)
        if not math.isfinite(value):
            raise FloatingPointError(f"{name}: the Dice loss is {value} at step {step}; lower task_learning_rate")
        log.append({"step": step, "dice_loss": value})
        if settings.task_validate_every and (step % settings.task_validate_every == 0 or step == steps):
            log[-1]["validation_dice"] = score = validation_dice(parts.own, settings, run, fabric.device)
            if 1 - score < least:
                least = 1 - score
                if fabric.is_global_zero:
                    save_tensors(folder / ".best.pt", **parts.own.state_dict())
        board.add(log[-1])
        if step % settings.save_every == 0 and step < steps:
            point.save(step, log, least)
    board.close()
    if fabric.is_global_zero:
        if settings.task_validate_every:
            parts.own.load_state_dict(load_tensors(folder / ".best.pt"))
        keep(name, parts.own, train, settings, folder)
        write_log(folder / "log.csv", log)
        recent = [row["dice_loss"] for row in log[-10:]]
        finish(folder, facts, last_loss=sum(recent) / len(recent), digest=digest(folder / "weights.pt"))
        for path in (point.path, folder / ".best.pt"):
            path.unlink(missing_ok=True)
    fabric.barrier()
    return folder


def facts_of(name: str, settings: Any, steps: int, run: Path) -> dict[str, Any]:
    """What decides the result."""
    facts = decisive(settings) | {"cases": digest(run / "cases" / "manifest.json"), "network": name, "steps": steps}
    return facts | ({"low_dose": digest(run / "low_dose" / "manifest.json")} if settings.task_dose == "low" else {})


@dataclass
class Parts:
    """What a training step works with; `network` runs the weights of `own`, compiled or over processes."""

    own: nn.Module
    network: nn.Module
    optimizer: Any
    schedule: Any
    criterion: nn.Module
    backward: Any  # the machine's, which knows of its precision and its processes


def set_up(name: str, settings: Any, steps: int, fabric: Any, n_classes: int) -> Parts:
    """A new network and its optimiser, on the machine's device."""
    own = build(name, width_of(name, settings), 1 + n_classes).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(own.parameters(), lr=settings.task_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.task_learning_rate, total_steps=steps)
    network, optimizer = fabric.setup(torch.compile(own) if settings.compile else own, optimizer)
    return Parts(own, network, optimizer, schedule, dice_loss(settings.dice), fabric.backward)


def one_step(parts: Parts, image: Tensor, mask: Tensor) -> float:
    """One step; returns the Dice loss, and leaves the weights alone where that is not finite."""
    loss = parts.criterion(parts.network(image.to(memory_format=torch.channels_last_3d)), mask)
    value = float(loss.detach())
    if not math.isfinite(value):
        return value
    parts.optimizer.zero_grad()
    parts.backward(loss)
    parts.optimizer.step()
    parts.schedule.step()
    return value


def keep(name: str, network: nn.Module, train: Cases, settings: Any, folder: Path) -> None:
    """Audit the trained network, which no denoiser's training could do without, and write it."""
    network.cpu().eval()
    _, normal, _ = train[0]
    findings = audit_task_model(network, normal[None])
    if findings:
        raise ValueError(f"{name} is unfit to guide a denoiser: " + "; ".join(map(str, findings)))
    facts = {"voxel_mm": list(settings.voxel_mm), "seed": settings.seed, "class_names": train.class_names}
    save_network(folder / "weights.pt", network, name, width_of(name, settings), **facts)


@torch.no_grad()
def validation_dice(network: nn.Module, settings: Any, run: Path, device: torch.device) -> float:
    """Mean Dice of a task network on the whole validation volumes, at the dose that it is trained on."""
    network.eval()
    cases = Cases(run, "validation")
    overlaps = []
    for i in range(len(cases)):
        normal_hu, low_hu, mask = cases.in_hu(i)
        image = low_hu if settings.task_dose == "low" else normal_hu
        found = segment(network, image, cases.voxel_mm_of(i), settings.voxel_mm, device=device)
        overlaps.append(dice(found, mask))
    network.train()
    return sum(overlaps) / len(overlaps)


# Widths relative to the U-Net's, so that one number sets them all. The published code: 64, 16, 16, 32.
RELATIVE_WIDTH = {"unet": 1.0, "vnet": 0.5, "res_unet": 1.0, "vox_resnet": 1.0}


def width_of(name: str, settings: Any) -> int:
    """A task network's width in its own counting."""
    return max(1, round(settings.task_width * RELATIVE_WIDTH[name]))


def load_task(settings: Settings, run: Path, name: str = "unet") -> nn.Module:
    """A trained task network, in eval mode; with ``task_dose="low"`` the one that was trained on low dose."""
    folder = folder_of(name, settings, run)
    check_intact(folder)
    return load_network(folder / "weights.pt")


def folder_of(name: str, settings: Any, run: Path) -> Path:
    """Where a task network is kept.

    Raises:
        ValueError: the dose that it is trained on is unknown.
    """
    dose = getattr(settings, "task_dose", "normal")  # a denoiser's training knows of its guides alone
    if dose not in FOLDERS:
        raise ValueError(f"task_dose: expected normal or low, got {dose!r}; --set task_dose=normal")
    return run / FOLDERS[dose] / name
