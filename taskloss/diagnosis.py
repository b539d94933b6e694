"""Why a network refused its input: torch's error, told in terms of x_hat and of what to type."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.arguments import images_in
from taskloss.checks import InputError, shape

_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_ABOUT_SHAPE = re.compile(r"channel|shape|size|dim|input|elements|match|mat1", re.IGNORECASE)
_TWICE = re.compile(r"double.?backward|differentiate twice|derivative for \S+ is not implemented", re.IGNORECASE)


def refusal(error: Exception, network: nn.Module, image: Tensor, *, who: str, owner: str) -> str | None:
    """One sentence for an error that the network raised, or None where the input is not at fault.

    Asked only after a failure: a network may well take an image that its first convolution would not.

    Args:
        error: What the network raised.
        network: It.
        image: Its input.
        who: ``"the task network"`` or ``"the critic"``.
        owner: What the caller moves and casts: ``"loss"`` or ``"critic"``.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return None
    if "Batch norm got a batched tensor" in str(error):
        return f"a batch norm that is training mixes samples and has no per-sample gradient; call {owner}.eval()"
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)
    if weight is not None and weight.device != image.device:
        return f"the images are on {image.device} but {who} is on {weight.device}; call {owner}.to('{image.device}')"
    if weight is not None and weight.dtype != image.dtype and image.is_floating_point() and "type" in str(error):
        return f"the images are {image.dtype} but {who} is {weight.dtype}; call {owner}.to({image.dtype})"
    return _unlike_first_layer(network, image, who) if _ABOUT_SHAPE.search(str(error)) else None


def told(
    where: str,
    network: nn.Module,
    image: Any,
    run: Callable[[], Any],
    *,
    who: str = "the task network",
    owner: str = "loss",
) -> Any:
    """Run, and tell the network's own complaint about its input in terms of x_hat.

    Raises:
        InputError: In place of the network's error, where the input is at fault.
    """
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except InputError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        found = images_in(image)
        sentence = refusal(error, network, found[0], who=who, owner=owner) if found else None
        if sentence is None:
            raise
        raise InputError(where, sentence) from error


def refusal_of_prediction(network: nn.Module, image: Tensor, prediction: object) -> str | None:
    """One sentence for an error that the criterion raised, where image and prediction both lack the batch axis."""
    if not isinstance(prediction, Tensor) or prediction.dim() != image.dim():
        return None
    first = _first_convolution(network)
    unbatched = first is not None and image.dim() == first[2] + 1
    return _unlike_first_layer(network, image, "the task network") if unbatched else None


def _unlike_first_layer(network: nn.Module, image: Tensor, who: str) -> str | None:
    found = _first_convolution(network)
    if found is None:
        return None
    first, kind, axes = found
    got = f"x_hat {shape(image)} has {image.dim()} axes"
    takes = f"the first layer of {who} is a {kind.__name__}, which takes {axes + 2}"
    if image.dim() == axes + 1:
        return f"{got} but {takes}; add the batch axis with x_hat[None], or give the missing one with preprocess=..."
    if image.dim() != axes + 2:
        return f"{got} but {takes}; give it such images with preprocess=..."
    have, want = image.shape[1], first.in_channels
    if have == want:
        return None
    expand = f"lambda x: x.expand(-1, {want}, {', '.join(['-1'] * axes)})" if have == 1 else "a map to those channels"
    return f"x_hat {shape(image)} has {have} channels but {who} takes {want}; pass preprocess={expand}"


def _first_convolution(network: nn.Module) -> tuple[Any, type[nn.Module], int] | None:
    for module in network.modules():
        for kind, axes in _CONVS.items():
            if isinstance(module, kind):
                return module, kind, axes
    return None


def explains_double_backward(error: RuntimeError) -> bool:
    """Whether an error says that something cannot be differentiated twice."""
    return _TWICE.search(str(error)) is not None
