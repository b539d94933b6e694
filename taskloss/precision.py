"""Criteria run in full precision, whatever autocast the caller trains under."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloss.trees import map_tensors

HALF = (torch.float16, torch.bfloat16)


def full_precision(tree: Any) -> Any:
    """Cast half and bfloat16 tensors to float32 inside any nest of containers and dataclasses; leave the rest.

    A container without such tensors is returned as it is.

    A sum over four million voxels overflows in float16 and loses its small terms in bfloat16; criteria are cheap
    beside the network that feeds them, so they get float32.
    """
    return map_tensors(tree, _widened)


def no_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast is off."""
    return torch.autocast(device.type, enabled=False)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor
