"""
Balance terms where they meet
=============================

Two terms with weight 1 hardly ever weigh the same: what counts is the length of their gradients at the restored image,
and those differ by orders of magnitude. Here MSE and a classifier's cross-entropy restore blurred, noisy digits, first
with fixed weights, then with equal shares of the gradient.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from taskloss import Fidelity, GradientBalancer, History, LossSum, TaskOrientedLoss, gradient_maps

images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(load_digits().target)

classifier = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
)  # fmt: skip
adam = torch.optim.Adam(classifier.parameters(), lr=3e-3)
for _ in range(100):
    index = torch.randint(0, 1200, (128,))
    adam.zero_grad()
    F.cross_entropy(classifier(images[index]), labels[index]).backward()
    adam.step()


def degraded(clean):
    """Blurred with a 3x3 box, and noisy."""
    return F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, stride=1) + 0.2 * torch.randn(clean.shape)


def train(balanced: bool) -> History:
    """Train a restorer and record what it felt."""
    torch.manual_seed(0)
    restorer = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )  # fmt: skip
    loss = LossSum(mse=Fidelity(nn.MSELoss()), task=TaskOrientedLoss(classifier, nn.CrossEntropyLoss()))
    balancer = GradientBalancer(loss, shares={"mse": 1.0, "task": 1.0})
    optimiser = torch.optim.Adam(restorer.parameters(), lr=2e-3)
    history = History()
    for step in range(150):
        index = torch.randint(0, 1200, (64,))
        x_hat = restorer(degraded(images[index]))
        targets = {"reference": images[index], "label": labels[index]}
        optimiser.zero_grad()
        if balanced:
            value = balancer.backward(x_hat, **targets)
        else:
            value = loss.breakdown(x_hat, **targets)
            value.total.backward()
        optimiser.step()
        history.record(value, step=step, gradients=gradient_maps(loss, x_hat, **targets))
    return history


# %%
# Fixed weights
# -------------
# Look at the norms: before the weights, the task's gradient is many times longer than that of MSE.

fixed = train(balanced=False)
before = fixed.plot(smooth=10)

# %%
# Equal shares
# ------------
# The same training, except that the weights follow moving averages of the norms. Rescaling a loss by any factor would
# change nothing now.

shared = train(balanced=True)
after = shared.plot(smooth=10)

# %%
# What each term really contributes is its weight times its norm.

for name, history in {"fixed weights": fixed, "equal shares": shared}.items():
    row = history.rows()[-1]
    pull = {term: row[f"weight/{term}"] * row[f"norm/{term}"] for term in ("mse", "task")}
    print(f"{name}: the task pulls {pull['task'] / pull['mse']:.1f} times as hard as MSE")
