"""What each term asks of the restored image: dL/dx_hat, as numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taskloss.algebra import LossSum, Term, as_sum
from taskloss.checks import InputError, check_image, require, shape
from taskloss.holdings import registered_tensors_of
from taskloss.precision import HALF, full_precision
from taskloss.randomness import RandomState

_SCALES = (2.0**15, 2.0**8, 1.0)  # tried in this order, until nothing overflows


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
    """The gradients dL_i/dx_hat of every term at one x_hat.

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

        Shape:
            roi ``(N, C, *spatial)``, ``(N, 1, *spatial)`` or ``(N, *spatial)``.

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
        nib = require("nibabel", "figures", "to_nifti")
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

    def to_html(
        self,
        path: str | Path,
        *,
        prediction: Tensor | None = None,
        roi: Tensor | None = None,
        sample: int = 0,
        channel: int = 0,
        axis: int = 0,
        window: tuple[float, float] | None = None,
        titles: Mapping[str, str] | None = None,
    ) -> Path:
        """Write one self-contained page: slices to scroll, terms to switch, values under the pointer.

        It needs no network and works by mouse, touch and keyboard, in light and dark. In a notebook:
        ``IPython.display.IFrame(maps.to_html("maps.html"), "100%", 700)``. Values are kept to three digits.

        Args:
            path: The file to write.
            prediction: T's output: class scores, shown as their arg max, or a map.
            roi: Mask for an outline and the focus numbers.
            sample: Which sample of the batch.
            channel: Which channel of the images.
            axis: Of volumes, the spatial axis to scroll along.
            window: Grey levels of the images; the reference's range if None.
            titles: Titles for terms, in place of their names.

        Shape:
            The maps ``(N, C, H, W)`` or ``(N, C, D, H, W)``; ``prediction`` ``(N, K, *spatial)``; ``roi`` of x_hat's
            shape, with one channel or without the channel axis.

        Returns:
            The path.

        Raises:
            InputError: For one-dimensional signals (see :func:`plot_gradient_maps`), an axis or sample that is not
                there, or a mask that does not fit.
        """
        from taskloss.page import Picture, Row, grey_levels, write_page  # here: importing the library stays quick

        if self.x_hat.dim() not in (4, 5):
            raise InputError(
                "to_html", f"shows images and volumes, got x_hat {shape(self.x_hat)}; plot_gradient_maps draws signals"
            )
        if axis not in range(self.x_hat.dim() - 2):
            raise InputError("to_html", f"axis must be below {self.x_hat.dim() - 2}, got {axis!r}")
        for name, index, size in (("sample", sample, len(self.x_hat)), ("channel", channel, self.x_hat.shape[1])):
            if not 0 <= index < size:
                raise InputError("to_html", f"{name} {index} is outside the {size} of x_hat {shape(self.x_hat)}")

        def volume(tensor: Tensor) -> Tensor:
            picked = tensor[sample, min(channel, tensor.shape[1] - 1)].detach()
            return picked.movedim(axis, 0) if picked.dim() == 3 else picked[None]

        grey = window or grey_levels(volume(self._compared))
        pictures = [
            Picture(name, volume(image), (0.0, max(float(image.max()), 1.0)) if is_classes else grey, is_classes)
            for name, image, is_classes in self._pictures(prediction)
        ]
        focus = {} if roi is None else self.focus(roi)
        weighted = {**self.maps, "total": self.total} if len(self.maps) > 1 and "total" not in self.maps else self.maps
        rows = [
            Row(
                name,
                (titles or {}).get(name, "total, weighted" if name not in self.maps else name),
                volume(gradient),
                self.weights.get(name),
                float(gradient.double().norm()),
                *focus.get(name, (None, None)),
            )
            for name, gradient in weighted.items()
        ]
        mask = None if roi is None else volume(self._mask(roi).float())
        depth = rows[0].volume.shape[0] if rows else 1
        start = depth // 2 if mask is None else int(mask.flatten(1).sum(1).argmax())
        first = [picture.name for picture in pictures].index("restored")
        return write_page(path, pictures, rows, mask, first, start)

    @property
    def _compared(self) -> Tensor:
        return self.x_hat if self.reference is None else self.reference

    def _pictures(self, prediction: Tensor | None) -> list[tuple[str, Tensor, bool]]:
        """What there is to see beside the maps, each ``(N, 1 or C, *spatial)``, and whether it is class indices."""
        found = [] if self.reference is None else [("reference", self.reference, False)]
        found.append(("restored", self.x_hat, False))
        spatial = self.x_hat.shape[2:]
        for name, target in (("label", self.label), ("prediction", prediction)):
            if not isinstance(target, Tensor) or target.shape[-len(spatial) :] != spatial:
                continue  # a class index or a box is no picture
            if target.dim() == self.x_hat.dim() - 1:
                target = target[:, None]
            if target.shape[1] > 1:
                target = target.argmax(1, keepdim=True)
            found.append((name, target, True))
        return found

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
    r"""The gradient of every term of a loss with respect to the restored image (equations 4 to 7 of the paper).

    .. math:: g_i = \partial L_i / \partial \hat x

    Nothing of the caller's is touched: x_hat is detached, and no ``.grad``, mode, flag, random state or turn changes.
    The gradients of an x_hat in half precision are taken in float32.

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
    with _looking(total, x_hat.device):
        for name, _, gradient in values_and_gradients(total, weights, x_hat, reference=reference, label=label):
            maps[name] = gradient
    kept = {name: weights[name] for name in maps}
    detached = None if reference is None else reference.detach()
    return GradientMaps(maps, kept, x_hat.detach(), detached, label)


def values_and_gradients(
    loss: LossSum, weights: Mapping[str, float], x_hat: Tensor, *, reference: Tensor | None, label: object
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, value and gradient at x_hat of each term that counts, on graphs of their own that end there.

    A gradient in half precision underflows: a mean over a million pixels leaves less than float16 can hold. So the
    graphs end at a float32 leaf, which a term gets as it is unless it holds weights in half precision; and where
    anything may run in float16, the value is scaled up on its way back.

    Shape:
        x_hat and reference ``(N, C, *spatial)``; values are scalars, gradients have x_hat's shape.
    """
    leaf = full_precision(x_hat.detach()).requires_grad_()
    found = []
    with torch.enable_grad(), loss.sharing(weights) as step:
        cast = None if leaf.dtype == x_hat.dtype else leaf.to(x_hat.dtype)
        for name, compute in loss.computations(weights, reference=reference, label=label):
            narrow = cast is not None and any(t.dtype in HALF for _, t in registered_tensors_of(loss.terms[name]))
            value = compute(cast if cast is not None and narrow else leaf)
            retain = step is not None and step.is_waited_for
            scales = _SCALES if _may_run_in_float16(x_hat) else (1.0,)
            for scale in scales:
                (gradient,) = torch.autograd.grad(
                    value, leaf, torch.full_like(value, scale), retain_graph=retain or scale > 1, materialize_grads=True
                )
                if scale == 1 or bool(torch.isfinite(gradient).all()):
                    break
            found.append((name, value.detach(), gradient if scale == 1 else gradient / scale))
            del value
    return found


def _may_run_in_float16(x_hat: Tensor) -> bool:
    kind = x_hat.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return autocast or x_hat.dtype == torch.float16


@contextlib.contextmanager
def _looking(loss: LossSum, device: torch.device) -> Iterator[None]:
    """Leave the random states, and what terms count or keep in their extra state, as they were."""
    counting = [m for m in loss.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
    states = [copy.deepcopy(module.get_extra_state()) for module in counting]
    generators = [m.generator for m in loss.modules() if isinstance(getattr(m, "generator", None), torch.Generator)]
    before = RandomState(device, tuple(generators))
    try:
        yield
    finally:
        before.restore()
        for module, state in zip(counting, states, strict=True):
            module.set_extra_state(state)
