"""The idea on volumes, on one page: a frozen U-Net guides a denoiser of low-dose CT phantoms.

    python -m examples.phantom_loop

Under a minute on one core. A U-Net learns to find the liver at normal dose and is then frozen inside the loss. Two
denoisers start from the same weights and see the same batches; only one has the task term. The loop is the plain one of
the README, in 3-D. At the end come both denoisers' numbers and the paper's Fig. 2: what each term asks of x_hat.
`examples/tod_net_ct` is the whole pipeline.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from examples.tod_net_ct.dose import low_dose, to_unit
from examples.tod_net_ct.scans import abdominal_phantom, organ_mask
from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientBalancer,
    LossSum,
    TaskOrientedLoss,
    WassersteinCritic,
    gradient_maps,
    plot_gradient_maps,
)

SHAPE, VOXEL_MM = (8, 40, 40), (10.0, 10.0, 10.0)
I0_PHOTONS = 1.5e4
SHARES = {"adv": 0.1, "task": 2.0, "mse": 1.0}


def phantoms(seeds: range) -> tuple[Tensor, Tensor, Tensor]:
    """Low dose and normal dose in [0, 1] and the liver's mask, each `(N, 1, D, H, W)`."""
    patients = [abdominal_phantom(seed, SHAPE, VOXEL_MM) for seed in seeds]
    low = [
        low_dose(p.volume_hu, VOXEL_MM, I0_PHOTONS, generator=seed, kernel="ramp", n_views=60).volume_hu
        for seed, p in zip(seeds, patients, strict=True)
    ]
    masks = torch.stack([organ_mask(p.label, "liver") for p in patients])
    low, normal = (to_unit(torch.stack(v)[:, None]) for v in (low, [p.volume_hu for p in patients]))
    return low, normal, masks[:, None].float()


class SmallUNet(nn.Module):
    """Two levels with one skip: a segmentation network that gives logits, or a denoiser that adds to its input."""

    def __init__(self, width: int = 8, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.enter = nn.Sequential(nn.Conv3d(1, width, 3, padding=1), nn.ReLU())
        self.deep = nn.Sequential(
            nn.Conv3d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv3d(2 * width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.Conv3d(2 * width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose3d(2 * width, width, 2, stride=2), nn.ReLU(),
        )  # fmt: skip
        self.leave = nn.Conv3d(2 * width, 1, 3, padding=1)

    def forward(self, volume: Tensor) -> Tensor:
        """The same shape: logits, or the restored volume."""
        wide = self.enter(volume)
        change = self.leave(torch.cat([wide, self.deep(wide)], 1))
        return volume + change if self.residual else change


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Eq. 3 of the paper: one minus the soft Dice."""
    found = logits.sigmoid()
    return 1 - 2 * (found * mask).sum() / (found.square().sum() + mask.square().sum())


def trained_unet(normal: Tensor, mask: Tensor, steps: int) -> nn.Module:
    """The task network, on normal dose: trained before it guides anything, and never after."""
    torch.manual_seed(0)
    unet = SmallUNet()
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    for pick in torch.randint(0, len(normal), (steps, 4)):
        optimizer.zero_grad()
        dice_loss(unet(normal[pick]), mask[pick]).backward()
        optimizer.step()
    return unet


def trained_denoiser(
    unet: nn.Module | None, low: Tensor, normal: Tensor, mask: Tensor, steps: int
) -> tuple[nn.Module, LossSum]:
    """The loop of the README; without a U-Net the same loop has no task term."""
    torch.manual_seed(1)
    denoiser = SmallUNet(residual=True)
    critic = WassersteinCritic(patch_size=SHAPE, channels=(4, 8, 16))
    loss = LossSum(adv=AdversarialLoss(critic), mse=Fidelity(nn.MSELoss()))
    if unet is not None:
        loss = loss + LossSum(task=TaskOrientedLoss(unet, dice_loss))
    balancer = GradientBalancer(loss, shares={name: SHARES[name] for name in loss.weights})
    opt_g = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    opt_d = torch.optim.RMSprop(critic.parameters(), lr=5e-4)
    for pick in torch.randint(0, len(low), (steps, 2), generator=torch.Generator().manual_seed(2)):
        x_hat = denoiser(low[pick])
        critic.step(opt_d, x_hat.detach(), normal[pick])
        opt_g.zero_grad()
        balancer.backward(x_hat, reference=normal[pick], label=mask[pick])
        opt_g.step()
    return denoiser.eval(), loss


def main(arguments: list[str] | None = None) -> None:
    """Train both, print their numbers on phantoms that nobody saw, and draw Fig. 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--figure", default="phantom_loop.png", help="where the gradient maps are drawn")
    args = parser.parse_args(arguments)
    training, test = phantoms(range(12)), phantoms(range(100, 106))
    unet = trained_unet(*training[1:], args.steps)
    low, normal, mask = test
    rows = {"low dose": low, "normal dose": normal}
    for name, guide in (("adv + mse", None), ("adv + mse + task", unet)):
        denoiser, loss = trained_denoiser(guide, *training, args.steps)
        with torch.no_grad():
            rows[name] = denoiser(low)
    print(f"{'':<18}{'RMSE':>8}{'Dice loss of the U-Net':>24}   ({len(low)} phantoms that no training saw)")
    for name, volume in rows.items():
        with torch.no_grad():
            print(f"{name:<18}{(volume - normal).square().mean().sqrt():>8.4f}{dice_loss(unet(volume), mask):>24.4f}")
    maps = gradient_maps(loss, rows["adv + mse + task"][:1], reference=normal[:1], label=mask[:1])
    plot_gradient_maps(maps, roi=mask[:1], window=(0, 1)).savefig(args.figure)
    shares = ", ".join(f"{name} {focus.share:.0%}" for name, focus in maps.focus(mask[:1]).items())
    print(f"gradient energy inside the liver: {shares}; drawn in {args.figure}")


if __name__ == "__main__":
    main()
