"""What every term asks of its inputs, and the sentence it says when the answer is no."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import torch
from torch import Tensor


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
    if not reference.is_floating_point():
        raise InputError(where, f"reference must be floating point, got {reference.dtype}; call reference.float()")


def check_range(where: str, image: Tensor, expects: tuple[float, float]) -> None:
    """Refuse an image that clearly is not in the range that a network or criterion was made for.

    Clearly means: it leaves the range by more than half its span, or spans less than 1/64 of it, or never goes
    below zero where the range is symmetric about zero. Costs one device sync, so terms ask it only once.
    """
    low, high = expects
    span = high - low
    least, most = torch.stack(torch.aminmax(image.detach())).tolist()
    wide = least < low - span / 2 or most > high + span / 2
    narrow = 0 < most - least < span / 64
    one_sided = low == -high and least >= 0 and most > 0
    if wide or narrow or one_sided:
        raise InputError(
            where,
            f"the input spans [{least:.4g}, {most:.4g}] but [{low:g}, {high:g}] is expected; "
            "convert it with preprocess=..., or pass expects=None",
        )


def shape(tensor: Tensor) -> str:
    """A shape as people write it: ``(4, 1, 64, 64)``."""
    return str(tuple(tensor.shape))
