"""Run a frozen network so that autograd keeps only what the gradient at its input needs.

The network's own code runs as it is; what changes is what a few functions of PyTorch keep while it runs. So it makes no
difference whether a layer is a module or a call, has hooks or parametrisations, or comes from another library.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskloss import lean_layers as layers
from taskloss.eager import is_eager

aten = torch.ops.aten
Rule = Callable[..., Any]
_local = threading.local()
_DROPOUT = frozenset((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout))
_NARROW = 128  # input features up to which a linear layer is computed again; wider ones take more time than it is worth
_SMALL = 1 << 15  # a tensor of fewer values is left to autograd: a call through Python takes longer than it saves


class Lean(TorchFunctionMode):
    """While this context is open, functions with a rule keep less; everything else is left as it is.

    Attributes:
        made: How often each function was made lean, by name.
        normalised: The result of the function before, where that was a batch norm, and what its gradient needs.
        widened: The result of the function before, where that was a layer norm or a linear layer on one, its version,
            the norm's input, and what makes the result of it again.
        hooks: Of saved tensors, that are in force around the network. Where others are, a part of the network is
            checkpointed by its own code: it will run again without this context, and must save the same then.
        in_a_piece: Whether what runs will be computed again at once, so that nothing in it need be computed thrice.
    """

    in_a_piece = False

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()
        self.normalised: tuple[Tensor, tuple[Any, ...]] | None = None
        self.widened: tuple[Tensor, int, Tensor, Callable[[Tensor], Tensor]] | None = None
        self.hooks: Any = None

    def __enter__(self) -> Lean:
        self._before, _local.mode = getattr(_local, "mode", None), self
        self.hooks = layers.outer_hooks()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _local.mode = self._before
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or layers.outer_hooks() != self.hooks:
            self.normalised = self.widened = None
            return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None and _plain(args):
            found = rule(self, func, *args, **kwargs)
            if found is not NotImplemented:
                self.made[func.__name__] += 1
                if func is not F.batch_norm:
                    self.normalised = None
                self.widened = None
                return found
        found = func(*args, **kwargs)
        self.widened = _widened(self.widened, func, found, args, kwargs) if func in _WIDENING else None
        # Dropout in eval mode gives back what it got: a rectifier after it still follows the batch norm.
        if self.normalised is not None and not (func in _DROPOUT and found is self.normalised[0]):
            self.normalised = None
        return found


@contextlib.contextmanager
def in_a_piece(is_lean: bool) -> Iterator[None]:
    """Lean, if it is not already, without what was known of the function before or after: a piece runs alone again."""
    mode = getattr(_local, "mode", None)
    if mode is None and is_lean and is_possible():
        with Lean() as mode:
            mode.in_a_piece = True
            yield
        return
    if mode is None:
        yield
        return
    around = mode.hooks
    mode.normalised, mode.widened, mode.in_a_piece, mode.hooks = None, None, True, layers.outer_hooks()
    try:
        yield
    finally:
        mode.normalised, mode.widened, mode.in_a_piece, mode.hooks = None, None, False, around


def is_possible() -> bool:
    """Whether the gradient will be autograd's own in this call: not compiled, traced, batched or forward-mode."""
    return (
        torch.is_grad_enabled()
        and is_eager()
        and torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
    )


def _plain(args: Any) -> bool:
    """Whether the first argument is an ordinary tensor of some size whose graph is being recorded."""
    if not args:
        return False
    x = args[0]
    return (
        type(x) is Tensor
        and x.requires_grad
        and x.numel() >= _SMALL
        and is_eager()  # the network may use transforms of its own
        and x.layout is torch.strided
        and x.is_floating_point()
    )


def _frozen(*tensors: Tensor | None) -> bool:
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and not t.requires_grad) for t in tensors)


# --- the rules: the same arguments as the function, and NotImplemented where they are not the usual ones --------------


def _linear(_: Lean, func: Any, x: Tensor, weight: Any, bias: Any = None, *rest: Any, **more: Any) -> Any:
    """A function that is linear in x: its backward pass needs the weight, and the size of x."""
    if not _frozen(weight, bias):
        return NotImplemented
    return layers.saving(lambda: func(x, weight, bias, *rest, **more), layers.keep_weights)


def _pool(_: Lean, func: Any, input: Tensor, *rest: Any, **more: Any) -> Any:
    return layers.saving(lambda: func(input, *rest, **more), layers.keep_weights)


def _max_pool(rank: int) -> Rule:
    def rule(_: Lean, func: Any, input: Tensor, *rest: Any, **more: Any) -> Any:
        keep = layers.keep_places(input.shape[-rank:].numel())
        return layers.saving(lambda: func(input, *rest, **more), keep)

    return rule


def _batch_norm(mode: Lean, func: Any, x: Tensor, running_mean: Any, running_var: Any, weight: Any = None,
                bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Any:  # fmt: skip
    if training or running_var is None or not _frozen(running_mean, running_var, weight, bias):
        return NotImplemented

    def compute(x: Tensor) -> Tensor:
        return func(x, running_mean, running_var, weight, bias, False, momentum, eps)  # type: ignore[no-any-return]

    y = layers.Normalise.apply(x, compute, running_var, weight, eps)
    mode.normalised = (y, (x, running_var, weight, eps))
    return y


def _instance_norm(mode: Lean, func: Any, x: Tensor, running_mean: Any = None, running_var: Any = None,
                   weight: Any = None, bias: Any = None, use_input_stats: bool = True, *rest: Any,
                   **more: Any) -> Any:  # fmt: skip
    if x.dim() < 3:
        return NotImplemented
    return _batch_norm(mode, func, x, running_mean, running_var, weight, bias, use_input_stats, *rest, **more)


def _rectify(mode: Lean, x: Tensor, compute: Any, inplace: bool, mask_of: Any, below: float | None = None) -> Any:
    """Below a bound the gradient is gone, or ``below`` times what it was."""
    if inplace and mode.normalised is not None and mode.normalised[0] is x:  # nobody has seen what is overwritten
        z, *state = mode.normalised[1]
        return layers.NormaliseRectify.apply(x, z, compute, mask_of, below, *state)
    return layers.Rectify.apply(x, compute, mask_of, inplace, below)


def _relu(mode: Lean, func: Any, input: Tensor, inplace: bool = False) -> Any:
    inplace = inplace or _in_place(func)
    return _rectify(mode, input, torch.relu_ if inplace else torch.relu, inplace, _is_not_zero)


def _leaky_relu(mode: Lean, func: Any, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    inplace = inplace or _in_place(func)
    compute = functools.partial(F.leaky_relu, negative_slope=negative_slope, inplace=inplace)
    if not negative_slope >= 0:  # in place what is left does not tell what was there, as autograd will say
        return NotImplemented if inplace else layers.saving(lambda: compute(input), layers.keep_mask(_is_positive))
    return _rectify(mode, input, compute, inplace, _is_positive, float(negative_slope))


def _prelu(mode: Lean, func: Any, input: Tensor, weight: Tensor) -> Any:
    if not _frozen(weight):
        return NotImplemented
    if weight.numel() == 1 and weight.device.type == "cpu" and (slope := weight.item()) >= 0:
        # Autograd's own kernel computes the slope's gradient too, which nobody asks for. On CUDA reading the slope
        # would make the host wait.
        return _rectify(mode, input, lambda x: func(x, weight), False, _is_positive, slope)
    signed = functools.partial(torch.sub, other=0.5)  # second derivatives ask whether it is negative
    return layers.saving(lambda: func(input, weight), layers.keep_mask(_is_positive, signed))


def _is_not_zero(y: Tensor) -> Tensor:
    # Several times as fast as a comparison. NaN is not zero: its gradient passes, as it does in autograd.
    return y.to(torch.bool)


def _is_positive(y: Tensor) -> Tensor:
    return y > 0  # NaN is not: its gradient is that of the slope


def _relu6(mode: Lean, func: Any, input: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(mode, func, input, 0.0, 6.0, inplace)


def _hardtanh(mode: Lean, func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0,
              inplace: bool = False) -> Any:  # fmt: skip
    inplace = inplace or _in_place(func)
    compute = functools.partial(F.hardtanh, min_val=min_val, max_val=max_val, inplace=inplace)

    def inside(y: Tensor) -> Tensor:
        one = y if min_val >= 0 else torch.ones_like(y)  # anything that is not zero where the gradient passes
        return aten.hardtanh_backward(one, y, min_val, max_val).to(torch.bool)  # type: ignore[no-any-return]

    return _rectify(mode, input, compute, inplace, inside)


def _attention(mode: Lean, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None,
               dropout_p: float = 0.0, is_causal: bool = False, **more: Any) -> Any:  # fmt: skip
    if mode.in_a_piece or dropout_p or not _frozen(attn_mask) or layers.casts(query.device):
        return NotImplemented
    if query is key or key is value or query is value:  # autograd adds their gradients up in an order of its own
        return NotImplemented

    def compute(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return func(q, k, v, mask, 0.0, is_causal, **more)  # type: ignore[no-any-return]

    return layers.Attend.apply(query, key, value, attn_mask, compute)


def _gelu(mode: Lean, func: Any, input: Tensor, **more: Any) -> Any:
    """After a layer norm and a narrow linear layer: what they make of the norm's input is made again."""
    if mode.widened is None or mode.widened[0] is not input or mode.in_a_piece:
        return NotImplemented
    _, version, x, again = mode.widened
    if version != input._version or layers.casts(x.device) or not layers.sees_hooks():
        return NotImplemented
    return layers.Bend.apply(input, layers.Place.apply(input), x.detach(), again, func, more)


def _widened(before: Any, func: Any, found: Tensor, args: Any, kwargs: Any) -> Any:
    """What is known of a layer norm's result, or of that of a linear layer on one."""
    if not _plain(args):
        return None
    x, *rest = args
    weights = [t for t in (*rest, *kwargs.values()) if isinstance(t, Tensor)]
    if not _frozen(*weights):
        return None
    if func is F.layer_norm:
        return found, found._version, x, lambda x: func(x, *rest, **kwargs)
    # Autograd keeps no bias: one that is no parameter might be another by then.
    own = all(type(t) is nn.Parameter for t in weights)
    if before is None or before[0] is not x or before[1] != x._version or x.shape[-1] > _NARROW or not own:
        return None
    _, _, first, inner = before  # by name, or the closure would keep what is not to be kept
    return found, found._version, first, lambda x: func(inner(x), *rest, **kwargs)


def _in_place(func: Any) -> bool:
    return bool(func.__name__.endswith("_"))


RULES: dict[Any, Rule] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _linear),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _linear),
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), _prelu),
    F.relu6: _relu6,
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool(2)),
    **dict.fromkeys((F.max_pool3d, torch.max_pool3d), _max_pool(3)),
    **dict.fromkeys((F.avg_pool2d, F.avg_pool3d), _pool),
    F.scaled_dot_product_attention: _attention,
    F.gelu: _gelu,
}
_WIDENING = frozenset((F.layer_norm, F.linear))
