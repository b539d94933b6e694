r"""
A signal, and a network that hears pitch
========================================

Nothing here is about images. torchcrepe ships a network that hears the pitch of 64 ms of sound; it guides a denoiser of
a tone with vibrato, without any label: what the network hears in the restored sound should be what it hears in the
clean one.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torchcrepe
from torch import nn

from taskloss import Fidelity, GradientBalancer, LossSum, TaskConsistencyLoss, gradient_maps, plot_gradient_maps

hearing = torchcrepe.Crepe("tiny")
hearing.load_state_dict(torch.load(Path(torchcrepe.__file__).parent / "assets" / "tiny.pth", weights_only=True))

RATE = 16_000  # samples per second


def tones(n: int):
    """Short tones with three overtones, each at a pitch of its own that moves a little: (n, 1, 1024)."""
    time = torch.arange(1024) / RATE
    pitch = 150 * 2 ** (2 * torch.rand(n, 1)) * (1 + 0.02 * torch.sin(2 * torch.pi * 6 * time))
    phase = 2 * torch.pi * torch.cumsum(pitch / RATE, dim=1) + 6 * torch.rand(n, 1)
    return sum(torch.sin(k * phase) / k**1.5 for k in (1, 2, 3, 4))[:, None] * 0.5


def as_crepe_wants(sound):
    """Each frame with zero mean and unit deviation, without the channel axis."""
    frame = sound[:, 0] - sound[:, 0].mean(1, keepdim=True)
    return frame / frame.std(1, keepdim=True).clamp(min=1e-4)


pitch_loss = TaskConsistencyLoss(hearing, nn.functional.binary_cross_entropy, preprocess=as_crepe_wants)
loss = LossSum(mse=Fidelity(nn.MSELoss()), pitch=pitch_loss)

# %%
# What the terms ask of a noisy tone
# ----------------------------------

clean = tones(1)
noisy = clean + 0.5 * torch.randn(clean.shape)
figure = plot_gradient_maps(gradient_maps(loss, noisy, reference=clean), titles={"mse": "MSE"})

# %%
# Two denoisers, with the pitch term and without
# ----------------------------------------------


def trained(shares):
    """A denoiser of 1-D convolutions; only the losses differ."""
    torch.manual_seed(0)
    denoiser = nn.Sequential(
        nn.Conv1d(1, 16, 31, padding=15), nn.ReLU(), nn.Conv1d(16, 16, 31, padding=15), nn.ReLU(),
        nn.Conv1d(16, 1, 31, padding=15),
    )  # fmt: skip
    balancer = GradientBalancer(LossSum(**{name: loss.terms[name] for name in shares}), shares=shares)
    adam = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    for _ in range(80):
        sound = tones(8)
        adam.zero_grad()
        balancer.backward(denoiser(sound + 0.5 * torch.randn(sound.shape)), reference=sound)
        adam.step()
    return denoiser


denoisers = {"MSE": trained({"mse": 1.0}), "MSE + pitch": trained({"mse": 1.0, "pitch": 1.0})}
with torch.no_grad():
    clean = tones(200)
    noisy = clean + 0.5 * torch.randn(clean.shape)
    truth = hearing.eval()(as_crepe_wants(clean)).argmax(1)
    off = {}
    for name, sound in {"noisy": noisy, **{name: net(noisy) for name, net in denoisers.items()}}.items():
        off[name] = 20 * (hearing(as_crepe_wants(sound)).argmax(1) - truth).abs()  # a bin is 20 cents
figure, panel = plt.subplots(figsize=(7, 3), layout="constrained")
for name, cents in off.items():
    panel.plot(cents.sort().values, torch.arange(1, 201) / 200, label=f"{name}: median {cents.median()} cents")
panel.set(xscale="symlog", xlabel="pitch heard, off by cents", ylabel="share of tones", xlim=(0, None))
panel.legend()
panel.set_title("One guide that also judges: see the transfer alarm", fontsize=9)
