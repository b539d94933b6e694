"""Nests of tensors: what networks return, labels come in, and modules keep."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a nest of mappings, lists, tuples, sets and dataclasses, in order."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for _, value in children(tree):
            yield from tensors_in(value)


def children(tree: Any) -> list[tuple[str, Any]]:
    """What a container holds, each with its path from there; nothing for anything else."""
    if isinstance(tree, Mapping):
        return [(f"[{key!r}]", value) for key, value in tree.items()]
    if isinstance(tree, (list, tuple, set, frozenset)):
        return [(f"[{i}]", value) for i, value in enumerate(tree)]
    return [(f".{name}", value) for name, value in _fields(tree).items()]


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every tensor replaced; a part in which none changes is returned as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in tree.items()}
        if all(new is old for new, old in zip(mapped.values(), tree.values(), strict=True)):
            return tree
        return mapped if isinstance(tree, defaultdict) else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(value, function) for value in tree]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    changed = {}
    for name, value in _fields(tree).items():
        new = map_tensors(value, function)
        if new is not value:
            changed[name] = new
    if not changed:
        return tree
    twin = copy.copy(tree)
    for name, value in changed.items():
        object.__setattr__(twin, name, value)  # a frozen dataclass forbids its own
    return twin


def lent(tree: Any) -> Any:
    """A copy for foreign code to write on: a caller's image or label must not change under its hands."""
    return map_tensors(tree, torch.clone)


def _fields(tree: Any) -> dict[str, Any]:
    """The attributes of a record: a dataclass, an attrs class or a namespace."""
    if isinstance(tree, type):
        return {}
    if dataclasses.is_dataclass(tree):
        return {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if hasattr(tree, f.name)}
    if hasattr(type(tree), "__attrs_attrs__"):
        return {a.name: getattr(tree, a.name) for a in type(tree).__attrs_attrs__}
    return dict(vars(tree)) if isinstance(tree, SimpleNamespace) else {}
