"""Run a frozen network so that autograd keeps only what the gradient at its input needs.

The network's own code runs as it is; what changes is what a few functions of PyTorch keep while it runs. So it makes no
difference whether a layer is a module or a call, has hooks or parametrisations, or comes from another library.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskloss import lean_layers as layers

aten = torch.ops.aten
Rule = Callable[..., Any]


class Lean(TorchFunctionMode):
    """While this context is open, functions with a rule keep less; everything else is left as it is.

    Attributes:
        made: How often each function was replaced, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func)
        if rule is not None and _plain(args) and not torch.compiler.is_compiling():
            found = rule(func, *args, **(kwargs or {}))
            if found is not NotImplemented:
                self.made[func.__name__] += 1
                return found
        return func(*args, **(kwargs or {}))


def is_possible() -> bool:
    """Whether the gradient will be autograd's own in this call: not compiled, traced, batched or forward-mode."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def _plain(args: Any) -> bool:
    """Whether the first argument is an ordinary tensor whose graph is being recorded."""
    if not args:
        return False
    x = args[0]
    return type(x) is Tensor and x.requires_grad and x.layout is torch.strided and x.is_floating_point()


def _frozen(*tensors: Tensor | None) -> bool:
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.requires_grad) for t in tensors)


# --- the rules: the same arguments as the function, and NotImplemented where they are not the usual ones --------------


def _convolution(rank: int) -> Rule:
    def rule(_: Any, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
             groups: int = 1) -> Any:  # fmt: skip
        stride, dilation = _each(stride, rank), _each(dilation, rank)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            spare = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(s % 2 for s in spare):
                return NotImplemented
            padding = tuple(s // 2 for s in spare)
        geometry = (stride, _each(padding, rank), dilation, False, (0,) * rank, groups)
        return _convolve(rank, x, weight, bias, geometry)

    return rule


def _transposed(rank: int) -> Rule:
    def rule(_: Any, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
             output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Any:  # fmt: skip
        stride, padding, output_padding, dilation = (
            _each(v, rank) for v in (stride, padding, output_padding, dilation)
        )
        return _convolve(rank, x, weight, bias, (stride, padding, dilation, True, output_padding, groups))

    return rule


def _convolve(rank: int, x: Tensor, weight: Tensor, bias: Any, geometry: Any) -> Any:
    if not _frozen(weight, bias) or x.dim() != rank + 2:
        return NotImplemented
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return layers.Convolve.apply(x, weight, bias, geometry)
    if x.dtype is torch.float64:  # which autocast leaves alone
        return NotImplemented
    low = torch.get_autocast_dtype(kind)
    cast = [None if t is None else t.to(low) for t in (x, weight, bias)]
    with torch.autocast(kind, enabled=False):
        return layers.Convolve.apply(*cast, geometry)


def _batch_norm(func: Any, x: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
                training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Any:  # fmt: skip
    if training or running_var is None or not _frozen(running_mean, running_var, weight, bias):
        return NotImplemented

    def compute(x: Tensor) -> Tensor:
        return func(x, running_mean, running_var, weight, bias, False, momentum, eps)  # type: ignore[no-any-return]

    return layers.Normalise.apply(x, compute, running_var, weight, eps)


def _instance_norm(func: Any, x: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None,
                   bias: Any = None, use_input_stats: bool = True, *rest: Any, **more: Any) -> Any:  # fmt: skip
    if x.dim() < 3:
        return NotImplemented
    return _batch_norm(func, x, running_mean, running_var, weight, bias, use_input_stats, *rest, **more)


def _rectify(x: Tensor, compute: Any, passing: Any, inplace: bool, below: Any = None) -> Any:
    if not layers.is_dense(x) or (inplace and x.is_leaf):  # which autograd refuses in its own words
        return NotImplemented
    return layers.Rectify.apply(x, compute, passing, below)


def _relu(func: Any, input: Tensor, inplace: bool = False) -> Any:
    inplace = inplace or _in_place(func)
    return _rectify(input, torch.relu_ if inplace else torch.relu, _is_not_zero, inplace)


def _leaky_relu(func: Any, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    inplace = inplace or _in_place(func)
    if not negative_slope > 0:
        return NotImplemented  # the output's sign would not be the input's
    compute = functools.partial(F.leaky_relu, negative_slope=negative_slope, inplace=inplace)
    return _rectify(input, compute, _is_positive, inplace, negative_slope)


def _prelu(func: Any, input: Tensor, weight: Tensor) -> Any:
    if not _frozen(weight) or input.dim() < 2 or weight.dtype != input.dtype or bool((weight <= 0).any()):
        return NotImplemented
    slope = weight.reshape(1, -1, *[1] * (input.dim() - 2))
    return _rectify(input, functools.partial(torch.prelu, weight=weight), _is_positive, False, slope)


# A comparison is five times as slow on a CPU as the cast of a number to whether it is not zero.


def _is_not_zero(y: Tensor) -> Tensor:
    return y.to(torch.bool)  # NaN is not zero: its gradient passes, as it does in autograd


def _is_positive(y: Tensor) -> Tensor:
    return torch.fmax(y, y.new_zeros(())).to(torch.bool)  # NaN becomes zero: its gradient is that of the slope


def _relu6(func: Any, input: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(func, input, 0.0, 6.0, inplace)


def _hardtanh(func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    inplace = inplace or _in_place(func)
    if not max_val - min_val >= 1:
        return NotImplemented  # the product below could underflow
    compute = functools.partial(F.hardtanh, min_val=min_val, max_val=max_val, inplace=inplace)

    def inside(y: Tensor) -> Tensor:
        return (y - min_val).mul_(max_val - y).to(torch.bool)

    return _rectify(input, compute, inside, inplace)


def _max_pool(rank: int) -> Rule:
    def rule(func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
             ceil_mode: bool = False, return_indices: bool = False) -> Any:  # fmt: skip
        if return_indices or input.dim() != rank + 2:
            return NotImplemented
        window = (
            _each(kernel_size, rank),
            _each(kernel_size if stride is None or stride in ([], ()) else stride, rank),
            _each(padding, rank),
            _each(dilation, rank),
            ceil_mode,
        )
        return layers.MaxPool.apply(input, rank, *window)

    return rule


def _avg_pool(rank: int) -> Rule:
    compute, back = (F.avg_pool2d, aten.avg_pool2d_backward) if rank == 2 else (F.avg_pool3d, aten.avg_pool3d_backward)

    def rule(func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
             count_include_pad: bool = True, divisor_override: Any = None) -> Any:  # fmt: skip
        if input.dim() != rank + 2:
            return NotImplemented
        kernel, padding = _each(kernel_size, rank), _each(padding, rank)
        stride = _each(kernel_size if stride is None or stride in ([], ()) else stride, rank)
        how = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return layers.ByShape.apply(input, compute, back, *how)

    return rule


def _attention(func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, **more: Any) -> Any:  # fmt: skip
    if dropout_p or not _frozen(attn_mask) or torch.is_autocast_enabled(query.device.type):
        return NotImplemented

    def compute(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return func(q, k, v, mask, 0.0, is_causal, **more)  # type: ignore[no-any-return]

    return layers.Attend.apply(query, key, value, attn_mask, compute)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    if type(value) is tuple and len(value) == rank:  # as modules have it
        return value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * rank if len(values) == 1 else values


def _in_place(func: Any) -> bool:
    return bool(func.__name__.endswith("_"))


RULES: dict[Any, Rule] = {
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.conv_transpose1d: _transposed(1),
    F.conv_transpose2d: _transposed(2),
    F.conv_transpose3d: _transposed(3),
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), _prelu),
    F.relu6: _relu6,
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    F.max_pool2d: _max_pool(2),
    F.max_pool3d: _max_pool(3),
    torch.max_pool2d: _max_pool(2),
    torch.max_pool3d: _max_pool(3),
    F.avg_pool2d: _avg_pool(2),
    F.avg_pool3d: _avg_pool(3),
    F.scaled_dot_product_attention: _attention,
}
