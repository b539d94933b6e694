"""Stage 4: the denoisers. One loop for all of them; only the loss differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskloss import GradientBalancer, gradient_maps

from ..inference import denoise_volume, segment
from ..metrics import dice
from ..networks import Denoiser, save_checkpoint
from ..run import Settings, begin, digest, finish, is_done, progress, save_tensors, take_twin
from ..scans import WINDOW_HU, Cases, to_unit
from .autoencoder import train_autoencoder
from .loop import Board, Point, batches, machine, over_processes, write_log
from .recipes import FILTERS, RECIPES, critic_of, loss_of, network_of, parse, restore, shares_of, slide
from .task_network import load_task

SHARED = (
    "seed", "shape", "overlap", "voxel_mm", "width", "norm", "final_activation", "critic_channels", "critic_norm",
    "critic_steps", "clip", "clip_norm_layers", "penalty_weight", "perceptual_network", "steps", "epochs", "batch",
    "optimizer", "learning_rate", "decay_learning_rate", "balance", "weight_adv", "weight_mse", "weight_perceptual",
    "share_adv", "share_mse", "share_perceptual", "validate_every", "select_best", "precision",
)  # fmt: skip
TASK = ("guides", "dice", "weight_task", "share_task")


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
    facts: dict[str, Any] = {field: getattr(settings, field) for field in SHARED}
    facts |= {"denoiser": name, "recipe": kind, "low_dose": digest(run / "low_dose" / "manifest.json")}
    if {"task", "consistency"} & set(recipe.terms):
        facts |= {field: getattr(settings, field) for field in TASK}
        facts |= {f"task/{guide}": digest(run / "task" / guide / "weights.pt") for guide in settings.guides}
    if settings.start_from:
        facts["start_from"] = digest(Path(settings.start_from))
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
    own = network_of(recipe, settings).to(memory_format=torch.channels_last_3d)
    critic = critic_of(recipe, settings)
    loss = loss_of(recipe, settings, run, critic).to(fabric.device)
    optimizer = make_optimizer(own, settings)
    parts: dict[str, Any] = {"denoiser": own, "optimizer": optimizer}
    if settings.decay_learning_rate:
        parts["schedule"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    opt_d = None
    if critic is not None:
        critic.to(fabric.device)
        opt_d = fabric.setup_optimizers(make_optimizer(critic, settings))
        parts |= {"critic": critic, "critic_optimizer": opt_d}
    balancer = None
    if settings.balance:
        parts["balancer"] = balancer = GradientBalancer(loss, shares=shares_of(recipe, settings))
    denoiser, optimizer = fabric.setup(torch.compile(own) if settings.compile else own, optimizer)
    point = Point(folder / "last.pt", fabric, **parts)
    start, log, best = point.load()
    board = Board(folder / "tensorboard", fabric, start)

    every = n_steps // settings.epochs if settings.epochs else settings.validate_every
    stream = batches(train, settings.batch, settings, fabric, start)
    todo = range(start + 1, n_steps + 1)
    for step, (low, normal, mask) in zip(progress(todo, f"train {name}"), stream, strict=False):
        x_hat = denoiser(low.to(memory_format=torch.channels_last_3d))
        row: dict[str, float] = {"step": step}
        if critic is not None:
            for _ in range(settings.critic_steps):
                game = critic.step(opt_d, x_hat.detach(), normal, backward=fabric.backward)
            row |= game.floats("d/")
        optimizer.zero_grad()
        watched = step % every == 0 or step == 1
        if watched:
            maps = gradient_maps(loss, x_hat, reference=normal, label=mask)
            row |= {f"norm/{term}": norm for term, norm in maps.norms().items()}
        if balancer is not None:
            value = balancer.backward(x_hat, reference=normal, label=mask, backward=fabric.backward)
        else:
            value = loss.breakdown(x_hat, reference=normal, label=mask)
            fabric.backward(value.total)
        optimizer.step()
        if "schedule" in parts:
            parts["schedule"].step()
        row |= value.floats("g/")
        if watched:
            row |= {f"weight/{term}": weight for term, weight in value.weights.items()}
        row = over_processes(row, fabric)
        if fabric.is_global_zero:
            if step % every == 0 or step == n_steps:
                score = validate(own, settings, run, fabric.device)
                row |= {f"validation/{key}": number for key, number in score.items()}
                chosen = -score["dice"] if settings.select_best == "dice" else score["mse"]
                if chosen < best:
                    best = chosen
                    _save(folder / "best.pt", own, name, settings, step)
            if step == (n_steps + 1) // 2:
                _save(folder / "half.pt", own, name, settings, step)
        log.append(row)
        board.add(row)
        if step % settings.save_every == 0 and step < n_steps:
            point.save(step, log, best)
    board.close()
    if fabric.is_global_zero:
        write_log(folder / "log.csv", log)
        finish(folder, facts, best_validation=best, digest=digest(folder / "best.pt"))
        point.path.unlink(missing_ok=True)
    fabric.barrier()
    return folder


@torch.no_grad()
def validate(network: nn.Module, settings: Settings, run: Path, device: torch.device) -> dict[str, float]:
    """Mean squared error on the whole validation volumes (the rule that picks every denoiser's weights), and the
    first guide's Dice where that is the rule.
    """
    network.eval()
    cases = Cases(run, "validation")
    judge = load_task(settings, run, settings.guides[0]).to(device) if settings.select_best == "dice" else None
    errors, overlaps = [], []
    for i in range(len(cases)):
        normal_hu, low_hu, mask = cases.in_hu(i)
        if isinstance(network, Denoiser):
            restored_hu = denoise_volume(network, low_hu, WINDOW_HU, device=device)
        else:
            restored_hu = restore(lambda unit: slide(network, unit, settings.shape, device), low_hu)
        errors.append(float((to_unit(restored_hu) - to_unit(normal_hu)).square().mean()))
        if judge is not None:
            voxel_mm = cases.voxel_mm_of(i)
            found = segment(judge, restored_hu, voxel_mm, settings.voxel_mm, device=device)
            overlaps.append(dice(found, mask))
    network.train()
    scores = {"mse": sum(errors) / len(errors)}
    return scores | ({"dice": sum(overlaps) / len(overlaps)} if overlaps else {})


def tune_filter(name: str, settings: Settings, run: Path) -> Path:
    """Pick a classic filter's strength on the validation cases, by the same rule as every network's weights."""
    folder = run / "denoisers" / name
    kind, settings = parse(name, settings)
    facts = {"denoiser": name, "low_dose": digest(run / "low_dose" / "manifest.json")}
    if is_done(folder, facts):
        return folder
    cases = Cases(run, "validation")
    errors: dict[float, float] = {}
    for sigma in progress((0.03, 0.05, 0.08, 0.12, 0.18, 0.27), f"tune {name}", 6):
        total = 0.0
        for i in range(len(cases)):
            normal_hu, low_hu, _ = cases.in_hu(i)
            found: Tensor = restore(lambda unit, s=sigma: FILTERS[kind][1](unit, s), low_hu)  # type: ignore[misc]
            total += float((to_unit(found) - to_unit(normal_hu)).square().mean())
        errors[sigma] = total / len(cases)
    begin(folder, facts)
    best = min(errors, key=errors.__getitem__)
    finish(folder, facts, sigma=best, validation_mse={str(sigma): error for sigma, error in errors.items()})
    return folder


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimiser of the settings, the same for denoisers and critics."""
    if settings.optimizer not in ("adam", "rmsprop"):
        raise ValueError(f"optimizer: expected adam or rmsprop, got {settings.optimizer!r}; --set optimizer=rmsprop")
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.RMSprop
    return kind(network.parameters(), lr=settings.learning_rate)


def _save(path: Path, network: nn.Module, name: str, settings: Settings, step: int) -> None:
    if isinstance(network, Denoiser):
        facts = {"seed": settings.seed, "step": step, "voxel_mm": list(settings.voxel_mm)}
        save_checkpoint(path, network, denoiser=name, **facts)
    else:
        save_tensors(path, **network.state_dict())
