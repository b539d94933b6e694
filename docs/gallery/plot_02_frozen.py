"""
Frozen means frozen
===================

A task network that drifts while it guides is a loss that changes under your feet. Here a parent module does everything
that usually breaks a frozen network; the digest of its weights and statistics does not move.
"""

import torch
from torch import nn

from taskloss import Fidelity, LossSum, TaskOrientedLoss, audit_task_model

segmenter = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 2, 1)
)
loss = LossSum(task=TaskOrientedLoss(segmenter, nn.CrossEntropyLoss()), mse=Fidelity(nn.MSELoss()))


class Trainer(nn.Module):
    """Someone's training module: it owns the denoiser and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = nn.Conv2d(1, 1, 3, padding=1)
        self.loss = loss


trainer = Trainer()
digest = loss.terms["task"].task_model.digest()
print("parameters of the trainer:", [name for name, _ in trainer.named_parameters()])
print("entries of its state_dict:", list(trainer.state_dict()))

# %%
# What usually goes wrong
# -----------------------
# The task network would go back to training mode, be re-initialised, be trained, or end up in the checkpoint.

trainer.train()
trainer.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
trainer.requires_grad_(True)
optimiser = torch.optim.SGD(trainer.parameters(), lr=0.1)
values = []
for _ in range(20):
    x_hat = trainer.denoiser(torch.rand(2, 1, 16, 16))
    value = loss.breakdown(x_hat, reference=torch.rand(2, 1, 16, 16), label=torch.ones(2, 16, 16).long())
    optimiser.zero_grad()
    value.total.backward()
    optimiser.step()
    values.append(value)

print("unchanged:", loss.terms["task"].task_model.digest() == digest)

# %%
# It moves with its parent all the same, because moving is no change.

trainer.double()
print("dtype:", next(loss.terms["task"].task_model.network.parameters()).dtype)
trainer.float()

# %%
# A network that cannot guide
# ---------------------------
# The audit looks at a network before it is used, and names the module that is at fault.


class Labels(nn.Module):
    """Hard labels: no gradient passes an arg max."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.net(x).argmax(1).float()


for finding in audit_task_model(Labels(), torch.rand(1, 1, 8, 8)):
    print(finding)
