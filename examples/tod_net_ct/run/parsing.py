"""A setting's value as text, and back."""

from __future__ import annotations

import typing
from typing import Any


def as_text(value: Any) -> str:
    """The text from which `parse_text` reads this value."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def parse_text(name: str, text: str, kind: Any, example: Any) -> Any:
    """A value of this type from text; tuples are divided by commas, numbers of them by an x, names by a plus too.

    Raises:
        ValueError: the text is none; `example` shows one.
    """
    expected = getattr(kind, "__name__", str(kind))
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            # a plus parts names, but not within a name that carries settings, as in tod_net@guides=unet+vnet
            between = ("+" if "@" not in text else ",") if inner[0] is str else "x"
            parts = [part for part in text.replace(between, ",").split(",") if part]
            if len(inner) > 1 and inner[1] is not Ellipsis and len(parts) != len(inner):
                raise ValueError
            return tuple(inner[0](part) for part in parts)
        return kind(text)
    except (ValueError, KeyError) as error:
        expected = str(kind) if typing.get_origin(kind) else expected
        raise ValueError(
            f"--set {name}: expected {expected}, got {text!r}; for example {name}={as_text(example)}"
        ) from error
