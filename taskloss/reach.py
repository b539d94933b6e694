"""Whether the gradient of a value reaches the restored image, read off autograd's graph without running it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from taskloss.checks import InputError, readable

# What autograd puts where an operation has no derivative: a backward pass stops there without a word.
_DEAD_ENDS = ("torch::autograd::NotImplemented", "torch::autograd::WarnNotImplemented")


class ReachCheck:
    """Refuses a term whose gradient does not reach x_hat: by its graph once, and by ``requires_grad`` at every call."""

    def __init__(self) -> None:
        self.settled = False

    def __call__(self, where: str, value: Tensor, x_hat: Tensor, blame: Callable[[], str]) -> Tensor:
        """The value, which back-propagates to x_hat.

        A constant zero passes: criteria give one where there is nothing to compare, as on an empty target.

        Args:
            where: The term.
            value: Its scalar.
            x_hat: What it was made of.
            blame: Finds who blocks the gradient; called only where it is blocked.

        Raises:
            InputError: If the gradient is blocked.
        """
        if not (x_hat.requires_grad and torch.is_grad_enabled()):
            return value.to(x_hat.device)
        can_read = readable(value, x_hat)
        if value.requires_grad and (self.settled or not can_read or reaches(value, x_hat)):
            self.settled = self.settled or can_read
            return value
        if not value.requires_grad and can_read and not value.any():
            return value + x_hat[:0].sum().to(value.dtype)
        raise InputError(where, f"the gradient does not reach x_hat; {blame()} blocks it (see audit_task_model)")


def reaches(value: Tensor, source: Tensor) -> bool:
    """Whether a differentiable path leads from ``value`` back to ``source``; True where no graph can be read."""
    if not value.requires_grad:
        return False
    if value is source or value.grad_fn is None:  # torch.func keeps its graphs to itself
        return True
    with torch.enable_grad():
        view = source.view_as(source).grad_fn
    if view is None:
        return True
    goal = view.next_functions[0]
    if (value.grad_fn, value.output_nr) == goal:
        return True
    seen, todo = {value.grad_fn}, [value.grad_fn]
    while todo:
        node = todo.pop()
        if node.name() in _DEAD_ENDS:
            continue
        for edge in node.next_functions:
            if edge == goal:
                return True
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                todo.append(edge[0])
    return False
