"""The paper's Fig. 2: what each loss asks of the restored image, drawn side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from taskloss.checks import InputError, require
from taskloss.gradients import Focus, GradientMaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_gradient_maps(
    maps: GradientMaps,
    *,
    prediction: Tensor | None = None,
    roi: Tensor | None = None,
    sample: int = 0,
    channel: int = 0,
    axis: int = 0,
    index: int | None = None,
    scale: Literal["own", "shared"] = "own",
    window: tuple[float, float] | None = None,
    titles: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the reference, x_hat, label and T's output above one map dL_i/dx_hat per term.

    The maps are diverging and centred on zero, each with its colour bar. With a ``roi`` its outline is drawn, and
    each map's title tells the share of the gradient's energy inside and that share over the region's share of the
    area (:class:`Focus`). One-dimensional signals are drawn as lines under each other, the ``roi`` shaded.

    Args:
        maps: From :func:`gradient_maps`; its reference, x_hat and label make the first row.
        prediction: T's output: class scores ``(N, K, *spatial)``, drawn as their arg max, or a map.
        roi: Mask for the outline and the focus numbers.
        sample: Which sample of the batch.
        channel: Which channel of the images.
        axis: Of volumes, the spatial axis to cut across.
        index: Of volumes, the slice; the middle of the ROI or of the volume if None.
        scale: ``"own"`` scales every map by its own 99.5th percentile (a signal by its peak); ``"shared"`` all by the
            largest, so that maps compare.
        window: Grey levels of the images; the reference's range if None.
        titles: Titles for terms, in place of their names.

    Returns:
        A matplotlib figure; save it with ``figure.savefig("maps.png")``.

    Shape:
        The maps ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``; ``prediction`` ``(N, K, *spatial)``; ``roi`` of
        x_hat's shape, with one channel or without the channel axis.

    Raises:
        InputError: For an index outside the volume or a mask that does not fit.

    Example:
        >>> from taskloss import Fidelity, gradient_maps
        >>> maps = gradient_maps(Fidelity(torch.nn.L1Loss()), torch.rand(1, 1, 8, 8), reference=torch.rand(1, 1, 8, 8))
        >>> figure = plot_gradient_maps(maps, titles={"fidelity": "L1"})

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Fig. 2.
    """
    require("matplotlib", "figures", "plot_gradient_maps")
    from matplotlib.figure import Figure

    if scale not in ("own", "shared"):
        raise ValueError(f"plot_gradient_maps: scale must be 'own' or 'shared', got {scale!r}")
    cut = _Cut(maps.x_hat, sample, channel, axis, index, roi)
    focus = {} if roi is None else maps.focus(roi)
    top = _images(maps, prediction, cut)
    slices = {name: cut(gradient) for name, gradient in maps.maps.items()}
    is_signal = maps.x_hat.dim() == 3
    limits = {name: 1.05 * _peak(image) if is_signal else _limit(image) for name, image in slices.items()}
    if scale == "shared":
        limits = dict.fromkeys(limits, max(limits.values(), default=1.0))
    named = {name: _title(name, titles or {}, focus.get(name)) for name in slices}
    outline = None if roi is None else cut(maps._mask(roi).float())
    if is_signal:
        from taskloss.signals import draw_signals

        lines = {title: line for title, (line, is_classes) in top.items() if not is_classes}
        classes = {title: line for title, (line, is_classes) in top.items() if is_classes}
        return draw_signals(lines, classes, slices, named, limits, None if outline is None else outline > 0, window)
    columns = max(len(top), len(slices), 1)
    height, width = cut(maps.x_hat).shape
    rows_inches = 2 * (2.3 * min(max(height / width, 0.4), 2.5) + 0.6)  # as high as the panels are, and their titles
    figure = Figure(figsize=(2.9 * columns, rows_inches), layout="constrained", dpi=130)
    grid = figure.subplots(2, columns, squeeze=False)
    for panel in grid.flat:
        panel.set_axis_off()
    grey = window or _window(maps, cut)
    for panel, (title, (image, is_classes)) in zip(grid[0], top.items(), strict=False):
        if is_classes:
            panel.imshow(image, cmap="viridis", interpolation="nearest", vmin=0, vmax=max(float(image.max()), 1.0))
        else:
            panel.imshow(image, cmap="gray", vmin=grey[0], vmax=grey[1])
        panel.set_title(title, fontsize=10)
    for panel, (name, image) in zip(grid[1], slices.items(), strict=False):
        limit = limits[name]
        drawn = panel.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
        bar = figure.colorbar(drawn, ax=panel, shrink=0.75, pad=0.02)
        bar.ax.tick_params(labelsize=7)
        bar.ax.ticklabel_format(style="sci", scilimits=(-2, 2))
        bar.ax.yaxis.get_offset_text().set_fontsize(7)
        panel.set_title(named[name], fontsize=8 if name in focus else 10)
        if outline is not None and outline.any():
            panel.contour(outline, levels=[0.5], colors="k", linewidths=0.6)
    return figure


def _title(name: str, titles: Mapping[str, str], focus: Focus | None) -> str:
    title = r"$\partial L/\partial\hat{x}$, " + titles.get(name, name)
    if focus is not None:
        title += f"\n{focus.share:.0%} in the ROI ({focus.ratio:.1f}x its area)"
    return title


class _Cut:
    """One channel of one sample, of a volume one slice of it, as a NumPy array."""

    def __init__(
        self, x_hat: Tensor, sample: int, channel: int, axis: int, index: int | None, roi: Tensor | None
    ) -> None:
        self.sample, self.channel, self.axis = sample, channel, axis
        self.is_volume = x_hat.dim() == 5
        self.index = 0
        if self.is_volume:
            if axis not in (0, 1, 2):
                raise InputError("plot_gradient_maps", f"axis must be 0, 1 or 2, got {axis!r}")
            size = x_hat.shape[2 + axis]
            self.index = self._middle(roi, size) if index is None else index
            if not 0 <= self.index < size:
                raise InputError("plot_gradient_maps", f"index {index} is outside the {size} slices of axis {axis}")

    def __call__(self, tensor: Tensor) -> Any:
        image = tensor[self.sample, min(self.channel, tensor.shape[1] - 1)]
        if self.is_volume:
            image = image.select(self.axis, self.index)
        return image.detach().float().cpu().numpy()

    def _middle(self, roi: Tensor | None, size: int) -> int:
        if roi is None or not bool((roi[self.sample] != 0).any()):
            return size // 2
        mask = roi[self.sample] != 0
        spatial = mask if mask.dim() == 3 else mask.any(0)
        others = [a for a in range(3) if a != self.axis]
        return int(spatial.sum(dim=others).argmax())  # the slice that shows most of it


TITLES = {"reference": "reference $x^*$", "restored": r"restored $\hat{x}$", "prediction": r"$T(\hat{x})$"}


def _images(maps: GradientMaps, prediction: Tensor | None, cut: _Cut) -> dict[str, tuple[Any, bool]]:
    found = maps._pictures(prediction)
    return {TITLES.get(name, name): (cut(image), is_classes) for name, image, is_classes in found}


def _limit(image: Any) -> float:
    magnitude = torch.from_numpy(image).abs().flatten()
    return float(torch.quantile(magnitude, 0.995)) or _peak(image)


def _peak(image: Any) -> float:
    return float(abs(image).max()) or 1.0


def _window(maps: GradientMaps, cut: _Cut) -> tuple[float, float]:
    image = cut(maps._compared)
    return float(image.min()), float(image.max())
