"""Stage 3: the task network, trained on normal dose with the Dice loss before it guides anything."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from taskloss import audit_task_model

from .data import Cases
from .networks import unet
from .settings import Settings
from .stage import begin, digest, finish, is_done, load_tensors, progress, save_tensors


def dice_loss() -> nn.Module:
    """Eq. 3 of the paper: one minus the foreground's soft Dice, over the batch as in the published code."""
    from monai.losses import DiceLoss

    return DiceLoss(softmax=True, to_onehot_y=True, include_background=False, squared_pred=True, batch=True)


def train_task(settings: Settings, run: Path) -> Path:
    """Write ``task/unet.pt``, and refuse to go on with a network that the audit finds unfit to guide."""
    folder, cases = run / "task", run / "cases"
    names = ("seed", "task_width", "task_steps", "task_batch", "task_learning_rate")
    facts = {name: getattr(settings, name) for name in names} | {"cases": digest(cases / "manifest.json")}
    if is_done(folder, facts):
        return folder
    begin(folder)
    torch.manual_seed(settings.seed)
    network = unet(settings.task_width).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.task_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.task_learning_rate, total_steps=settings.task_steps
    )
    criterion = dice_loss()
    batches = endless(Cases(run, "train"), settings.task_batch, settings.seed)
    losses = []
    for _, (_, normal, mask) in zip(progress(range(settings.task_steps), "train U-Net"), batches, strict=False):
        loss = criterion(network(normal.to(memory_format=torch.channels_last_3d)), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    network.eval()
    findings = audit_task_model(network, normal[:1])
    if findings:
        raise ValueError("the task network is unfit to guide a denoiser: " + "; ".join(map(str, findings)))
    save_tensors(folder / "unet.pt", **network.state_dict())
    finish(folder, facts, last_loss=sum(losses[-10:]) / len(losses[-10:]))
    return folder


def load_task(settings: Settings, run: Path) -> nn.Module:
    """The trained task network, in eval mode."""
    network = unet(settings.task_width)
    network.load_state_dict(load_tensors(run / "task" / "unet.pt"))
    return network.eval()


def endless(cases: Cases, batch: int, seed: int) -> DataLoader:
    """Batches for ever, shuffled anew each epoch by a seeded generator."""

    def indices():
        generator = torch.Generator().manual_seed(seed)
        waiting: list[int] = []
        while True:
            while len(waiting) < batch:
                waiting += torch.randperm(len(cases), generator=generator).tolist()
            yield waiting[:batch]
            waiting = waiting[batch:]

    return DataLoader(cases, batch_sampler=indices())  # type: ignore[arg-type]
