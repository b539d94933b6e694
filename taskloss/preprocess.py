"""From the restorer's units to a network's: the caller's function, kept from doing what nobody asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.checks import check_function
from taskloss.frozen import Frozen, hold
from taskloss.randomness import RandomState, generators_of, seeded_by
from taskloss.trees import lent

_READERS = ("torch.nn.modules.loss", "torch.nn.functional", "taskloss.consistency")


class Preprocess(nn.Module):
    """A caller's ``preprocess``: it gets copies to write on, and draws once where two images are compared.

    A module is kept as a frozen copy, in the mode in which it came: one that augments in training mode does so while
    the loss is in training mode, and rests while the loss is in eval mode. Layers with running statistics stay in eval.

    Args:
        function: The caller's function or module.
        generator: Seeds every call, so that random augmentations can be repeated; the global states stay as they are.
    """

    def __init__(self, function: Callable[..., Any], generator: torch.Generator | None = None) -> None:
        super().__init__()
        modes: list[bool] = []
        if isinstance(function, nn.Module) and not isinstance(function, Frozen):
            modes = [module.training and not _has_statistics(module) for module in function.modules()]
        self.function = hold(function)
        held = self._held()
        self._modes = [] if held is None else list(zip(held.modules(), modes, strict=False))
        self.generator = generator
        self._generators = generators_of(self.function if held is None else held)
        self.train()

    def train(self, mode: bool = True) -> Preprocess:
        """Put the module in the mode it came in, or in eval."""
        super().train(mode)
        for module, given in self._modes:
            module.training = given and mode
        return self

    def forward(self, image: Tensor) -> Any:
        """One image, in the network's units."""
        own = lent(image)
        if self.generator is None:  # nothing for a compiler to trip over
            return self.function(own)  # type: ignore[misc]
        with seeded_by(self.generator, image.device):
            return self.function(own)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A plain function is not copied with the rest, and nor are its generators.
        held = self._held()
        self._generators = generators_of(self.function if held is None else held)

    def _held(self) -> nn.Module | None:
        return self.function.network if isinstance(self.function, Frozen) else None

    def random_state(self, device: torch.device) -> RandomState:
        """All that a call may draw from."""
        own = () if self.generator is None else (self.generator,)
        return RandomState(device, (*self._generators, *own))

    def draws(self, image: Tensor) -> bool:
        """Whether a call draws anything, tried with an image; the random states stay as they were."""
        state = self.random_state(image.device)
        try:
            with torch.no_grad():
                self(image)
            return state.has_moved()
        finally:
            state.restore()

    # What torch.compiler.assume_constant_result sets, without its import of dynamo: `draws` is tried while compiling.
    draws._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Draw:
    """One look through a preprocess (or through none) at several images: each sees the same random draw.

    Under ``torch.compile`` a preprocess that draws runs eagerly, with a graph break before and after it; one that
    draws nothing is compiled with the rest.

    Attributes:
        random: Whether the first image drew anything.
    """

    def __init__(self, preprocess: Preprocess | None, device: torch.device) -> None:
        self.preprocess = preprocess
        self.device = device
        self.state: RandomState | None = None
        self.random = False

    def __call__(self, image: Tensor) -> Any:
        """The image in the network's units; a copy of it, if there is no preprocess."""
        if self.preprocess is None:
            return lent(image)
        if not torch.compiler.is_compiling():
            return self._look(image)
        return _look_eagerly(self, image) if self.preprocess.draws(image) else self.preprocess(image)

    def _look(self, image: Tensor) -> Any:
        assert self.preprocess is not None
        if self.state is None:
            self.state = self.preprocess.random_state(self.device)
            seen = self.preprocess(image)
            self.random = self.state.has_moved()
            return seen
        if self.random:
            return self._again(image, self.preprocess, self.state)
        return self.preprocess(image)

    def _again(self, image: Tensor, preprocess: Preprocess, first: RandomState) -> Any:
        now = preprocess.random_state(image.device)  # others may have drawn since, and must not draw the same again
        first.restore()
        try:
            return preprocess(image)
        finally:
            now.restore()


# torch.compiler.disable, without its import of dynamo.
_look_eagerly = torch._disable_dynamo(Draw._look)  # type: ignore[attr-defined]


def prepare(
    where: str, preprocess: Callable[..., Any] | None, generator: torch.Generator | None = None
) -> Preprocess | None:
    """A caller's ``preprocess`` argument, as a term keeps it."""
    if preprocess is None:
        return None
    check_function(where, preprocess, "preprocess must be callable as preprocess(x)")
    return Preprocess(preprocess, generator)


def only_reads(criterion: object) -> bool:
    """Whether a criterion is one of torch's own or ours, which never write on what they compare."""
    if isinstance(criterion, Frozen):
        criterion = type(criterion.network)
    return getattr(criterion, "__module__", "") in _READERS


def _has_statistics(module: nn.Module) -> bool:
    return any(name.startswith("running_") or name == "num_batches_tracked" for name in module._buffers)
