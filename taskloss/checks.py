"""What every term asks of its inputs, and the sentence it says when the answer is no."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# A complex image has two numbers per pixel, and .float() would drop one of them.
_AS_CHANNELS = "give real and imaginary part as channels: torch.cat([{0}.real, {0}.imag], 1)"


class InputError(ValueError):
    """A caller's mistake: where it happened, and one sentence that says how to mend it.

    Args:
        where: The term, argument or module that noticed.
        sentence: What was expected, what came, and what to type instead.
    """

    def __init__(self, where: str, sentence: str) -> None:
        super().__init__(f"{where}: {sentence}")
        self.where = where
        self.sentence = sentence

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str]]:
        return type(self), (self.where, self.sentence)

    def at(self, where: str) -> InputError:
        """The same mistake, told under the name that the caller gave to the term."""
        return type(self)(where, self.sentence)


def snake_case(name: str) -> str:
    """``"TaskOrientedLoss"`` becomes ``"task_oriented_loss"``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers the known names closest to ``name``."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:8]
    return "did you mean " + " or ".join(repr(k) for k in close) + "?" if close else "there are none"


def check_image(where: str, x_hat: object) -> None:
    """Refuse anything but a floating-point batch ``(N, C, *spatial)`` with one to three spatial axes."""
    if not isinstance(x_hat, Tensor):
        raise InputError(where, f"x_hat must be a tensor (N, C, *spatial), got {type(x_hat).__name__}")
    if x_hat.is_complex():
        raise InputError(where, f"x_hat must be real, got {x_hat.dtype}; {_AS_CHANNELS.format('x_hat')}")
    if not x_hat.is_floating_point():
        raise InputError(where, f"x_hat must be floating point, got {x_hat.dtype}; call x_hat.float()")
    if not 3 <= x_hat.dim() <= 5:
        raise InputError(
            where,
            f"x_hat must be (N, C, *spatial) with 1 to 3 spatial axes, got {shape(x_hat)}; "
            "add the batch and channel axes with x_hat[None, None]",
        )


def check_same(where: str, x_hat: Tensor, reference: object) -> None:
    """Refuse a reference that would broadcast against x_hat, or lives elsewhere."""
    if not isinstance(reference, Tensor):
        raise InputError(where, f"reference must be a tensor like x_hat, got {type(reference).__name__}")
    if x_hat.shape != reference.shape:
        mend = "make them equal; nothing is broadcast"
        if reference.dim() == x_hat.dim() - 1 and reference.shape == x_hat[:, 0].shape:
            mend = "add the channel axis with reference[:, None]"
        raise InputError(where, f"x_hat {shape(x_hat)} and reference {shape(reference)} differ in shape; {mend}")
    if x_hat.device != reference.device:
        raise InputError(
            where,
            f"x_hat is on {x_hat.device} but reference is on {reference.device}; call reference.to('{x_hat.device}')",
        )
    if reference.is_complex():
        raise InputError(where, f"reference must be real, got {reference.dtype}; {_AS_CHANNELS.format('reference')}")
    if not reference.is_floating_point():
        raise InputError(where, f"reference must be floating point, got {reference.dtype}; call reference.float()")


def readable(*tensors: Tensor) -> bool:
    """Whether the host can read the tensors' numbers: not under ``torch.compile``, ``torch.func`` or on ``meta``."""
    if torch.compiler.is_compiling():
        return False
    return not any(t.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def check_callable(where: str, function: object, usage: str) -> None:
    """Refuse what cannot be called, and a class where an object of it is meant.

    Args:
        where: The term.
        function: What the caller gave.
        usage: The argument and how it will be called: ``"task_criterion must be callable as criterion(p, label)"``.
    """
    if isinstance(function, type):
        name = function.__name__
        raise TypeError(f"{where}: {usage}, got the class {name} itself; make one of it: {name}()")
    if not callable(function):
        raise TypeError(f"{where}: {usage}, got {type(function).__name__}")


def check_function(where: str, function: object, usage: str) -> None:
    """Like :func:`check_callable`, where a plain class such as ``list`` is a function too; a module's class is not."""
    if not isinstance(function, type) or issubclass(function, nn.Module):
        check_callable(where, function, usage)


def require(module: str, extra: str, where: str) -> Any:
    """Import a package that an extra brings, or say which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"{where}: needs {error.name}, which is not installed; pip install 'taskloss[{extra}]'", name=error.name
        ) from None


def shape(tensor: Tensor) -> str:
    """A shape as people write it: ``(4, 1, 64, 64)``."""
    return str(tuple(tensor.shape))
