"""Any image criterion as a term: MSE, L1, SSIM, LPIPS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.algebra import Term
from taskloss.blame import who_blocks
from taskloss.checks import InputError, check_callable, check_image, check_same, shape
from taskloss.frozen import Frozen, hold
from taskloss.precision import full_precision, no_autocast
from taskloss.preprocess import Draw, only_reads, prepare
from taskloss.ranges import RangeCheck
from taskloss.reach import ReachCheck
from taskloss.values import to_scalar, zero_loss


class Fidelity(Term):
    r"""An image criterion between the restored image and the reference.

    .. math:: L(\hat x, x^*) = \mathrm{criterion}(\hat x, x^*)

    Shapes must be equal: nothing is broadcast. The criterion runs in float32 under autocast. A criterion that is a
    module is kept as a frozen copy, so nothing in it is trained, saved or switched to training mode.

    An ``lpips.LPIPS`` gets its blind spots covered: it must be given three channels, its range [-1, 1] is checked
    on the first reference, and its gradient is finite where features vanish.

    Args:
        criterion: ``criterion(x_hat, reference)``, a scalar or one value per sample.
        preprocess: Differentiable map applied to both images first (channels, range); where it is random, both see
            the same draw (``torch.compile`` breaks its graph there). A module augments as it came while the loss is in
            training mode.
        expects: Range of the criterion's input; checked after ``preprocess``, until a reference has shown it. Left
            out, it is (-1, 1) for LPIPS and unchecked for the rest; None never checks.
        generator: Seeds a random ``preprocess`` at each call, so that it can be repeated.

    Shape:
        x_hat and reference ``(N, C, *spatial)``.

    Returns:
        A scalar.

    Raises:
        InputError: For images that differ in shape, device or range, or a criterion that does not reduce.

    Example:
        >>> mse = Fidelity(nn.MSELoss())
        >>> mse(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
        tensor(1.)

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Eq. 5 and 6.
    """

    reads = "reference"

    def __init__(
        self,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor],
        *,
        preprocess: nn.Module | Callable[[Tensor], Tensor] | None = None,
        expects: tuple[float, float] | None | str = "known",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_callable(self.where, criterion, "criterion must be callable as criterion(x_hat, reference)")
        self.criterion = hold(criterion)
        self.preprocess = prepare(self.where, preprocess, generator)
        self._reach = ReachCheck()
        inner = self.criterion.network if isinstance(self.criterion, Frozen) else None
        self._lpips = inner is not None and _is_lpips(inner)
        if self._lpips:
            _mend_lpips_(inner)
        if isinstance(expects, str):
            expects = (-1.0, 1.0) if self._lpips else None
        self.check_range = RangeCheck(self.where, expects)

    def forward(self, x_hat: Tensor, reference: Tensor) -> Tensor:
        """The criterion between ``x_hat`` and ``reference``; see the class.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; a scalar comes back.
        """
        check_image(self.where, x_hat)
        check_same(self.where, x_hat, reference)
        if x_hat.shape[0] == 0:
            return zero_loss(x_hat)
        restored = x_hat
        if self.preprocess is not None or not only_reads(self.criterion):
            draw = Draw(self.preprocess, x_hat.device)
            x_hat, reference = draw(x_hat), draw(reference)
        if self._lpips and x_hat.shape[1] != 3:
            raise InputError(
                self.where,
                f"LPIPS needs 3 channels, got {shape(x_hat)}; pass preprocess=lambda x: x.expand(-1, 3, -1, -1)",
            )
        if not self.check_range.settled:
            self.check_range(self.where, reference)
        with no_autocast(x_hat.device):
            value = self.criterion(full_precision(x_hat), full_precision(reference))  # type: ignore[misc]
            value = to_scalar(self.where, value, restored.shape[0])
        return self._reach(self.where, value, restored, lambda: self._blame(restored))

    def _blame(self, x_hat: Tensor) -> str:
        return who_blocks(x_hat, self.preprocess) or "the criterion"


def _is_lpips(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.split(".")[0] == "lpips" and kind.__name__ == "LPIPS"


def _mend_lpips_(lpips: Any) -> None:
    # LPIPS divides features by sqrt(sum of squares): where that sum is zero (or underflows to it) the value is fine,
    # but the gradient is 0 * inf = NaN. Cutting the graph at exactly those positions leaves every value as it was.
    if not isinstance(lpips.net, _CutWhereZero):
        lpips.net = _CutWhereZero(lpips.net).eval()


class _CutWhereZero(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.trunk(image)
        return [torch.where(f.detach().square().sum(1, keepdim=True) == 0, f.detach(), f) for f in features]
