"""Why a network refused its input: torch's error, told in terms of x_hat and of what to type."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.checks import shape

_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
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
    return _unlike_first_layer(network, image, who)


def _unlike_first_layer(network: nn.Module, image: Tensor, who: str) -> str | None:
    first: Any = next((m for m in network.modules() if isinstance(m, tuple(_CONVS))), None)
    if first is None:
        return None
    kind, axes = next((kind, n) for kind, n in _CONVS.items() if isinstance(first, kind))
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


def explains_double_backward(error: RuntimeError) -> bool:
    """Whether an error says that something cannot be differentiated twice."""
    return _TWICE.search(str(error)) is not None
