"""What a layer keeps for its backward pass when nobody will ask for its weights' gradient.

Autograd saves for the weights as well as for the input: a convolution its input, batch norm its input, a rectifier
its output. With frozen weights a convolution needs none of it, batch norm a factor for each channel, and a rectifier
one byte for each value. Where autograd's own kernel does with a stand-in for what it saved, the function runs as it is
and `saving` replaces what is saved; the functions below are for those that would compute more than is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

aten = torch.ops.aten
Kept = tuple[Tensor | None, Callable[[Any], Tensor] | None]
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.4 does not tell


def outer_hooks() -> Any:
    """The hooks of saved tensors that are in force: of checkpointing, or of moving to another device."""
    return None if _top_hooks is None else _top_hooks(True)


def sees_hooks() -> bool:
    """Whether it can be told that a part of a network is checkpointed by its own code."""
    return _top_hooks is not None


def casts(device: torch.device) -> bool:
    """Whether autocast is on."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextlib.contextmanager
def as_it_was(device: torch.device) -> Iterator[None]:
    """Without autocast, whatever is on in the backward pass: what is computed again had none."""
    with torch.autocast(device.type, enabled=False) if casts(device) else contextlib.nullcontext():
        yield


def saving(function: Callable[[], Any], keep: Callable[[Tensor], Kept]) -> Any:
    """Run a function of autograd's own, and keep something else than it saves.

    Args:
        function: What to run.
        keep: By saved tensor, what is kept of it, and what makes a stand-in of that (None: it is used as it is). Hooks
            that are in force around (checkpointing, moving to another device) get what is kept.
    """
    outer = outer_hooks()

    def pack(tensor: Tensor) -> Any:
        kept, back = keep(tensor)
        return (kept if kept is None or outer is None else outer[0](kept)), back

    def unpack(packed: Any) -> Any:
        kept, back = packed
        if kept is not None and outer is not None:
            kept = outer[1](kept)
        return kept if back is None else back(kept)

    with saved_tensors_hooks(pack, unpack):
        return function()


def keep_weights(tensor: Tensor) -> Kept:
    """Nothing of an activation but its size and layout: for kernels that ask for the input and read no more of it."""
    if not tensor.requires_grad:
        return tensor, None
    size, dtype, device = tensor.shape, tensor.dtype, tensor.device
    stride = tensor.stride() if is_dense(tensor) else torch.empty_like(tensor, device="meta").stride()
    return None, lambda _: torch.empty_strided(size, stride, dtype=dtype, device=device)


def keep_places(n: int) -> Callable[[Tensor], Kept]:
    """Of a pooling its indices, below n, in as few bytes as that needs."""
    small = torch.uint8 if n <= 1 << 8 else torch.int16 if n <= 1 << 15 else torch.int32

    def keep(tensor: Tensor) -> Kept:
        if tensor.dtype is torch.int64 and n < 1 << 31:
            return tensor.to(small), Tensor.long
        return keep_weights(tensor)

    return keep


def keep_mask(mask_of: Callable[[Tensor], Tensor], stand_in: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Of an activation one byte for each value: 1 where the gradient passes.

    Args:
        mask_of: The mask, from what autograd saves.
        stand_in: From 0 and 1, in the dtype of what was saved, numbers for which autograd's kernel does the same.
    """

    def keep(tensor: Tensor) -> Kept:
        if not tensor.requires_grad:
            return tensor, None
        dtype = tensor.dtype

        def back(mask: Tensor) -> Tensor:
            found = mask.view(torch.uint8).to(dtype)
            return found if stand_in is None else stand_in(found)

        return mask_of(tensor), back

    return keep


class Normalise(Function):
    """Normalisation by running statistics, which is a factor and a shift: keeps the variance and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], *state: Any) -> Tensor:
        variance, weight, ctx.eps = state
        ctx.save_for_backward(variance, weight)
        ctx.order = _order(x)
        ctx.set_materialize_grads(False)
        return compute(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Any:
        found = None if g is None else _scaled(g.contiguous(memory_format=ctx.order), ctx.saved_tensors, ctx.eps)
        return found, None, None, None, None


class Rectify(Function):
    """A rectifier whose gradient passes, or is ``below`` times what it was (None: 0); keeps a byte for each value."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[Tensor], Tensor], mask_of: Callable[[Tensor], Tensor], inplace: bool,
        below: float | None,
    ) -> Tensor:  # fmt: skip
        y = compute(x)
        if inplace:
            ctx.mark_dirty(y)
        ctx.save_for_backward(mask_of(y))
        ctx.below = below
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _gated(g, ctx.saved_tensors[0], ctx.below), *[None] * 4


class NormaliseRectify(Function):
    """A rectifier in place on what `Normalise` gave, as one step back to that one's input."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, compute_: Callable[[Tensor], Tensor], mask_of: Callable[[Tensor], Tensor],
        below: float | None, *state: Any,
    ) -> Tensor:  # fmt: skip
        variance, weight, ctx.eps = state
        y = compute_(y)
        ctx.mark_dirty(y)
        ctx.save_for_backward(mask_of(y), variance, weight)
        ctx.order, ctx.below = _order(x), below
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        mask, *factors = ctx.saved_tensors
        g = _gated(g, mask, ctx.below).contiguous(memory_format=ctx.order)
        return (None, _scaled(g, factors, ctx.eps, own=True), *[None] * 6)


def _gated(g: Tensor, mask: Tensor, below: float | None) -> Tensor:
    """The gradient where it passes, and ``below`` times it elsewhere."""
    if g.requires_grad or _is_batch(g):  # it will be differentiated, or has no view as whole numbers
        return torch.where(mask, g, torch.zeros_like(g) if below is None else g * below)
    if below is not None:
        return aten.leaky_relu_backward(g, mask.view(torch.uint8).to(g.dtype), below, True)  # type: ignore[no-any-return]
    # In whole numbers, a product with 0 is 0 even where the gradient is not finite; a selection is far slower.
    whole = _WHOLE[g.element_size()]
    return mask.view(torch.uint8).to(whole).mul_(g.view(whole)).view(g.dtype)


def _is_batch(g: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g)


def _scaled(g: Tensor, factors: Any, eps: float, own: bool = False) -> Tensor:
    """The gradient times weight / sqrt(variance + eps); ``own``: nobody else looks at it."""
    variance, weight = factors
    each = (1, -1, *[1] * (g.dim() - 2))
    wide = variance.double() if variance.device.type == "cpu" else variance  # as the kernel does, to the bit
    inverse = (wide + eps).rsqrt().to(variance.dtype).view(each)
    found = g.mul_(inverse) if own and g.dtype is variance.dtype and not g.requires_grad else g * inverse
    if weight is not None:
        found = found.mul_(weight.view(each))
    return found.to(g.dtype)


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
        with torch.enable_grad(), as_it_was(g.device):
            if not again:
                leaves = [
                    t.detach().requires_grad_(need) for t, need in zip(leaves, ctx.needs_input_grad, strict=False)
                ]
            wanted = [t for t in leaves if t.requires_grad]
            found = iter(torch.autograd.grad(ctx.compute(*leaves, mask), wanted, g, create_graph=again))
        return *(next(found) if t.requires_grad else None for t in leaves), None, None


class Place(Function):
    """Where a tensor stands in the graph, without the tensor."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return u.new_empty(()).expand(u.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Fill(Function):
    """The tensor again, at its place."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, u: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


class Bend(Function):
    """GELU of what is made again from a tensor that is kept anyway, instead of its input."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, place: Tensor, x: Tensor, again: Callable[[Tensor], Tensor],
        function: Callable[..., Tensor], more: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(place, x)
        ctx.again, ctx.more = again, more
        return function(u, **more)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        place, x = ctx.saved_tensors
        with torch.no_grad(), as_it_was(x.device):
            u = ctx.again(x)
        if torch.is_grad_enabled():  # the gradient will be differentiated, through the graph that made u
            u = Fill.apply(place, u)
        return aten.gelu_backward(g, u, **ctx.more), *[None] * 5


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their stretch of memory without gaps, in one of the usual orders."""
    return x.is_contiguous() or x.is_contiguous(memory_format=_order(x))


def _order(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last
