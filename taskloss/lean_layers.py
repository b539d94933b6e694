"""What each kind of layer keeps for its backward pass when nobody will ask for its weights' gradient.

Autograd saves for the weights as well as for the input: a convolution its input, batch norm its input, a rectifier
its output. With frozen weights a convolution needs none of it, batch norm a factor for each channel, and a rectifier
one bit for each value. The functions here compute with the same kernels as autograd does, so that values and gradients
are the same, and every backward pass can itself be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1, its highest byte has one bit for each of them
_SAME_WIDTH = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Convolve(Function):
    """Convolution or its transpose: keeps the weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.like, ctx.biases = _layout(x), None if bias is None else bias.shape
        ctx.geometry = geometry
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        x = stand_in(g, *ctx.like)
        found = torch.ops.aten.convolution_backward.default(
            g, x, weight, ctx.biases, *ctx.geometry, [True, False, False]
        )
        return found[0], None, None, None


class Normalise(Function):
    """Normalisation by running statistics, which is a factor and a shift: keeps the variance and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], *state: Any) -> Tensor:
        variance, weight, ctx.eps = state
        ctx.save_for_backward(variance, weight)
        ctx.order = _order(x)
        return compute(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        variance, weight = ctx.saved_tensors
        each = (1, -1, *[1] * (g.dim() - 2))
        wide = variance.double() if variance.device.type == "cpu" else variance  # as the kernel does, to the bit
        found = g.contiguous(memory_format=ctx.order) * (wide + ctx.eps).rsqrt().to(variance.dtype).view(each)
        if weight is not None:
            found = found.mul_(weight.view(each))
        return found.to(g.dtype), None, None, None, None


class Rectify(Function):
    """A function with two slopes: keeps one bit for each value, and the slope of those below."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], passing: Callable[[Tensor], Tensor], below: Any
    ) -> Tensor:
        y = compute(x)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(to_bits(passing(y)), below if isinstance(below, Tensor) else None)
        ctx.like, ctx.below = _layout(y), below
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        bits, below = ctx.saved_tensors
        below = ctx.below if below is None else below
        return _Gate.apply(g, bits, below, ctx.like), None, None, None


class _Gate(Function):
    """A gradient where a bit is set, and ``below`` times it elsewhere: its own adjoint."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, bits: Tensor, below: Any, like: Any) -> Tensor:
        ctx.save_for_backward(bits, below if isinstance(below, Tensor) else None)
        ctx.below, ctx.like = below, like
        number = _SAME_WIDTH[g.element_size()]
        passing = from_bits(bits, number, *like)
        if below is None:
            return passing.bitwise_and_(g.view(number)).view(g.dtype)
        other = (g * (below.to(g.dtype) if isinstance(below, Tensor) else below)).view(number)
        return passing.bitwise_and_(other ^ g.view(number)).bitwise_xor_(other).view(g.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        bits, below = ctx.saved_tensors
        return _Gate.apply(g, bits, ctx.below if below is None else below, ctx.like), None, None, None


class MaxPool(Function):
    """Maximum over windows: keeps where each one was, in as few bytes as the size of a plane needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, *window: Any) -> Tensor:
        pool = torch.ops.aten.max_pool2d_with_indices if rank == 2 else torch.ops.aten.max_pool3d_with_indices
        y, where = pool(x, *window)
        ctx.save_for_backward(where.to(_smallest(x.shape[-rank:].numel())))
        ctx.rank, ctx.window, ctx.like = rank, window, _layout(x)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (where,) = ctx.saved_tensors
        aten = torch.ops.aten
        back = aten.max_pool2d_with_indices_backward if ctx.rank == 2 else aten.max_pool3d_with_indices_backward
        found = back(g, stand_in(g, *ctx.like), *ctx.window, where.long())
        return (found, None, *[None] * len(ctx.window))


class Attend(Function):
    """Attention: keeps queries, keys and values; its output, which its kernels keep as well, is computed again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, compute: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.compute = compute
        return compute(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        *leaves, mask = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient will be differentiated
        with torch.enable_grad():
            if not again:
                leaves = [
                    t.detach().requires_grad_(need) for t, need in zip(leaves, ctx.needs_input_grad, strict=False)
                ]
            wanted = [t for t in leaves if t.requires_grad]
            found = iter(torch.autograd.grad(ctx.compute(*leaves, mask), wanted, g, create_graph=again))
        return *(next(found) if t.requires_grad else None for t in leaves), None, None


class ByShape(Function):
    """A linear function whose gradient depends on the shape of its input alone: keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[..., Tensor], back: Callable[..., Tensor], *how: Any) -> Tensor:
        ctx.back, ctx.how, ctx.like = back, how, _layout(x)
        return compute(x, *how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return (ctx.back(g, stand_in(g, *ctx.like), *ctx.how), None, None, *[None] * len(ctx.how))


def stand_in(g: Tensor, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """A tensor for kernels that ask for the input but read its size and layout alone.

    It borrows the gradient's memory where that is large enough, and is not initialised where it is not.
    """
    g = g.detach()
    if g.untyped_storage().nbytes() >= size.numel() * g.element_size():
        return g.as_strided(size, stride, 0)
    return torch.empty_strided(size, stride, dtype=g.dtype, device=g.device)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their stretch of memory without gaps, in one of the usual orders."""
    return x.is_contiguous(memory_format=_order(x))


def to_bits(mask: Tensor) -> Tensor:
    """A dense mask as one bit for each element, in the order of memory."""
    n = mask.numel()
    flat = mask.as_strided((n,), (1,))
    if n % 8:
        flat = torch.nn.functional.pad(flat, (0, -n % 8))
    # Wraps beyond 64 bits and takes the sign along, both of which the cast to a byte drops.
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def from_bits(bits: Tensor, dtype: torch.dtype, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """What `to_bits` packed, as integers: -1 (all bits set) and 0."""
    bytes_ = _table(bits.device).index_select(0, bits.int()).view(torch.int8)[: size.numel()]
    return bytes_.to(dtype).as_strided(size, stride)


@cache
def _table(device: torch.device) -> Tensor:
    """By byte: eight bytes of -1 or 0, as one integer."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (-bits).to(torch.int8).view(torch.int64).view(-1).to(device)


def _smallest(n: int) -> torch.dtype:
    return torch.uint8 if n <= 1 << 8 else torch.int16 if n <= 1 << 15 else torch.int32 if n < 1 << 31 else torch.int64


def _order(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Size and strides of the dense tensor that the kernels make of x."""
    if is_dense(x):
        return x.shape, x.stride()
    return x.shape, torch.empty_like(x, device="meta").stride()
