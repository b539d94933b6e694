"""A denoiser to hand on: weights as safetensors that say what they are, in a folder or a repository of a model hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..dose import WINDOW_HU
from ..run import replacing
from .denoiser import Denoiser, load_denoiser

WEIGHTS = "denoiser.safetensors"
_FORMAT = "taskloss tod_net_ct denoiser 1"
_REPOSITORY = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def write_weights(folder: Path, network: Denoiser) -> Path:
    """Write `denoiser.safetensors`: the weights, and in its header the architecture and the network's `facts`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHTS
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    header = {"format": _FORMAT, "config": json.dumps(network.config), "facts": json.dumps(network.facts)}
    header["sha256"] = _digest(weights, header)
    with replacing(path) as unfinished:
        save_file(weights, unfinished, metadata=header)
    return path


def weights_of(source: str | os.PathLike[str]) -> Path:
    """The file of weights that is meant by a file, an exported folder, or a repository id `owner/name[@revision]`.

    Of a repository, the weights and the card are downloaded, to the hub's own cache.

    Raises:
        ValueError: the folder holds no export, or the repository cannot be had.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise ValueError(
                f"{path.name}: expected a folder from `export`, got one without {WEIGHTS}; give the folder or its file"
            )
        return path / WEIGHTS
    repository = _REPOSITORY.fullmatch(os.fspath(source))
    if path.exists() or path.suffix or repository is None or path.parent.is_dir():
        return path  # a file that is there, or one whose reader says that it is not
    return _downloaded(repository["name"], repository["revision"]) / WEIGHTS


def load_weights(path: Path) -> Denoiser:
    """Read a denoiser from a training's checkpoint or from an export, on the CPU, in eval mode; nothing is executed.

    Raises:
        ValueError: the file is missing, damaged, or of another architecture.
    """
    if path.suffix != ".safetensors":
        return load_denoiser(path)
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path.name}: expected an exported denoiser, got no file at {path}; check the path")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header: dict[str, str] = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name}: expected an exported denoiser, got a damaged file; copy it again") from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path.name}: expected an exported denoiser ({_FORMAT}), got other weights; make it by `export`"
        )
    digest = header.pop("sha256", None)  # an export of an earlier version has none
    if digest is not None and digest != _digest(weights, header):
        raise ValueError(f"{path.name}: expected the weights as `export` wrote them, got others; copy the file again")
    try:
        network = Denoiser(**json.loads(header["config"]))
        network.load_state_dict(weights)
        facts: dict[str, Any] = json.loads(header["facts"])
        lower, upper = facts.get("window_hu", WINDOW_HU)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path.name}: expected an exported denoiser, got the weights of another architecture; export it again"
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise ValueError(f"{path.name}: expected finite weights, got NaN or infinity; export an earlier checkpoint")
    network.facts = {**facts, "window_hu": (float(lower), float(upper))}
    return network.eval()


def _digest(weights: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of the weights and of what the header says of them: safetensors has no checksum of its own."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in sorted(weights):
        total.update(key.encode() + weights[key].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _downloaded(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name}: expected huggingface_hub for a repository of a model hub, got none; pip install huggingface-hub"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[WEIGHTS, "README.md"]))
    except Exception as error:  # the hub's own errors, and those of whatever carries them
        raise ValueError(
            f"{name}: expected a file, a folder or a repository id, got none of them here and no answer from the hub "
            f"({type(error).__name__}); check the name and the network"
        ) from error
