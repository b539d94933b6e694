"""A term as a function of x_hat alone, kept from changing what the terms after it see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.checks import InputError, readable
from taskloss.trees import map_tensors, tensors_in


def function_of_image(name: str, term: nn.Module, target: object) -> Callable[[Tensor], Tensor]:
    """The term with its target filled in; errors carry ``name``, and a write on an input in place is one."""

    def compute(x_hat: Tensor) -> Tensor:
        given: dict[str, Any] = {"x_hat": x_hat}
        if target is not None:
            given[getattr(term, "reads", None) or "target"] = target
        # Where nobody counts writes (compiled, torch.func, inference mode) a term gets a copy to write on.
        given = {what: map_tensors(v, lambda t: t if _counts_writes(t) else t.clone()) for what, v in given.items()}
        versions = {what: _versions(v) for what, v in given.items()}
        try:
            value = term(*given.values())
        except InputError as error:
            raise error.at(name) from None
        for what, v in given.items():
            if _versions(v) != versions[what]:
                raise InputError(
                    name,
                    f"it writes on its {what} in place, which the terms after it would see; let it work on a clone",
                )
        if not isinstance(value, Tensor) or value.dim() != 0:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(name, f"a term must return a scalar, got {what}; reduce it with .mean()")
        return value

    return compute


def gradient_norm(compute: Callable[[Tensor], Tensor], x_hat: Tensor) -> float:
    """The norm of one term's gradient at x_hat; taken once more when the sum's gradient has failed already."""
    leaf = x_hat.clone().requires_grad_()
    devices = [x_hat.device] if x_hat.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        (gradient,) = torch.autograd.grad(compute(leaf), leaf, materialize_grads=True)
    return float(torch.linalg.vector_norm(gradient))


def _counts_writes(tensor: Tensor) -> bool:
    return readable(tensor) and not tensor.is_inference()


def _versions(tree: object) -> list[int]:
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors_in(tree) if _counts_writes(tensor)]
