"""Restore noisy, small or compressed photographs for classifiers that no one here trained: does a task loss pay?

    python -m examples.natural_images --data data

A small restorer is trained from the same initial weights on the same batches with MSE alone, with MSE + task loss (the
two share the gradient at x_hat equally) and with other settings; nothing else differs. Pre-trained networks judge the
8-bit picture that comes out: one guided the training, the others never saw it. ``--data`` is a folder with
torchvision's CIFAR-10 (downloaded where it is missing), or an archive ``cifar10*.npz`` of it; ``--networks`` the folder
``pretrained_models`` of https://github.com/akamaster/pytorch_resnet_cifar10. A killed run goes on where it was.
docs/protocol.md says what is compared and how; docs/evidence.md what came out.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from taskloss import (
    Fidelity,
    GradientBalancer,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    TransferMeter,
    soft_kl,
)

from .natural_worlds import WORLDS, Images, World

REFERENCES = ["clean", "degraded", "oracle"]  # no restorer: what it can be measured against
SAVE_EVERY = 100  # steps
TRUNK = 2 / 3  # of the steps: where the guides of the late settings begin to speak, until then they are MSE alone
HEADER = ["world", "degradation", "setting", "stage", "seed", "unit", "network", "role", "metric", "value"]


# --- what is wrong with the images, and what mends them ---------------------------------------------------------------


def eight_bit(image: Tensor) -> Tensor:
    """As a picture file holds it."""
    return (image.clamp(0, 1) * 255).round() / 255


def smaller(clean: Tensor, factor: int) -> Tensor:
    """Bicubic reduction, stored with 8 bits, and back to the old size."""
    small = eight_bit(F.interpolate(clean, scale_factor=1 / factor, mode="bicubic", antialias=True))
    return F.interpolate(small, scale_factor=factor, mode="bicubic")


def compressed(clean: Tensor, quality: int) -> Tensor:
    """Through a JPEG file."""
    out = []
    for image in (eight_bit(clean) * 255).byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        out.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(out).permute(0, 3, 1, 2).float() / 255


DEGRADATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "half": lambda clean, _: smaller(clean, 2),
    "noise25": lambda clean, generator: clean + 25 / 255 * torch.randn(clean.shape, generator=generator),
    "noise50": lambda clean, generator: clean + 50 / 255 * torch.randn(clean.shape, generator=generator),
    "quarter": lambda clean, _: smaller(clean, 4),
    "jpeg10": lambda clean, _: compressed(clean, 10),
    "jpeg5": lambda clean, _: compressed(clean, 5),
    "none": lambda clean, _: clean,
}


class Restorer(nn.Module):
    """Residual convolutions on 2 x 2 blocks of pixels (as FFDNet's, Zhang et al., 2018) that predict what to add."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, degraded: Tensor) -> Tensor:
        """The restored image, of the same shape."""
        y = F.relu(self.first(F.pixel_unshuffle(degraded, 2)))
        for block in self.blocks:
            y = y + F.relu(block(y))
        return degraded + F.pixel_shuffle(self.last(y), 2)


# --- the losses that are compared -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What differs between two restorers; the rest is the same to the last random number."""

    n_guides: int = 1
    shares: dict[str, float] = field(default_factory=lambda: {"mse": 1.0, "task": 1.0})
    augment: bool = False
    ensemble: str = "turns"  # or "mean": every guide in every step
    span: tuple[float, float] = (0.0, 1.0)  # part of the training during which the guides speak

    def loss(self, networks: dict[str, nn.Module], steps: int) -> LossSum:
        """The sum of the terms that have a share; guides in turns cost little more than one."""
        guides = list(networks.values())[: max(1, self.n_guides)]
        view = augmented if self.augment else None
        layers = ["layer1", "layer2", "layer3"]
        terms = {
            "mse": lambda: Fidelity(nn.MSELoss()),
            "task": lambda: TaskOrientedLoss(guides, nn.CrossEntropyLoss(), preprocess=view, ensemble=self.ensemble),
            "features": lambda: TaskConsistencyLoss(guides[0], nn.MSELoss(), layers=layers),
            "label_free": lambda: TaskConsistencyLoss(guides[0], soft_kl),
        }
        first, last = (round(edge * steps) for edge in self.span)

        def speaking(step: int) -> float:
            return float(first <= step < last)

        return LossSum(**{name: (1.0 if name == "mse" else speaking) * terms[name]() for name in self.shares})


def augmented(x_hat: Tensor) -> Tensor:
    """Mirrored at random, moved by up to two pixels, with a little noise."""
    mirrored = torch.where(torch.rand(len(x_hat), 1, 1, 1) < 0.5, x_hat.flip(3), x_hat)
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    return mirrored.roll((dy, dx), (2, 3)) + 0.02 * torch.randn_like(mirrored)


SETTINGS = {
    "mse": Setting(n_guides=0, shares={"mse": 1.0}),
    "task": Setting(),
    "two_guides": Setting(n_guides=2),
    "guides_together": Setting(n_guides=2, ensemble="mean"),
    "together_more_task": Setting(n_guides=2, shares={"mse": 1.0, "task": 3.0}, ensemble="mean"),
    "three_together": Setting(n_guides=3, ensemble="mean"),
    "augmented": Setting(augment=True),
    "two_augmented": Setting(n_guides=2, augment=True),
    "features": Setting(shares={"mse": 1.0, "features": 1.0}),
    "task_features": Setting(shares={"mse": 1.0, "task": 0.5, "features": 0.5}),
    "label_free": Setting(shares={"mse": 1.0, "label_free": 1.0}),
    "more_task": Setting(shares={"mse": 1.0, "task": 3.0}),
    "less_task": Setting(shares={"mse": 3.0, "task": 1.0}),
    "late": Setting(span=(TRUNK, 1.0)),
    "late_two_guides": Setting(n_guides=2, span=(TRUNK, 1.0)),
    "late_three_guides": Setting(n_guides=3, span=(TRUNK, 1.0)),
    "late_label_free": Setting(shares={"mse": 1.0, "label_free": 1.0}, span=(TRUNK, 1.0)),
    "late_features": Setting(shares={"mse": 1.0, "task": 0.5, "features": 0.5}, span=(TRUNK, 1.0)),
    "late_two_augmented": Setting(n_guides=2, augment=True, span=(TRUNK, 1.0)),
    "late_augmented": Setting(augment=True, span=(TRUNK, 1.0)),
    "late_more_task": Setting(shares={"mse": 1.0, "task": 3.0}, span=(TRUNK, 1.0)),
    "early": Setting(span=(0.0, TRUNK)),
}


# --- training and judging ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One restorer to train and to judge."""

    world: str
    degradation: str
    setting: str
    stage: str
    seed: int
    steps: int
    batch: int
    rate: float

    @property
    def name(self) -> str:
        """Of its folder."""
        plan = f"{self.steps}x{self.batch}-{self.rate:g}"
        return f"{self.world}-{self.stage}-{self.degradation}-{self.setting}-{plan}-seed{self.seed}"


def degraded_batch(run: Run, world: World, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The next random images, degraded and clean, and their classes."""
    clean, label = world.train[torch.randint(0, len(world.train.label), (run.batch,), generator=draws)]
    if world.crop is not None:
        top, left = torch.randint(0, clean.shape[-1] - world.crop + 1, (2,), generator=draws).tolist()
        clean = clean[:, :, top : top + world.crop, left : left + world.crop].contiguous()
    return DEGRADATIONS[run.degradation](clean, draws).to(memory_format=torch.channels_last), clean, label


def falling(step: int, steps: int) -> float:
    """The learning rate's factor: constant, and falling in a straight line over the last sixth of the steps."""
    return min(1.0, (steps - step) / (steps / 6))


def train(run: Run, world: World, output: Path) -> nn.Module:
    """Train a restorer, or go on with it: the state is kept in its folder, and the random numbers with it.

    A late setting begins as MSE alone does, so it goes on from there where that training was carried out before.
    """
    torch.manual_seed(run.seed)
    setting, trunk_step = SETTINGS[run.setting], round(TRUNK * run.steps)
    restorer = Restorer().to(memory_format=torch.channels_last)
    balancer = GradientBalancer(setting.loss(world.networks, run.steps), shares=setting.shares)
    optimizer = torch.optim.Adam(restorer.parameters(), lr=run.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step, run.steps))
    draws = torch.Generator().manual_seed(run.seed)  # of batches and noise: the same for every setting
    kept = {"restorer": restorer, "balancer": balancer, "loss": balancer.loss, "optimizer": optimizer, "lr": schedule}
    state_file = output / run.name / "state.pt"
    trunk_file = output / replace(run, setting="mse").name / "trunk.pt"
    first = 0
    found = [state_file, trunk_file] if setting.span[0] == TRUNK else [state_file]
    for source in [file for file in found if file.exists()][:1]:
        state = torch.load(source, weights_only=True)
        first = state["step"]
        for name, part in kept.items():
            if name != "loss" or source == state_file:  # of the trunk, whose sum has no guides
                part.load_state_dict(state[name])
        draws.set_state(state["draws"])
        torch.set_rng_state(state["rng"])
    for step in range(first, run.steps):
        degraded, clean, label = degraded_batch(run, world, draws)
        optimizer.zero_grad()
        balancer.backward(restorer(degraded), reference=clean, label=label, step=step)
        optimizer.step()
        schedule.step()
        at_trunk = run.setting == "mse" and step + 1 == trunk_step
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == run.steps or at_trunk:
            state = {name: part.state_dict() for name, part in kept.items()}
            state |= {"step": step + 1, "draws": draws.get_state(), "rng": torch.get_rng_state()}
            for file in (state_file, trunk_file) if at_trunk else (state_file,):
                torch.save(state, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
    return restorer.eval()


def oracle(run: Run, world: World) -> nn.Module:
    """The guide, trained further on the degraded images themselves: what they still tell."""
    draws = torch.Generator().manual_seed(run.seed)
    student = world.student().train()
    optimizer = torch.optim.Adam(student.parameters(), lr=run.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step, run.steps))
    for _ in range(run.steps):
        degraded, _clean, label = degraded_batch(run, world, draws)
        optimizer.zero_grad()
        F.cross_entropy(student(degraded), label).backward()
        optimizer.step()
        schedule.step()
    return student.eval()


def batches(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in order."""
    for start in range(0, len(images.label), size):
        yield images[slice(start, start + size)]


@torch.no_grad()
def judge(
    restorer: nn.Module, degradation: str, images: Images, networks: dict[str, nn.Module]
) -> dict[tuple[str, str], float]:
    """Top-1 in percent of every network on the 8-bit restored images, PSNR in dB and SSIM, by (network, metric)."""
    noise = torch.Generator().manual_seed(1)
    right = dict.fromkeys(networks, 0)
    psnr, ssim = [], []
    for clean, label in batches(images, 50):
        restored = eight_bit(restorer(DEGRADATIONS[degradation](clean, noise)))
        for name, network in networks.items():
            right[name] += int((network(restored).argmax(1) == label).sum())
        psnr += (-10 * (restored - clean).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).tolist()
        ssim += [
            structural_similarity(a, b, channel_axis=0, data_range=1.0)
            for a, b in zip(restored.numpy(), clean.numpy(), strict=True)
        ]
    n = len(images.label)
    scores = {(name, "top1"): 100 * count / n for name, count in right.items()}
    return scores | {("", "psnr_db"): math.fsum(psnr) / n, ("", "ssim"): math.fsum(ssim) / n}


# --- the study --------------------------------------------------------------------------------------------------------


def carry_out(run: Run, folder: Path, world: World) -> list[list[str]]:
    """Train and judge, unless that is done; the rows of the result, which are kept in ``folder/results.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "results.csv").exists():
        with (folder / "results.csv").open(newline="") as file:
            return list(csv.reader(file))[1:]
    judged, networks, guides = world.judged(run.stage), world.networks, []
    if run.setting == "oracle":
        first = next(iter(networks))
        scores = judge(nn.Identity(), run.degradation, judged, {first: oracle(run, world)})
    elif run.setting in ("clean", "degraded"):
        scores = judge(nn.Identity(), "none" if run.setting == "clean" else run.degradation, judged, networks)
    else:
        guides = list(networks)[: SETTINGS[run.setting].n_guides]
        restorer = train(run, world, folder.parent)
        scores = judge(restorer, run.degradation, judged, networks)
        on_clean = judge(restorer, "none", judged.part(0, of=4), networks)
        scores |= {(network, f"clean_{metric}"): value for (network, metric), value in on_clean.items()}
    rows = []
    for (network, metric), value in scores.items():
        role = "image" if not network else "guide" if network in guides else "judge"
        head = [run.world, run.degradation, run.setting, run.stage, str(run.seed), ""]
        rows.append([*head, network, role, metric, f"{value:.6g}"])
    write_csv(folder / "results.csv", rows)
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write the rows under the header, whole or not at all."""
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    unfinished.replace(path)


def alarm(runs: Sequence[Run], output: Path, world: World) -> str:
    """What the transfer meter says of runs beside MSE alone from the same seeds; an image is one unit over all."""
    n_guides = SETTINGS[runs[0].setting].n_guides
    guide, *others = world.networks
    meter = TransferMeter(
        world.networks[guide],
        {name: world.networks[name] for name in others[n_guides - 1 :]},
        lambda logits, label: logits.argmax(1) == label,
    )
    for run in runs:
        restorer, baseline = (train(one, world, output) for one in (run, replace(run, setting="mse")))
        noise = torch.Generator().manual_seed(1)
        for first, (clean, label) in enumerate(batches(world.judged(run.stage), 50)):
            degraded = DEGRADATIONS[run.degradation](clean, noise)
            with torch.no_grad():
                images = [eight_bit(network(degraded)) for network in (restorer, baseline)]
            meter.update(*images, label, group=range(50 * first, 50 * first + len(label)))
    return str(meter.report())


def main(arguments: list[str] | None = None) -> None:
    """Carry out the runs that are missing, and gather the results of all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="cifar10", choices=WORLDS)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--networks", type=Path, help="folder of resnet*-*.th; default: DATA/resnet_cifar10")
    parser.add_argument("--output", type=Path, default=Path("runs/natural_images"))
    parser.add_argument("--degradations", nargs="+", default=["half"], choices=DEGRADATIONS)
    parser.add_argument("--settings", nargs="+", default=["mse", "late"], choices=[*REFERENCES, *SETTINGS])
    parser.add_argument("--stage", default="exploration", choices=["pilot", "exploration", "confirming"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--alarm", action="store_true", help="let the transfer meter look at the restorers")
    args = parser.parse_args(arguments)
    world = WORLDS[args.world](args.data, args.networks)
    for seed in args.seeds:
        for degradation in args.degradations:
            runs = {
                setting: Run(args.world, degradation, setting, args.stage, seed, args.steps, args.batch, args.rate)
                for setting in args.settings
            }
            for run in runs.values():
                rows = carry_out(run, args.output / run.name, world)
                shown = {row[6] or row[8]: row[9] for row in rows if not row[8].startswith("clean")}
                print(run.name, *(f"{name} {value}" for name, value in shown.items()), sep="  ", flush=True)
    for degradation in args.degradations if args.alarm else ():
        for setting in [name for name in args.settings if name in SETTINGS and name != "mse"]:
            plan = (args.steps, args.batch, args.rate)
            several = [Run(args.world, degradation, setting, args.stage, seed, *plan) for seed in args.seeds]
            print(f"the transfer meter on {degradation}, {setting}: {alarm(several, args.output, world)}", flush=True)
    gathered = []
    for path in sorted(args.output.glob(f"*-{args.stage}-*/results.csv")):
        with path.open(newline="") as file:
            gathered += list(csv.reader(file))[1:]
    write_csv(args.output / f"{args.stage}.csv", gathered)


if __name__ == "__main__":
    main()
