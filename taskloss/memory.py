"""The features of the last reference, kept while nothing that they depend on has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloss.checks import readable
from taskloss.trees import lent


class Remembered:
    """The features of one reference, given again for an equal one seen by the same network in the same precision.

    Equal means equal in every value: a tensor can be written to behind its version counter (``.data``, NumPy's shared
    memory), so it is compared with a copy. That costs a device sync, and far less than the network.
    """

    def __init__(self) -> None:
        self._reference: Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._features: dict[str, Any] | None = None

    def recall(self, reference: Tensor, network: object) -> dict[str, Any] | None:
        """The features kept for an equal reference under the same state of the network (any value that tells)."""
        kept = self._reference
        if kept is None or torch.is_inference_mode_enabled() or not readable(reference):
            return None
        alike = (kept.shape, kept.dtype, kept.device) == (reference.shape, reference.dtype, reference.device)
        if not alike or self._state != _state(reference, network) or not torch.equal(kept, reference):
            return None
        return lent(self._features)  # type: ignore[no-any-return]  # a distance may write on what it compares

    def keep(self, reference: Tensor, network: object, features: dict[str, Any]) -> None:
        """Remember the features of one reference and forget the one before."""
        if not torch.is_inference_mode_enabled() and not reference.is_inference() and readable(reference):
            self._reference, self._state = reference.detach().clone(), _state(reference, network)
            self._features = lent(features)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy or a pickle starts with nothing remembered

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def _state(reference: Tensor, network: object) -> tuple[object, ...]:
    kind = reference.device.type
    return network, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
