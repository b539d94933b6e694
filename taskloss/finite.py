"""Numbers that are not finite are named before they reach a weight: one guard and one sentence for every loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from taskloss.distributed import is_sharded

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
    """The largest absolute number of some gradients, still on the device: NaN and infinity survive in it.

    Of gradients that processes hold in parts, it is the largest of all parts, so that all processes decide alike.
    """
    given = [g.detach() for g in gradients if g is not None and g.numel()]
    if not given:
        return None
    if len(given) == 1 and not is_sharded(given[0]):
        return torch.linalg.vector_norm(given[0], math.inf).float()  # type: ignore[no-any-return]
    parts = [getattr(g, "to_local")() if is_sharded(g) else g for g in given]  # noqa: B009 - a DTensor alone has it
    norms = torch._foreach_norm([p for p in parts if p.numel()] or [parts[0].new_zeros(1)], math.inf)
    worst = torch.stack([n.float().to(norms[0].device) for n in norms]).max()
    if any(is_sharded(g) for g in given):
        worst = worst.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum over processes may lose a NaN
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst


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
