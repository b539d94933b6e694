"""How much of a program's memory is left to a network's features."""

from __future__ import annotations

import math

import torch

MEMORY_GB = 8.0
PROGRAM_GB = 1.0  # Python, torch and the network, beside the volumes and the features


def features_gib(memory_gb: float | None, volumes_gb: float, device: torch.device) -> float:
    """What the features may take, in GiB, of the GB that the whole program may take (on a GPU: of its memory).

    Raises:
        ValueError: it is no number of GB, or too little beside the program and its volumes.
    """
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise ValueError(f"memory_gb: expected a positive number of GB, got {memory_gb:g}; for example --memory-gb 8")
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0] / 2**30 if memory_gb is None else memory_gb * 1e9 / 2**30
    memory_gb = MEMORY_GB if memory_gb is None else memory_gb
    held_gb = PROGRAM_GB + volumes_gb
    if memory_gb <= held_gb:
        raise ValueError(f"memory_gb: expected more than {held_gb:.1f} GB, got {memory_gb:g}; give more --memory-gb")
    return (memory_gb - held_gb) * 1e9 / 2**30
