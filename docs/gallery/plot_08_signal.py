r"""
A signal, and a network that hears pitch
========================================

Nothing here is about images. torchcrepe ships a network that hears the pitch of 64 ms of sound; it guides a denoiser of
a tone with vibrato, without any label: what the network hears in the restored sound should be what it hears in the
clean one. It is also an example of a task term that does not pay, and of how to see that beforehand: ask first how much
the guide misses.
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


def bins(sound):
    """Where on its scale of pitches the network hears each tone; a bin is 20 cents."""
    with torch.no_grad():
        return hearing(as_crepe_wants(sound)).argmax(1)


def heard(sound, wanted):
    """Share of tones that the network hears within 50 cents of where it should."""
    return (20 * (bins(sound) - wanted).abs() <= 50).float().mean().item()


def periods(sound):
    """The pitch in cents by autocorrelation over 130 to 700 Hz: a judge that is no network and was never a guide."""
    power = torch.fft.rfft(sound[:, 0] - sound[:, 0].mean(1, keepdim=True), 2048).abs() ** 2
    lags = torch.arange(RATE // 700, RATE // 130)
    best = (torch.fft.irfft(power)[:, lags] / (1024 - lags)).argmax(1)
    return 1200 * torch.log2(RATE / lags[best])


# %%
# How much does the guide miss?
# -----------------------------
# The network was trained to shrug noise off. With little noise there is no room for any loss to help it.

hearing.eval()
levels = [0.25, 0.5, 1.0, 1.5, 2.0, 3.0]
clean = tones(200)
wanted = bins(clean)
room = [heard(clean + level * torch.randn(clean.shape), wanted) for level in levels]
for level, share in zip(levels, room, strict=True):
    print(f"noise {level:4.2f}: {share:4.0%} of the tones are heard right")

# %%
# What the terms ask of a noisy tone
# ----------------------------------

NOISE = 2.0  # where there is room: fourteen decibels above the tone
noisy = clean[:1] + 0.5 * torch.randn(1, 1, 1024)
figure = plot_gradient_maps(gradient_maps(loss, noisy, reference=clean[:1]), titles={"mse": "MSE"})

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
    for _ in range(60):
        sound = tones(8)
        adam.zero_grad()
        balancer.backward(denoiser(sound + NOISE * torch.randn(sound.shape)), reference=sound)
        adam.step()
    return denoiser


denoisers = {"MSE": trained({"mse": 1.0}), "MSE + pitch": trained({"mse": 1.0, "pitch": 1.0})}
noisy = clean + NOISE * torch.randn(clean.shape)
shares = {}
with torch.no_grad():
    for name, sound in {"noisy": noisy, **{name: net(noisy) for name, net in denoisers.items()}}.items():
        by_period = ((periods(sound) - periods(clean)).abs() <= 50).float().mean().item()
        shares[name] = (heard(sound, wanted), by_period)
        error = (sound - clean).square().mean()
        print(f"{name}: MSE {error:.3f}, the network {shares[name][0]:.0%}, autocorrelation {by_period:.0%}")

# %%
# Both denoisers take away nearly all of the noise, and a plain autocorrelation finds the pitch far more often than
# before. The network hears no better than in the noise itself, with the pitch term or without: what a robust network
# needs is not what MSE leaves, and a short training of a small denoiser does not find it. The bars are two standard
# errors wide; a difference within them is none.

figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
panels[0].plot(levels, room, "o-")
panels[0].axvline(NOISE, color="0.7", lw=1)
panels[0].set(xlabel="noise, standard deviation", ylabel="share of tones heard right", ylim=(0, 1.05))
panels[0].set_title("the guide, in the noise", fontsize=9)
for place, name in enumerate(shares):
    for offset, (share, judge) in enumerate(zip(shares[name], ("the network", "autocorrelation"), strict=True)):
        error = 2 * (share * (1 - share) / len(clean)) ** 0.5
        label = judge if place == 0 else None
        panels[1].bar(place + 0.36 * offset - 0.18, share, 0.34, yerr=error, color=f"C{offset}", label=label)
panels[1].set_xticks(range(len(shares)), shares)
panels[1].set_title("after two trainings", fontsize=9)
panels[1].legend(fontsize=8)
