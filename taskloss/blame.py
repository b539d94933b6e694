"""Who stops the gradient on its way to x_hat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.arguments import arguments
from taskloss.reach import reaches
from taskloss.trees import tensors_in
from taskloss.watching import image_in, spell, watched, with_image


def who_blocks(
    x_hat: Tensor, preprocess: Callable[[Any], Any] | None, network: nn.Module | None = None, *own: Any, **more: Any
) -> str | None:
    """The part of a term that stops the gradient on its way to x_hat, or None if it comes after the network.

    It never fails itself: what goes wrong while it looks is no news to the caller.
    """
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.enable_grad():
        image = x_hat.detach().clone().requires_grad_()
        seen = image.clone() if preprocess is None else preprocess(image)
        if not any(reaches(t, image) for t in tensors_in(seen)):
            return "preprocess"
        if network is not None:
            positional, named = arguments(seen, more)
            name = find_blocker(network, (*positional, *own), named)
            return None if name is None else repr(name)
    return None


def find_blocker(network: nn.Module, inputs: Any, named: Mapping[str, Any] | None = None) -> str | None:
    """The innermost module that takes a gradient in and gives none out; None if there is none."""
    suspects: list[str] = []
    given = image_in((inputs, named))
    if given is None:
        return None
    image = given.detach().clone().requires_grad_()

    def after(name: str, _module: nn.Module, inputs: Any, result: Any) -> None:
        takes = any(reaches(t, image) for t in tensors_in(inputs))
        gives = any(reaches(t, image) for t in tensors_in(result))
        inner = any(name == "" or s.startswith((f"{name}.", f"{name}[")) for s in suspects)
        if takes and not gives and not inner:
            suspects.append(name)

    with torch.enable_grad():
        watched(network, *with_image((inputs, named), image.clone()), after=after)
    return spell(network, suspects[0]) if suspects else None
