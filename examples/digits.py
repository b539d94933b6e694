"""Restore blurred, noisy handwritten digits for a classifier: MSE alone against MSE + task loss.

    python -m examples.digits

One file, real data (scikit-learn ships it), under a minute. A small restorer is trained twice from the same initial
weights on the same batches; the only difference is the task term, a frozen classifier with cross-entropy. Judges: PSNR,
the classifier used in training, and two classifiers of other kinds that training never saw; the transfer meter says in
words whether they gain too.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from taskloss import Fidelity, LossSum, TaskOrientedLoss, Transfer, TransferMeter


def degrade(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Blur with a 3x3 box and add white noise of 0.2, on images in [0, 1]."""
    blurred = F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return blurred + 0.2 * torch.randn(clean.shape, generator=generator)


def convolutional() -> nn.Module:
    """A small convolutional classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(512, 10),
    )  # fmt: skip


def perceptron() -> nn.Module:
    """A classifier without convolutions, never seen in training the restorer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


class Restorer(nn.Module):
    """Four convolutions that predict what to add to the image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, degraded: Tensor) -> Tensor:
        """The restored image, of the same shape."""
        return degraded + self.body(degraded)


def batches(n: int, size: int, steps: int, seed: int):
    """Seeded random index batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(0, n, (size,), generator=generator)


def train_classifier(network: nn.Module, clean: Tensor, label: Tensor, seed: int, steps: int) -> nn.Module:
    """Train a classifier on clean digits."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for index in batches(len(clean), 128, steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(network(clean[index]), label[index]).backward()
        optimizer.step()
    return network.eval()


def train_restorer(loss: LossSum, clean: Tensor, label: Tensor, seed: int, steps: int) -> nn.Module:
    """Train a restorer with any loss; nothing else depends on which."""
    torch.manual_seed(seed)
    restorer = Restorer()
    optimizer = torch.optim.Adam(restorer.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    noise = torch.Generator().manual_seed(seed)
    for index in batches(len(clean), 64, steps, seed):
        x_hat = restorer(degrade(clean[index], noise))
        optimizer.zero_grad()
        loss(x_hat, reference=clean[index], label=label[index]).backward()
        optimizer.step()
        schedule.step()
    return restorer.eval()


@torch.no_grad()
def one_seed(seed: int, steps: int) -> tuple[dict[str, dict[str, float]], Transfer]:
    """PSNR and three accuracies of the degraded digits and of both restorers, on digits nobody has seen.

    And whether what the task term gains carries over to the two classifiers that it never looked through.
    """
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1200], order[1200:]
    clean, label = images[train], labels[train]
    with torch.enable_grad():
        task = train_classifier(convolutional(), clean, label, seed, steps)
        unseen = train_classifier(perceptron(), clean, label, seed, steps)
        neighbours = KNeighborsClassifier(3).fit(clean.flatten(1).numpy(), label.numpy())
        mse = Fidelity(nn.MSELoss())
        losses = {
            "MSE": LossSum(mse=mse),
            "MSE + task": LossSum(mse=mse, task=0.02 * TaskOrientedLoss(task, nn.CrossEntropyLoss())),
        }
        restorers = {name: train_restorer(loss, clean, label, seed, steps) for name, loss in losses.items()}
    degraded = degrade(images[test], torch.Generator().manual_seed(seed + 1000))
    restored = {"degraded": degraded} | {name: network(degraded) for name, network in restorers.items()}
    restored = {name: image.clamp(0, 1) for name, image in restored.items()}
    results = {}
    for name, image in restored.items():
        results[name] = {
            "PSNR": -10 * math.log10(float((image - images[test]).square().mean())),
            "CNN (in training)": 100 * float((task(image).argmax(1) == labels[test]).float().mean()),
            "MLP (unseen)": 100 * float((unseen(image).argmax(1) == labels[test]).float().mean()),
            "3-NN (unseen)": 100 * float(neighbours.score(image.flatten(1).numpy(), labels[test].numpy())),
        }
    votes = {"MLP": unseen, "3-NN": lambda x: torch.from_numpy(neighbours.predict_proba(x.flatten(1).numpy()))}
    meter = TransferMeter(task, votes, lambda logits, label: logits.argmax(1) == label)
    meter.update(restored["MSE + task"], restored["MSE"], labels[test])
    return results, meter.report()


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def table(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Mean and 95 % interval over seeds, and the paired difference that the task term makes."""
    columns = list(runs[0]["MSE"])
    lines = [f"{'':<22}" + "".join(f"{column:>20}" for column in columns)]
    for name in runs[0]:
        cells = [interval([run[name][column] for run in runs]) for column in columns]
        lines.append(f"{name:<22}" + "".join(f"{mean:>12.2f} ± {half:5.2f}" for mean, half in cells))
    gaps = [interval([run["MSE + task"][c] - run["MSE"][c] for run in runs]) for c in columns]
    lines.append(f"{'task term, paired':<22}" + "".join(f"{mean:>+12.2f} ± {half:5.2f}" for mean, half in gaps))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args(arguments)
    if args.seeds < 2 or args.steps < 1:
        parser.error(
            f"expected --seeds from 2 on (for an interval) and --steps from 1 on, got {args.seeds} and {args.steps}"
        )
    runs, reports = zip(*(one_seed(seed, args.steps) for seed in range(args.seeds)), strict=True)
    print(f"PSNR in dB, accuracies in percent; mean and 95 % interval over {args.seeds} seeds\n")
    print(table(runs))
    print(f"\nthe transfer meter on the last seed: {reports[-1]}")


if __name__ == "__main__":
    main()
