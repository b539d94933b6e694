"""What each term asks of the restored image: dL/dx_hat, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taskloss.algebra import LossSum, Term, as_sum
from taskloss.checks import InputError, check_image, shape


class Focus(NamedTuple):
    """How much of a gradient lies in a region.

    Attributes:
        share: Share of the gradient's energy (sum of squares) inside the region, 0 to 1; NaN for a zero gradient.
        ratio: The share over the region's share of the area: 1 for a gradient that ignores the region.
    """

    share: float
    ratio: float


@dataclass(frozen=True)
class GradientMaps:
    r"""The gradients :math:`\partial L_i / \partial \hat x` of every term at one x_hat.

    Attributes:
        maps: Unweighted gradients by term, each of x_hat's shape.
        weights: The weight of each term in the sum.
        x_hat: The restored image that they belong to, detached.
        reference: The reference, if one was given.
        label: The label, if one was given.
    """

    maps: dict[str, Tensor]
    weights: dict[str, float]
    x_hat: Tensor
    reference: Tensor | None = None
    label: object = None

    @property
    def total(self) -> Tensor:
        """The gradient of the whole sum, ``sum_i w_i g_i``."""
        total = torch.zeros_like(self.x_hat)
        for name, gradient in self.maps.items():
            total = total + self.weights[name] * gradient
        return total

    def norms(self) -> dict[str, float]:
        """The L2 norm of each unweighted gradient over the whole batch."""
        return {name: float(g.double().norm()) for name, g in self.maps.items()}

    def cosines(self) -> dict[str, dict[str, float]]:
        """The cosine between every two gradients: below zero, two terms pull x_hat apart; NaN for a zero one."""
        flat = {name: g.double().flatten() for name, g in self.maps.items()}
        return {
            a: {b: float(torch.dot(u, v) / (u.norm() * v.norm())) for b, v in flat.items()} for a, u in flat.items()
        }

    def focus(self, roi: Tensor) -> dict[str, Focus]:
        """The share of each gradient's energy inside a region, and that share over the region's share of the area.

        Args:
            roi: Boolean or 0/1 mask, of x_hat's shape or with one channel or without the channel axis.

        Raises:
            InputError: If the mask does not fit x_hat, or is empty.
        """
        inside = self._mask(roi)
        area = float(inside.double().mean())
        found = {}
        for name, gradient in self.maps.items():
            energy = gradient.double().square()
            share = float((energy * inside).sum() / energy.sum())
            found[name] = Focus(share, share / area)
        return found

    def rescaled(self, weights: Mapping[str, float]) -> GradientMaps:
        """The same maps under other weights."""
        return replace(self, weights=dict(weights))

    def to_nifti(self, path: str | Path, affine: Any, *, sample: int = 0, channel: int = 0) -> list[Path]:
        """Write one NIfTI volume per term, ``maps.nii.gz`` becoming ``maps_<term>.nii.gz``.

        Args:
            path: Where to; the term's name is put before the suffix.
            affine: 4x4 matrix from voxel indices, in the order of x_hat's three spatial axes, to millimetres.
            sample: Which sample of the batch.
            channel: Which channel.

        Raises:
            InputError: If x_hat is not three-dimensional.
        """
        import nibabel as nib
        import numpy as np

        if self.x_hat.dim() != 5:
            raise InputError("to_nifti", f"needs volumes (N, C, D, H, W), got {shape(self.x_hat)}")
        path = Path(path)
        stem = path.name.removesuffix(".gz").removesuffix(".nii")
        suffix = path.name[len(stem) :] or ".nii.gz"
        written = []
        for name, gradient in self.maps.items():
            target = path.with_name(f"{stem}_{name.replace('/', '_')}{suffix}")
            part = target.with_name(f".part-{target.name}")
            volume = gradient[sample, channel].float().cpu().numpy()
            nib.save(nib.Nifti1Image(volume, np.asarray(affine, dtype=float)), part)
            part.replace(target)
            written.append(target)
        return written

    def _mask(self, roi: Tensor) -> Tensor:
        mask = roi.to(self.x_hat.device) != 0
        if mask.dim() == self.x_hat.dim() - 1:
            mask = mask[:, None]
        fits = mask.dim() == self.x_hat.dim() and all(
            m == n or (axis == 1 and m == 1)
            for axis, (m, n) in enumerate(zip(mask.shape, self.x_hat.shape, strict=True))
        )
        if not fits:
            raise InputError("focus", f"roi {shape(roi)} does not fit x_hat {shape(self.x_hat)}")
        if not mask.any():
            raise InputError("focus", "roi is empty; there is nothing to focus on")
        return mask.expand_as(self.x_hat)


def gradient_maps(
    loss: Term | LossSum,
    x_hat: Tensor,
    *,
    reference: Tensor | None = None,
    label: object = None,
    step: int | None = None,
) -> GradientMaps:
    r"""The gradient of every term of a loss with respect to the restored image (Eq. 4-7 of the paper).

    .. math:: g_i = \partial L_i / \partial \hat x

    Nothing of the caller's is touched: x_hat is detached, and no ``.grad``, mode or flag changes.

    Args:
        loss: A term or a sum.
        x_hat: Restored batch.
        reference: For terms that read one.
        label: For terms that read one.
        step: For weights that are schedules.

    Shape:
        x_hat ``(N, C, *spatial)``; so are the maps.

    Raises:
        InputError: For a missing target.

    Example:
        >>> from taskloss import Fidelity
        >>> maps = gradient_maps(Fidelity(torch.nn.MSELoss()), torch.ones(1, 1, 4), reference=torch.zeros(1, 1, 4))
        >>> maps.maps["fidelity"]
        tensor([[[0.5000, 0.5000, 0.5000, 0.5000]]])

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, section 2.2.
    """
    check_image("gradient_maps", x_hat)
    if torch.is_inference_mode_enabled():
        raise InputError(
            "gradient_maps", "gradients need autograd, which inference mode turns off; use torch.no_grad()"
        )
    total = as_sum(loss)
    weights = total.weights_at(step)
    maps = {}
    for name, compute in total.computations(weights, reference=reference, label=label):
        _, maps[name] = value_and_gradient(compute, x_hat)
    kept = {name: weights[name] for name in maps}
    detached = None if reference is None else reference.detach()
    return GradientMaps(maps, kept, x_hat.detach(), detached, label)


def value_and_gradient(compute: Any, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    """One term and its gradient at x_hat, on a graph of their own that ends there."""
    leaf = x_hat.detach().requires_grad_()
    with torch.enable_grad():
        value = compute(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True)
    return value.detach(), gradient
