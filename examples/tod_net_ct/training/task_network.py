"""Stage 3: the task networks, each trained on normal dose with the Dice loss before it judges or guides anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taskloss import audit_task_model

from ..networks import build, load_network, save_network
from ..run import Settings, begin, check_intact, digest, finish, is_done, progress
from ..scans import Cases
from .loop import Board, Point, batches, machine, write_log


def dice_loss(kind: str = "batch") -> nn.Module:
    """Eq. 3 of the paper: one minus the foreground's soft Dice, over the batch as in the published code."""
    from monai.losses import DiceLoss

    if kind not in ("batch", "sample"):
        raise ValueError(f"dice: expected batch or sample, got {kind!r}; --set dice=batch")
    return DiceLoss(softmax=True, to_onehot_y=True, include_background=False, squared_pred=True, batch=kind == "batch")


def train_task(name: str, settings: Settings, run: Path, fabric: Any = None) -> Path:
    """Write ``task/<name>/weights.pt``, and refuse to go on with a network that the audit finds unfit to guide."""
    folder, cases = run / "task" / name, run / "cases"
    names = ("seed", "shape", "overlap", "voxel_mm", "task_width", "task_batch", "task_learning_rate", "dice")
    facts = {field: getattr(settings, field) for field in names} | {"cases": digest(cases / "manifest.json")}
    facts |= {"network": name, "steps": settings.steps_of(name)}
    if is_done(folder, facts):
        return folder
    fabric = fabric or machine(settings)
    if fabric.is_global_zero:
        begin(folder, facts)
    fabric.barrier()
    torch.manual_seed(settings.seed)
    train, steps = Cases(run, "train"), settings.steps_of(name)
    width = max(1, round(settings.task_width * RELATIVE_WIDTH[name]))
    network = build(name, width).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.task_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.task_learning_rate, total_steps=steps)
    own = network
    network, optimizer = fabric.setup(torch.compile(network) if settings.compile else network, optimizer)
    point = Point(folder / "last.pt", fabric, network=own, optimizer=optimizer, schedule=schedule)
    start, log, _ = point.load()
    board = Board(folder / "tensorboard", fabric, start)
    criterion = dice_loss(settings.dice)
    todo = range(start + 1, steps + 1)
    stream = batches(train, settings.task_batch, settings, fabric, start)
    for step, (_, normal, mask) in zip(progress(todo, f"train {name}"), stream, strict=False):
        loss = criterion(network(normal.to(memory_format=torch.channels_last_3d)), mask)
        if not math.isfinite(value := float(loss.detach())):
            raise FloatingPointError(f"{name}: the Dice loss is {value} at step {step}; lower task_learning_rate")
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        schedule.step()
        log.append({"step": step, "dice_loss": value})
        board.add(log[-1])
        if step % settings.save_every == 0 and step < steps:
            point.save(step, log, 0.0)
    board.close()
    if fabric.is_global_zero:
        own.cpu().eval()
        _, normal, _ = train[0]
        findings = audit_task_model(own, normal[None])
        if findings:
            raise ValueError(f"{name} is unfit to guide a denoiser: " + "; ".join(map(str, findings)))
        save_network(folder / "weights.pt", own, name, width, voxel_mm=list(settings.voxel_mm), seed=settings.seed)
        write_log(folder / "log.csv", log)
        recent = [row["dice_loss"] for row in log[-10:]]
        finish(folder, facts, last_loss=sum(recent) / len(recent), digest=digest(folder / "weights.pt"))
        point.path.unlink(missing_ok=True)
    fabric.barrier()
    return folder


# Widths relative to the U-Net's, so that one number sets them all. The published code: 64, 16, 16, 32.
RELATIVE_WIDTH = {"unet": 1.0, "vnet": 0.5, "res_unet": 1.0, "vox_resnet": 1.0}


def load_task(settings: Settings, run: Path, name: str = "unet") -> nn.Module:
    """A trained task network, in eval mode."""
    check_intact(run / "task" / name)
    return load_network(run / "task" / name / "weights.pt")
