"""A term's look through a frozen network: its own, or one that it shares with the other terms of the step."""

from __future__ import annotations

from collections.abc import Hashable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from taskloss import sharing
from taskloss.arguments import arguments
from taskloss.checks import InputError
from taskloss.frozen import Frozen
from taskloss.preprocess import Draw, Preprocess
from taskloss.sharing import Look
from taskloss.trees import lent


class Shared:
    """One image through one network, which runs once.

    Attributes:
        draw: What makes the network's input of an image, at the same random draw.
        image: The network's input.

    Args:
        model: The network.
        draw: See above.
        image: The image, in the restorer's units.
        layers: All that anybody will ask for.
    """

    def __init__(self, model: Frozen, draw: Draw, image: Tensor, layers: set[str]) -> None:
        self.draw = draw
        self.image = draw(image)
        self._model, self._given, self._layers = model, image, layers
        self._outputs: dict[str, Any] | None = None

    def outputs(self, layers: tuple[str, ...], *, only_reads: bool) -> dict[str, Any]:
        """The outputs of some of the layers, by name; copies, unless they will only be read."""
        if self._outputs is None and self._layers:
            self._see(set(layers))
        if self._outputs is None:
            return self._run(self.draw(self._given), layers)
        found = {name: self._outputs[name] for name in layers}
        return found if only_reads else lent(found)

    def _see(self, asked: set[str]) -> None:
        try:
            self._outputs = self._run(self.image, tuple(self._layers))
        except InputError as error:
            if error.where != "features" or self._layers == asked:
                raise
            # A layer that is overwritten in place further on can be looked at only where the network stops there.
            self._model.kept_apart |= self._layers - {""}
            self._layers = set()

    def _run(self, image: Any, layers: tuple[str, ...]) -> dict[str, Any]:
        if set(layers) == {""}:
            positional, named = arguments(image)
            return {"": self._model(*positional, **named)}
        return self._model.features(image, layers)


def look_of(model: Frozen, preprocess: Preprocess | None, layers: tuple[str, ...], what: str = "x_hat") -> Look | None:
    """A look as the step knows it, while the terms that it belongs to are alive; None for one that nobody can share."""
    if not model.kept_apart.isdisjoint(layers):
        return None
    how = (id(model.network), model.lean, model.checkpoint, model.is_awake)
    before = None if preprocess is None else (_identity(preprocess.function), id(preprocess.generator))
    return Look((*how, before, what), layers)


def shared(
    model: Frozen, preprocess: Preprocess | None, image: Tensor, layers: tuple[str, ...], *, first: Shared | None = None
) -> Shared | None:
    """The look that this term shares with others of the same step, or None where it is to look for itself.

    Args:
        model: The network.
        preprocess: What is done to the image first.
        image: The restored image; the reference, if there is a ``first``.
        layers: What the term will ask for.
        first: The shared look at the restored image, whose random draw the reference gets as well.

    Shape:
        image ``(N, C, *spatial)``.
    """
    step = None if torch.compiler.is_compiling() else sharing.current()
    look = None if step is None else look_of(model, preprocess, layers, "x_hat" if first is None else "reference")
    if step is None or look is None:
        return None
    kind = image.device.type
    draw = Draw(preprocess, image.device) if first is None else first.draw
    at = (image, torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    found: Shared | None = step.take(look, at, lambda wanted: Shared(model, draw, image, wanted))
    return found


def _identity(function: object) -> Hashable:
    # A method is a new object each time it is looked up.
    return (id(function.__self__), id(function.__func__)) if isinstance(function, MethodType) else id(function)
