"""How a task network is called: with the image, what else it takes, and the label if it computes its own loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.checks import InputError, nearest, shape

_LABEL_NAMES = ("labels", "label", "targets", "target")


def arguments(image: Any, more: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``preprocess`` gave, as a call's arguments: a tuple by position, a dict by keyword, all else as one.

    Args:
        image: What ``preprocess`` gave.
        more: Further arguments by keyword.
    """
    if isinstance(image, Mapping):
        return (), {**image, **(more or {})}
    if isinstance(image, tuple) and not hasattr(image, "_fields"):
        return image, dict(more or {})
    return (image,), dict(more or {})


def images_in(image: Any) -> list[Tensor]:
    """The image tensors of what ``preprocess`` gave: all of a list, the first one of a tuple or dict."""
    if isinstance(image, Mapping):
        image = tuple(image.values())
    tensors = [t for t in (image if isinstance(image, (list, tuple)) else [image]) if isinstance(t, Tensor)]
    return tensors[:1] if isinstance(image, tuple) else tensors


def label_name(network: nn.Module) -> str | None:
    """The parameter by which a network takes its label, as in transformers and torchvision; None: by position."""
    network = getattr(network, "_orig_mod", network)
    try:
        parameters = inspect.signature(network.forward).parameters
    except (TypeError, ValueError):  # TorchScript has none to show
        return None
    return next((name for name in _LABEL_NAMES if name in parameters), None)


def split(where: str, label: Any, names: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Part a label into what the criterion compares with and what the network takes.

    Args:
        where: The term that errors name.
        label: A dict, or a list or tuple with one dict (or None) per sample.
        names: The keys that the network takes.

    Returns:
        The label proper (the one entry that is left, or a dict of those that are), and the network's by name.

    Raises:
        InputError: If the label lacks one of them, or holds nothing else.
    """
    if not names:
        return label, {}
    if isinstance(label, (list, tuple)) and any(isinstance(entry, Mapping) for entry in label):
        parts = [(None, {}) if entry is None else split(where, entry, names) for entry in label]
        return [own for own, _ in parts], {
            name: _column(where, name, [more.get(name) for _, more in parts]) for name in names
        }
    if not isinstance(label, Mapping):
        raise InputError(
            where,
            f"inputs={list(names)} are read off the label, which must be a dict with those keys and the label's own, "
            f"got {type(label).__name__}; for instance {{'label': ..., {names[0]!r}: ...}}",
        )
    for name in names:
        if name not in label:
            raise InputError(where, f"the label has no {name!r}, which inputs= names; {nearest(name, label)}")
    own = {key: value for key, value in label.items() if key not in names}
    if not own:
        raise InputError(where, f"the label holds nothing but the network's inputs {list(names)}; add the label itself")
    return next(iter(own.values())) if len(own) == 1 else own, {name: label[name] for name in names}


def _column(where: str, name: str, values: list[Any]) -> Any:
    """One input of every sample, collated; a sample without a label gets zeros, and is left out later."""
    given = [torch.as_tensor(v) for v in values if isinstance(v, (Tensor, bool, int, float))]
    if not given or len(given) < sum(v is not None for v in values):
        return values
    if any(t.shape != given[0].shape for t in given):
        raise InputError(
            where, f"the samples' {name!r} have shapes {', '.join(sorted({shape(t) for t in given}))}; pad them to one"
        )
    rest = iter(given)
    return torch.stack([torch.zeros_like(given[0]) if v is None else next(rest) for v in values])
