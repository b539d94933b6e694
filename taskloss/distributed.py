"""The same numbers on one process and on many."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def n_processes() -> int:
    """How many processes share the batch; one when ``torch.distributed`` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes_(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if n_processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_weights_(network: nn.Module) -> None:
    """Give every process the first one's parameters and buffers; nothing to do on one process."""
    if n_processes() > 1:
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def average_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over all processes in one message per dtype; nothing to do on one process.

    A parameter without a gradient counts as zero, so that every process sends the same message.
    """
    n = n_processes()
    if n == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in by_kind.values():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group])
        sum_over_processes_(flat).div_(n)
        for parameter, mean in zip(group, torch.split(flat, [p.numel() for p in group]), strict=True):
            parameter.grad = mean.view_as(parameter).clone()
