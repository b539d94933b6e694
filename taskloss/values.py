"""What a computation of a loss gives: scalars that back-propagate, and plain numbers of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taskloss.checks import InputError
from taskloss.finite import not_finite
from taskloss.precision import full_precision


@dataclass(frozen=True)
class LossValue:
    """One computation of a loss, seen whole.

    Attributes:
        total: Scalar ``sum_i w_i L_i``; call ``backward()`` on it.
        terms: Unweighted scalars by name, without the terms whose weight is zero.
        weights: The weight that each term had, zeros included.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    _numbers: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def floats(self, prefix: str = "") -> dict[str, float]:
        """Plain numbers for a logger: every term by name, and ``total``; at most one device sync.

        Example:
            >>> from taskloss import Fidelity, LossSum
            >>> loss = LossSum(mse=0.5 * Fidelity(torch.nn.MSELoss()))
            >>> loss.breakdown(torch.ones(1, 1, 4), reference=torch.zeros(1, 1, 4)).floats("g/")
            {'g/mse': 1.0, 'g/total': 0.5}
        """
        if not self._numbers:
            self._numbers.update(to_numbers({**self.terms, "total": self.total}))
        return {prefix + name: number for name, number in self._numbers.items()}

    def floats_and(self, extra: Tensor) -> float:
        """One more scalar as a plain number, in the same device sync as :meth:`floats`.

        Shape:
            A tensor of one element.
        """
        *numbers, last = to_numbers({**self.terms, "total": self.total, "": extra}).values()
        self._numbers.update(zip([*self.terms, "total"], numbers, strict=True))
        return last


def zero_loss(x_hat: Tensor) -> Tensor:
    """A zero that still back-propagates: to zeros, even where x_hat is not finite."""
    return full_precision(x_hat[:0]).sum()  # type: ignore[no-any-return]


def to_scalar(where: str, value: object, n_samples: int) -> Tensor:
    """The mean of a criterion that gives one number per sample; a scalar as it is; anything else is refused."""
    if isinstance(value, (int, float)) and value == 0:  # criteria that found nothing to compare
        return torch.zeros(())
    if isinstance(value, Tensor) and value.numel() in (1, n_samples) and value.numel() > 0:
        return value if value.dim() == 0 else value.mean()
    what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    mend = "reduce it with .mean()" if isinstance(value, Tensor) else "return the loss itself, as a tensor"
    raise InputError(where, f"the criterion must return a scalar or one value per sample, got {what}; {mend}")


def to_numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars to Python floats in a single transfer from the device."""
    if not tensors:
        return {}
    wide = any(t.dtype == torch.float64 for t in tensors.values())
    dtype = torch.float64 if wide else torch.float32
    values = torch.stack([t.detach().to(dtype) for t in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def check_finite(value: LossValue, *, within: str = "", **inputs: Tensor | Iterable[Tensor] | None) -> None:
    """Name the terms that are NaN or infinite, and say which input was so already."""
    bad = [name for name, number in value.floats().items() if not math.isfinite(number)]
    if bad:
        culprits = [name for name in bad if name != "total"] or bad
        raise not_finite([within + name for name in culprits], value.floats()[culprits[0]], inputs=inputs)
