"""Numbers that are not finite are named before they reach a weight: one guard and one sentence for every loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

# A GradScaler multiplies the loss by thousands, expects overflows and skips those steps itself.
_SCALED = 100.0

_MEND = {
    "x_hat": "x_hat is not finite; the denoiser diverged before it",
    "reference": "the reference is not finite; look at the data",
    "weights": "the critic's weights are not finite already; go back to a checkpoint",
}


def not_finite(
    names: Iterable[str],
    value: float,
    gradient: float | None = None,
    *,
    at: str = "x_hat",
    inputs: Mapping[str, Tensor | Iterable[Tensor] | None],
) -> FloatingPointError:
    """The error that names the terms and says which input was not finite already, if one was.

    Args:
        names: The terms to blame.
        value: The first one's value.
        gradient: The norm of its gradient, where that is known.
        at: What the gradient belongs to.
        inputs: What came in, by name: ``x_hat``, ``reference``, ``weights``; the first that is not finite is blamed.
    """
    found = f"the loss is {value}"
    if gradient is not None:
        found += f" and its gradient norm at {at} is {gradient}"
    reason = "x_hat is finite; look at this term's inputs"
    if math.isfinite(value) and gradient is not None:
        reason = "x_hat is finite; look at this term (the square root or norm of a zero?)"
    for name, tensors in inputs.items():
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors or []
        if not all(bool(torch.isfinite(t.detach()).all()) for t in tensors):
            reason = _MEND[name]
            break
    return FloatingPointError(f"{', '.join(names)}: {found} while {reason}")


def greatest(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """The largest absolute number of some gradients, still on the device: NaN and infinity survive in it."""
    given = [g.detach() for g in gradients if g is not None and g.numel()]
    if not given:
        return None
    if len(given) == 1:
        worst: Tensor = torch.linalg.vector_norm(given[0], math.inf).float()
        return worst
    # DTensor norms of several meshes cannot be stacked; whole ones can.
    norms = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in torch._foreach_norm(given, math.inf)]
    return torch.stack([n.float().to(norms[0].device) for n in norms]).max()


def watch_gradient(x_hat: Tensor, total: Tensor, complain: Callable[[], BaseException]) -> None:
    """Raise ``complain()`` in the backward pass, before anything behind ``x_hat`` has seen a gradient with NaN.

    Args:
        x_hat: A view of the image that belongs to this loss alone.
        total: The loss; its incoming gradient tells whether a loss scaler is at work.
        complain: Makes the error; called only when there is one.
    """
    scale: list[Tensor] = []

    def check(gradient: Tensor) -> None:
        worst = greatest([gradient])
        if worst is None or math.isfinite(worst):
            return
        if scale and abs(float(scale[0])) >= _SCALED:
            return
        raise complain()

    def note(gradient: Tensor) -> None:
        scale[:] = [gradient.detach()]

    total.register_hook(note)  # type: ignore[no-untyped-call]
    x_hat.register_hook(check)  # type: ignore[no-untyped-call]
