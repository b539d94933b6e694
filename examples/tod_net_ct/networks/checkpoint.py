"""A network in a file that is never unpickled: written whole or not at all, with one sentence for every mistake."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..run import is_intact, replacing

Network = TypeVar("Network", bound=nn.Module)


def write_checkpoint(path: Path, form: str, network: nn.Module, **content: Any) -> None:
    """Write a network's weights with its form's name and what is needed to build it again."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        torch.save({"format": form, "state_dict": state, **content}, file)  # a path's name would go into the bytes


def read_checkpoint(
    path: Path, form: str, what: str, source: str, build: Callable[[Mapping[str, Any]], Network]
) -> Network:
    """Read the file of `write_checkpoint`: on the CPU, in eval mode. Nothing in it is executed.

    Args:
        path: where.
        form: the form's name, as it was written.
        what: what is expected, for the sentences.
        source: where such a file comes from, for the sentences.
        build: makes the network from the file's contents; its weights are filled in here.

    Raises:
        ValueError: the file is missing, truncated, a stranger's pickle, or of another architecture.
    """
    if not path.is_file():
        raise ValueError(f"{path.name}: expected {what}, got no file at {path}; check the path")
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start not in (b"PK\x03\x04", b""):  # torch.save writes zip files; anything else is not even tried
            raise pickle.UnpicklingError
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not is_intact(path):  # a flipped bit in a weight would go unnoticed
            raise OSError("a checksum differs")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name}: expected {what}, got another file, which is not unpickled for safety; give {source}"
        ) from error
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, OSError, KeyError, ValueError ...
        raise ValueError(
            f"{path.name}: expected {what}, got a truncated or damaged file; copy it again or train once more"
        ) from error
    if not isinstance(content, Mapping) or content.get("format") != form:
        raise ValueError(f"{path.name}: expected {what} ({form}), got other contents; give {source}")
    try:
        network = build(content)
        network.load_state_dict(content["state_dict"])
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path.name}: expected {what}, got the weights of another architecture; give {source} of this version"
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise ValueError(f"{path.name}: expected finite weights, got NaN or infinity; take an earlier checkpoint")
    return network.eval()
