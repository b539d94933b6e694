"""Criteria run in full precision, whatever autocast the caller trains under."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def full_precision(tree: Any) -> Any:
    """Cast half and bfloat16 tensors to float32 inside any nest of dicts, lists and tuples; leave the rest.

    A container without such tensors is returned as it is.

    A sum over four million voxels overflows in float16 and loses its small terms in bfloat16; criteria are cheap
    beside the network that feeds them, so they get float32.
    """
    if isinstance(tree, Tensor):
        return tree.float() if tree.dtype in (torch.float16, torch.bfloat16) else tree
    if isinstance(tree, Mapping):
        cast = {key: full_precision(value) for key, value in tree.items()}
        if all(new is old for new, old in zip(cast.values(), tree.values(), strict=True)):
            return tree
        return cast if isinstance(tree, defaultdict) else type(tree)(cast)  # type: ignore[call-arg]
    if isinstance(tree, (list, tuple)):
        items = [full_precision(value) for value in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def no_autocast(device: torch.device) -> torch.autocast:
    """A context in which the caller's autocast is off."""
    return torch.autocast(device.type, enabled=False)
