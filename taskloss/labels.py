"""Which samples of a batch have a label, whatever nest the labels come in."""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taskloss.checks import InputError, readable, shape
from taskloss.trees import tensors_in


@dataclass(frozen=True)
class Entries:
    """A list or tuple with one entry per sample."""

    items: Sequence[Any]


class Labels:
    """The labels of a batch: a tensor whose first axis is the batch, one entry per sample, or a nest of such.

    A list is one entry per sample. A dict holds labels of several kinds, each a tensor or a list; a tuple does, where
    its parts are as long as the batch, and is one entry per sample otherwise. Anything else in a nest (a weight, a
    string) belongs to the whole batch.

    Args:
        where: The term that errors name.
        label: What the caller gave.
        x_hat: The batch.
        missing: The value that fills a label that is none; None for no such value.

    Raises:
        InputError: For a label that is not as long as the batch or on another device, or a sample that has one kind
            of label and lacks another.
    """

    def __init__(self, where: str, label: Any, x_hat: Tensor, missing: float | None = None) -> None:
        self.where = where
        self.n = x_hat.shape[0]
        self._spatial = x_hat.shape[2:]
        self.device = x_hat.device
        self._check_length(label, x_hat)
        self._tree = self._read(label, top=True)
        self.kept = self._find(missing)

    def of_the_kept(self, prediction: Any = None) -> Any:
        """The labels of the samples that have one, as the criterion reads them.

        Entries that lie on the image (or on the prediction) or are numbers are stacked to a tensor; sequences, boxes
        and dicts stay a list or tuple, so that the type never depends on the sizes in one batch.

        Args:
            prediction: What the network made of the images, if it has run.
        """
        return self._settle(select(self._tree, self.kept, self.n), prediction)

    def beside(self, more: Any) -> Any:
        """What goes beside the images of the kept samples: tensors and lists as long as the batch, cut to them."""
        return self._settle(select(self._read(more), self.kept, self.n), None)

    def _read(self, label: Any, top: bool = False) -> Any:
        """The same nest with its lists of entries marked."""
        if isinstance(label, Mapping):
            return _like(label, {key: self._read(value) for key, value in label.items()})
        if isinstance(label, list):
            return Entries(label) if top or len(label) == self.n else label
        if isinstance(label, tuple):
            if self._is_structure(label):
                parts = [self._read(value) for value in label]
                return type(label)(*parts) if hasattr(label, "_fields") else tuple(parts)
            return Entries(label)
        return label

    def _is_structure(self, parts: tuple[Any, ...]) -> bool:
        if len(parts) != self.n or hasattr(parts, "_fields"):
            return True
        axes = len(self._spatial)
        whole = [self._is_batch(part) for part in parts]
        maps = [isinstance(p, Tensor) and p.dim() > axes and p.shape[-axes:] == self._spatial for p in parts]
        return all(whole) or any(w and m for w, m in zip(whole, maps, strict=True))

    def _is_batch(self, part: Any) -> bool:
        if isinstance(part, Tensor):
            return part.dim() > 0 and part.shape[0] == self.n and part.shape != self._spatial
        return isinstance(part, list) and len(part) == self.n

    def _check_length(self, label: Any, x_hat: Tensor) -> None:
        if isinstance(label, Tensor):
            if self.n in (1, 3) and label.dim() > 1 and label.shape == x_hat.shape[1:] and len(label) != self.n:
                raise InputError(
                    self.where,
                    f"x_hat {shape(x_hat)} and label {shape(label)} have no batch axis; "
                    "call loss(x_hat[None], label[None])",
                )
            if label.dim() == 0 or label.shape[0] != self.n:
                raise InputError(
                    self.where,
                    f"x_hat holds {self.n} samples but label has shape {shape(label)}; "
                    "its first axis must be the batch",
                )
            if label.device != self.device:
                raise InputError(
                    self.where,
                    f"x_hat is on {self.device} but label is on {label.device}; call label.to('{self.device}')",
                )
        if isinstance(label, list) and len(label) != self.n:
            raise InputError(self.where, f"x_hat holds {self.n} samples but label has {len(label)} entries")

    def _find(self, missing: float | None) -> list[int] | None:
        """The samples that have a label; None for all of them. At most one device sync, and only for ``missing``."""
        if isinstance(self._tree, Tensor) and missing is None:
            return None
        lacks = {path: self._lacks(part, missing) for path, part in self._parts(self._tree)}
        unread = {path: flags for path, flags in lacks.items() if isinstance(flags, Tensor)}
        if unread:
            flags = torch.stack(list(unread.values()))
            if not readable(flags) and not torch.compiler.is_compiling():
                raise InputError(
                    self.where, "missing=... reads the label, which torch.func forbids; leave such samples out yourself"
                )
            lacks.update(zip(unread, flags.tolist(), strict=True))
        kept = [i for i in range(self.n) if not lacks or not all(flags[i] for flags in lacks.values())]
        for i in kept:
            without = [path for path, flags in lacks.items() if flags[i]]
            if without:
                raise InputError(
                    self.where,
                    f"sample {i} has a label, but none in label{without[0]}; give every label of a sample, or none",
                )
        return None if len(kept) == self.n else kept

    def _parts(self, tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        """The labels proper: tensors as long as the batch, and entries."""
        if isinstance(tree, Mapping):
            for key, value in tree.items():
                yield from self._parts(value, f"{path}[{key!r}]")
        elif isinstance(tree, tuple):
            for i, value in enumerate(tree):
                yield from self._parts(value, f"{path}[{i}]")
        elif isinstance(tree, Entries) or (isinstance(tree, Tensor) and tree.dim() > 0 and tree.shape[0] == self.n):
            yield path, tree

    def _lacks(self, part: Tensor | Entries, missing: float | None) -> Tensor | list[bool]:
        """For each sample, whether its label is none; a tensor where that has to be read off the device."""
        if isinstance(part, Tensor):
            if missing is None or part.numel() == 0:
                return [False] * self.n
            return _filled(part, missing).reshape(self.n, -1).all(1).to(self.device)
        flags = [self._lacks_one(entry, missing) for entry in part.items]
        if not any(isinstance(flag, Tensor) for flag in flags):
            return [bool(flag) for flag in flags]
        return torch.stack([torch.as_tensor(flag, device=self.device) for flag in flags])

    def _lacks_one(self, entry: Any, missing: float | None) -> Tensor | bool:
        if entry is None or missing is None:
            return entry is None
        if isinstance(entry, numbers.Real):
            return math.isnan(entry) if math.isnan(missing) else entry == missing
        flags = [_filled(t, missing).all() for t in tensors_in(entry) if t.numel()]  # no boxes are a label too
        return torch.stack(flags).all() if flags else False

    def _settle(self, tree: Any, prediction: Any) -> Any:
        if isinstance(tree, Entries):
            items = tree.items
            if items and all(self._lies_on_image(item, prediction) for item in items):
                tensors = [i if isinstance(i, Tensor) else torch.tensor(i, device=self.device) for i in items]
                if all(t.shape == tensors[0].shape for t in tensors):
                    return torch.stack(tensors)
            return items
        if isinstance(tree, Mapping):
            return _like(tree, {key: self._settle(value, prediction) for key, value in tree.items()})
        if isinstance(tree, tuple):
            parts = [self._settle(value, prediction) for value in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return tree

    def _lies_on_image(self, entry: Any, prediction: Any) -> bool:
        if not isinstance(entry, Tensor):
            return isinstance(entry, numbers.Real)
        axes = len(self._spatial)
        if entry.dim() == 0 or (entry.dim() >= axes and entry.shape[-axes:] == self._spatial):
            return True
        if not isinstance(prediction, Tensor):
            return False
        return entry.shape == prediction.shape[1:] or (entry.dim() > 1 and entry.shape == prediction.shape[2:])


def select(tree: Any, kept: list[int] | None, n: int) -> Any:
    """The same nest for some samples of the batch: tensors as long as the batch are indexed, entries picked.

    Args:
        tree: What :class:`Labels` read, or what a network takes.
        kept: The samples; None for all.
        n: How long the batch is.
    """
    if kept is None:
        return tree
    if isinstance(tree, Entries):
        return Entries(type(tree.items)(tree.items[i] for i in kept))  # type: ignore[call-arg]
    if isinstance(tree, Mapping):
        return _like(tree, {key: select(value, kept, n) for key, value in tree.items()})
    if isinstance(tree, tuple):
        parts = [select(value, kept, n) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, Tensor) and tree.dim() > 0 and tree.shape[0] == n:
        return tree[torch.tensor(kept, dtype=torch.long, device=tree.device)]
    return tree


def _like(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if all(new is old for new, old in zip(items.values(), tree.values(), strict=True)):
        return tree
    return items if isinstance(tree, defaultdict) else type(tree)(items)  # type: ignore[call-arg]


def _filled(tensor: Tensor, missing: float) -> Tensor:
    return tensor.isnan() if math.isnan(missing) else tensor == missing
