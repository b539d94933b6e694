"""A user's script that type checkers read, mypy and pyright in strict mode; nothing runs it but them and one test."""

import torch
from torch import Tensor, nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientBalancer,
    GradientPenalty,
    LossSum,
    TaskConsistencyLoss,
    TaskOrientedLoss,
    WassersteinCritic,
    WeightClipping,
    audit_task_model,
    gradient_maps,
)

torch.manual_seed(0)


def warm_up(step: int) -> float:
    return min(1.0, step / 500)


segmenter = nn.Conv2d(1, 2, 3, padding=1)
critic = WassersteinCritic(spatial_dims=2, patch_size=(8, 8), constraint=WeightClipping(0.01))
other = WassersteinCritic(network=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), constraint=GradientPenalty(10.0))
loss = LossSum(
    adv=AdversarialLoss(critic),
    task=warm_up * TaskOrientedLoss(segmenter, nn.CrossEntropyLoss(), expects=(0, 1)),
    same=0.1 * TaskConsistencyLoss(segmenter, nn.MSELoss()),
    mse=0.5 * Fidelity(nn.MSELoss()),
)
denoiser = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid())
opt_d = torch.optim.RMSprop(critic.parameters(), lr=5e-4)
low, normal = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
label = torch.ones(2, 8, 8, dtype=torch.long)

x_hat: Tensor = denoiser(low)
numbers: dict[str, float] = critic.step(opt_d, x_hat.detach(), normal).floats("d/")
distance: Tensor = other.distance(x_hat, normal)
total: Tensor = loss(x_hat, reference=normal, label=label, step=3)
total.backward()  # type: ignore[no-untyped-call]  # torch does not type its own

task: TaskOrientedLoss = loss["task"]
prediction: Tensor = loss["task"].predict(x_hat)
digest: str = loss["task", TaskOrientedLoss].task_model.digest()
alone: Tensor = task(x_hat, label)

summed: LossSum = TaskOrientedLoss(segmenter, nn.CrossEntropyLoss()) + 0.5 * Fidelity(nn.L1Loss())
norms: dict[str, float] = gradient_maps(loss, x_hat, reference=normal, label=label, step=3).norms()
balancer = GradientBalancer(summed, shares={"task_oriented_loss": 1.0, "fidelity": 1.0})
weights: dict[str, float] = balancer.backward(denoiser(low), reference=normal, label=label).weights
findings: list[str] = [str(finding) for finding in audit_task_model(segmenter, low)]
