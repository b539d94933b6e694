"""3-D convolutions of a single volume on a CPU, through oneDNN where PyTorch would take a far slower kernel.

PyTorch leaves a small batch of one to a kernel of its own, ``slow_conv3d``, by a rule made for images (``use_mkldnn``
in its ``aten/src/ATen/native/Convolution.cpp``; up to 20,480 values of channels x slices x rows, as of torch 2.14). It
unfolds the volume into a matrix 27 times as large. In the middle levels of a U-Net oneDNN takes a fraction of its time
(``benchmarks/lean.py``); it rounds otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from taskloss.eager import is_eager

aten = torch.ops.aten
_OWN = frozenset((Tensor, nn.Parameter))
_OWN_KERNELS: Any = torch._C._ConvBackend  # type: ignore[attr-defined]
_ONES, _ZEROS = [1, 1, 1], [0, 0, 0]


def quicken_(network: nn.Module) -> None:
    """Let every plain 3-D convolution of a network take the faster kernel where PyTorch would not.

    Args:
        network: It is changed: the modules stay, with their weights and hooks, and the class of those that may gain
            (of stride 1, without groups, looking at neighbours) becomes `QuickConv3d`.
    """
    for module in network.modules():
        if type(module) is nn.Conv3d and _may_gain(module):
            module.__class__ = QuickConv3d


class QuickConv3d(nn.Conv3d):
    """``nn.Conv3d`` that looks at its input before it takes a kernel."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if _may_gain(self) and _is_left(input, weight, bias, self.padding, self.dilation):
            return Direct.apply(input, weight, bias, self.padding, self.dilation)  # type: ignore[no-any-return]
        return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]


class Direct(Function):
    """A convolution of stride 1 with frozen weights, whose gradient is one too: by the weight turned round."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dilation = dilation
        ctx.padding = [d * (k - 1) - p for p, d, k in zip(padding, dilation, weight.shape[2:], strict=True)]
        order = (t.contiguous() for t in (x, weight))  # else oneDNN answers in theirs, which PyTorch's kernel does not
        return aten.mkldnn_convolution(*order, bias, padding, _ONES, dilation, 1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        turned = weight.transpose(0, 1).flip(2, 3, 4)
        if _is_left(g, turned, None, ctx.padding, ctx.dilation):
            found = Direct.apply(g, turned, None, ctx.padding, ctx.dilation)
        else:
            found = F.conv3d(g, turned, None, 1, ctx.padding, ctx.dilation)
        return found, *[None] * 4


def _may_gain(module: nn.Conv3d) -> bool:
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    # Padding by more than the kernel's reach would be cut off in the gradient, which no padding does.
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    within = all(p <= r for p, r in zip(module.padding, reach, strict=True))
    return set(module.stride) == {1} and module.groups == 1 and math.prod(module.kernel_size) > 1 and within


def _is_left(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int | str], dilation: Sequence[int]
) -> bool:
    """Whether PyTorch would take its own kernel here, though oneDNN could do it."""
    return (
        is_eager()
        and all(t is None or (type(t) in _OWN and _is_plain(t)) for t in (x, weight, bias))
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and x.dim() == 5
        and torch._C._has_mkldnn
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._select_conv_backend(  # a wrong size is refused here, in PyTorch's words
            x, weight, bias, _ONES, padding, dilation, False, _ZEROS, 1, bias_sizes=None
        )
        in (_OWN_KERNELS.Slow3d, _OWN_KERNELS.SlowDilated3d)
    )


def _is_plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.device.type == "cpu" and t.layout is torch.strided
