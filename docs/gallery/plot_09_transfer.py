"""
The transfer alarm
==================

A restorer can learn to please the network that guides it and nobody else. :class:`~taskloss.TransferMeter` compares the
guide's gain with that of networks which never took part, and says so in words; here of three restorers of digits, small
enough that little carries over.
"""

import textwrap

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from taskloss import Fidelity, LossSum, TaskOrientedLoss, TransferMeter

images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(load_digits().target)


def classifier(kind: str) -> nn.Module:
    """Trained on clean digits."""
    net = {
        "cnn": lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        ),
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    }[kind]()  # fmt: skip
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(200):
        index = torch.randint(0, 1200, (128,))
        adam.zero_grad()
        F.cross_entropy(net(images[index]), labels[index]).backward()
        adam.step()
    return net.eval()


guide = classifier("cnn")
judges = {"another CNN": classifier("cnn"), "perceptron": classifier("mlp"), "linear": classifier("linear")}


def degraded(clean):
    """Blurred with a 3x3 box, and noisy."""
    return F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, stride=1) + 0.2 * torch.randn(clean.shape)


def restorer(loss: LossSum) -> nn.Module:
    """Trained with any loss."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )  # fmt: skip
    adam = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(300):
        index = torch.randint(0, 1200, (64,))
        adam.zero_grad()
        loss(net(degraded(images[index])), reference=images[index], label=labels[index]).backward()
        adam.step()
    return net.eval()


mse, task = Fidelity(nn.MSELoss()), TaskOrientedLoss(guide, nn.CrossEntropyLoss())
plain = restorer(LossSum(mse=mse))
several = TaskOrientedLoss([guide, classifier("cnn"), classifier("mlp")], nn.CrossEntropyLoss())

# %%
# The metric is higher-is-better, one value for each sample; here, whether the digit is read right. The noise is drawn
# ten times over, so that the intervals are narrow enough to decide.


def report(net: nn.Module):
    """What a restorer gains over the plain one, on digits nobody has seen."""
    meter = TransferMeter(guide, judges, lambda prediction, label: prediction.argmax(1) == label)
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(10):
            noisy = degraded(images[1200:])
            meter.update(net(noisy), plain(noisy), labels[1200:], group=range(len(noisy)))
    return meter.report()


found = {
    "the task alone": report(restorer(LossSum(task=task))),
    "MSE and the task": report(restorer(LossSum(mse=mse, task=0.02 * task))),
    "MSE and three guides": report(restorer(LossSum(mse=mse, task=0.02 * several))),
}
for name, said in found.items():
    print(textwrap.fill(f"{name}: {said}", width=88), end="\n\n")

# %%
# Read the last words first: a gain of the guide alone is not quality.

import matplotlib.pyplot as plt  # noqa: E402

figure, panel = plt.subplots(figsize=(7, 3.4), layout="constrained")
for place, said in enumerate(found.values()):
    gains = {"guide": said.guide, **said.judges}
    for offset, (who, gain) in enumerate(gains.items()):
        x = place + 0.12 * (offset - 1.5)
        error = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
        colour = "tab:red" if who == "guide" else f"C{offset + 6}"
        panel.errorbar(x, 100 * gain.mean, error, fmt="o", color=colour, label=who if place == 0 else None)
panel.axhline(0, lw=0.8, color="0.5")
panel.set_xticks(range(len(found)), [f"{name}\n{said.verdict}" for name, said in found.items()])
panel.set_ylabel("gain in accuracy over MSE alone, %")
panel.legend(fontsize=8)
