"""SA-WGAN's perceptual space: an autoencoder that learns to give normal-dose slices back, without any label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..networks import Autoencoder, as_slices
from ..run import (
    Budget,
    Machine,
    Patches,
    Seed,
    Settings,
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
from .loop import batches, machine


def train_autoencoder(settings: Settings, run: Path, fabric: Any = None) -> Path:
    """Write ``task/autoencoder/weights.pt``; as many steps as a denoiser gets."""
    folder = run / "task" / "autoencoder"
    settings = only(settings, Seed, Patches, Budget, Machine)
    facts = decisive(settings) | {"cases": digest(run / "cases" / "manifest.json")}
    if is_done(folder, facts):
        return folder
    fabric = fabric or machine(settings)
    torch.manual_seed(settings.seed)
    train = Cases(run, "train")
    steps = settings.total_steps(len(train))
    own = Autoencoder(2 * settings.width)
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-3)
    network, optimizer = fabric.setup(own, optimizer)
    losses = []
    stream = batches(train, settings.batch, settings, fabric)
    for _, (_, normal, _) in zip(progress(range(steps), "train autoencoder"), stream, strict=False):
        slices = as_slices(normal)
        loss = F.mse_loss(network(slices), slices)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    if fabric.is_global_zero:
        begin(folder, facts)
        save_tensors(folder / "weights.pt", width=torch.tensor(2 * settings.width), **own.cpu().state_dict())
        finish(folder, facts, last_mse=sum(losses[-10:]) / len(losses[-10:]))
    fabric.barrier()
    return folder


def load_autoencoder(run: Path) -> Autoencoder:
    """The trained autoencoder, in eval mode."""
    check_intact(run / "task" / "autoencoder")
    state = load_tensors(run / "task" / "autoencoder" / "weights.pt")
    network = Autoencoder(int(state.pop("width")))
    network.load_state_dict(state)
    return network.eval()
