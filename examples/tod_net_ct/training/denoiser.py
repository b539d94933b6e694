"""Stage 4: the denoisers. One loop for all of them; only the loss differs.

Told in steps: what decides the result (`facts_of`), the set-up (`set_up`), one step (`one_step`), and what happens
between steps (`Keeper`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskloss import GradientBalancer, LossSum, LossValue, WassersteinCritic, gradient_maps

from ..networks import Denoiser, save_checkpoint
from ..run import (
    Budget,
    Guidance,
    Machine,
    Networks,
    Patches,
    Seed,
    Settings,
    TaskLoss,
    Training,
    begin,
    decisive,
    digest,
    finish,
    is_done,
    only,
    progress,
    save_tensors,
    take_twin,
)
from ..scans import Cases
from .autoencoder import train_autoencoder
from .filters import tune_filter
from .loop import Board, Point, batches, machine, over_processes, write_log
from .recipes import FILTERS, RECIPES, Recipe, critic_of, loss_of, network_of, parse, shares_of
from .validation import validate


def train_denoiser(name: str, settings: Settings, run: Path, fabric: Any = None) -> Path:
    """Train one denoiser and write ``denoisers/<name>/best.pt`` (best on validation), ``half.pt`` (halfway, for
    Fig. 2) and ``log.csv`` (every term, its effective weight and gradient norm at x_hat).

    A killed training goes on from its last checkpoint, on a CPU to the same weights bit for bit.

    Raises:
        FloatingPointError: a term is no longer finite; it is named.
    """
    folder = run / "denoisers" / name
    kind, settings = parse(name, settings)
    if kind in FILTERS:
        return tune_filter(name, settings, run)
    recipe = RECIPES[kind]
    settings = only(settings, *groups_of(recipe, settings))
    facts = facts_of(name, kind, settings, run)
    if is_done(folder, facts):
        return folder
    fabric = fabric or machine(settings)
    if fabric.world_size == 1 and take_twin(folder, facts, "denoiser"):  # trained before, under a name with its changes
        return folder
    if "autoencoder" in recipe.terms:
        train_autoencoder(settings, run, fabric)
    if fabric.is_global_zero:
        begin(folder, facts)
    fabric.barrier()

    torch.manual_seed(settings.seed)  # the same initial weights, whatever the loss
    train = Cases(run, "train")
    n_steps = settings.total_steps(len(train))
    parts = set_up(recipe, settings, run, n_steps, fabric)
    keeper = Keeper(name, settings, run, n_steps, parts, fabric)
    stream = batches(train, settings.batch, settings, fabric, keeper.start)
    todo = range(keeper.start + 1, n_steps + 1)
    for step, (low, normal, mask) in zip(progress(todo, f"train {name}"), stream, strict=False):
        row = one_step(parts, low, normal, mask, watched=step % keeper.every == 0 or step == 1)
        keeper.after_step(step, {"step": step} | row)
    keeper.close()
    if fabric.is_global_zero:
        finish(folder, facts, best_validation=keeper.best, digest=digest(folder / "best.pt"))
        keeper.point.path.unlink(missing_ok=True)
    fabric.barrier()
    return folder


def groups_of(recipe: Recipe, settings: Settings) -> list[type]:
    """The groups of settings that this denoiser's training may read."""
    guided = "task" in recipe.terms or "consistency" in recipe.terms or settings.select_best == "dice"
    return [Seed, Patches, Budget, Networks, Training, Machine, *([Guidance, TaskLoss] if guided else [])]


def facts_of(name: str, kind: str, settings: Any, run: Path) -> dict[str, Any]:
    """What decides the result: the settings of those groups, the cases, and every network that the training starts
    from.
    """
    facts = decisive(settings)
    facts |= {"denoiser": name, "recipe": kind, "low_dose": digest(run / "low_dose" / "manifest.json")}
    for guide in getattr(settings, "guides", ()):
        facts[f"task/{guide}"] = digest(run / "task" / guide / "weights.pt")
    if settings.start_from:
        facts["start_from"] = digest(Path(settings.start_from))
    return facts


@dataclass
class Parts:
    """What a training step works with; `denoiser` runs the weights of `own`, compiled or over processes."""

    own: nn.Module
    denoiser: nn.Module
    optimizer: Any
    loss: LossSum
    backward: Any  # the machine's, which knows of its precision and its processes
    critic: WassersteinCritic | None = None
    critic_optimizer: Any = None
    critic_steps: int = 1
    balancer: GradientBalancer | None = None
    schedule: Any = None

    def stateful(self) -> dict[str, Any]:
        """All that a resumed training takes up."""
        named = {
            "denoiser": self.own, "optimizer": self.optimizer, "schedule": self.schedule, "critic": self.critic,
            "critic_optimizer": self.critic_optimizer, "balancer": self.balancer,
        }  # fmt: skip
        return {name: part for name, part in named.items() if part is not None}


def set_up(recipe: Recipe, settings: Any, run: Path, n_steps: int, fabric: Any) -> Parts:
    """The denoiser, its critic, its loss and their optimisers, on the machine's device."""
    own = network_of(recipe, settings).to(memory_format=torch.channels_last_3d)
    critic = critic_of(recipe, settings)
    loss = loss_of(recipe, settings, run, critic).to(fabric.device)
    optimizer = make_optimizer(own, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps) if settings.decay_learning_rate else None
    critic_optimizer = None
    if critic is not None:
        critic.to(fabric.device)
        critic_optimizer = fabric.setup_optimizers(make_optimizer(critic, settings))
    balancer = GradientBalancer(loss, shares=shares_of(recipe, settings)) if settings.balance else None
    denoiser, optimizer = fabric.setup(torch.compile(own) if settings.compile else own, optimizer)
    return Parts(
        own, denoiser, optimizer, loss, fabric.backward, critic, critic_optimizer, settings.critic_steps, balancer,
        schedule,
    )  # fmt: skip


def one_step(parts: Parts, low: Tensor, normal: Tensor, mask: Tensor, *, watched: bool) -> dict[str, float]:
    """One step of the critic and one of the denoiser: the loop of the library's README. Returns the log's numbers."""
    x_hat = parts.denoiser(low.to(memory_format=torch.channels_last_3d))
    row: dict[str, float] = {}
    if parts.critic is not None:
        for _ in range(parts.critic_steps):
            game = parts.critic.step(parts.critic_optimizer, x_hat.detach(), normal, backward=parts.backward)
            row = game.floats("d/")
    parts.optimizer.zero_grad()
    if watched:
        maps = gradient_maps(parts.loss, x_hat, reference=normal, label=mask)
        row |= {f"norm/{term}": norm for term, norm in maps.norms().items()}
    value = backward(parts, x_hat, normal, mask)
    parts.optimizer.step()
    if parts.schedule is not None:
        parts.schedule.step()
    row |= value.floats("g/")
    if watched:
        row |= {f"weight/{term}": weight for term, weight in value.weights.items()}
    return row


def backward(parts: Parts, x_hat: Tensor, normal: Tensor, mask: Tensor) -> LossValue:
    """The gradient of the loss: balanced at x_hat, or of the weighted sum as it is."""
    if parts.balancer is not None:
        return parts.balancer.backward(x_hat, reference=normal, label=mask, backward=parts.backward)
    value = parts.loss.breakdown(x_hat, reference=normal, label=mask)
    parts.backward(value.total)
    return value


@dataclass
class Keeper:
    """What happens between steps: the log, validation, the best and the half-trained weights, the point to resume."""

    name: str
    settings: Any
    run: Path
    n_steps: int
    parts: Parts
    fabric: Any
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.run / "denoisers" / self.name
        epochs = self.settings.epochs
        self.every = self.n_steps // epochs if epochs else self.settings.validate_every
        self.point = Point(self.folder / "last.pt", self.fabric, **self.parts.stateful())
        self.start, self.log, self.best = self.point.load()
        self.board = Board(self.folder / "tensorboard", self.fabric, self.start)

    def after_step(self, step: int, row: dict[str, float]) -> None:
        """Log the step, validate where it is time, and keep what a killed run would miss."""
        row = over_processes(row, self.fabric)
        if self.fabric.is_global_zero:
            if step % self.every == 0 or step == self.n_steps:
                row |= self.validated(step)
            if step == (self.n_steps + 1) // 2:
                self.save("half.pt", step)
        self.log.append(row)
        self.board.add(row)
        if step % self.settings.save_every == 0 and step < self.n_steps:
            self.point.save(step, self.log, self.best)

    def validated(self, step: int) -> dict[str, float]:
        """Score the weights on the validation cases, and keep them if they are the best so far."""
        score = validate(self.parts.own, self.settings, self.run, self.fabric.device)
        chosen = -score["dice"] if self.settings.select_best == "dice" else score["mse"]
        if chosen < self.best:
            self.best = chosen
            self.save("best.pt", step)
        return {f"validation/{key}": number for key, number in score.items()}

    def save(self, file: str, step: int) -> None:
        """The denoiser as the other stages read it."""
        if isinstance(self.parts.own, Denoiser):
            facts = {"seed": self.settings.seed, "step": step, "voxel_mm": list(self.settings.voxel_mm)}
            save_checkpoint(self.folder / file, self.parts.own, denoiser=self.name, **facts)
        else:
            save_tensors(self.folder / file, **self.parts.own.state_dict())

    def close(self) -> None:
        """Write what is left of the logs."""
        self.board.close()
        if self.fabric.is_global_zero:
            write_log(self.folder / "log.csv", self.log)


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of the settings, the same for denoisers and critics."""
    if settings.optimizer not in ("adam", "rmsprop"):
        raise ValueError(f"optimizer: expected adam or rmsprop, got {settings.optimizer!r}; --set optimizer=rmsprop")
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.RMSprop
    return kind(network.parameters(), lr=settings.learning_rate)
