"""The same numbers on one process and on many."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

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
            if not is_sharded(tensor):  # the parts make one whole, whatever each process drew
                dist.broadcast(tensor.detach(), src=0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds a part of it (``fully_shard``): then its owner averages the gradient too."""
    return hasattr(tensor, "full_tensor")


def average_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over all processes in one message per dtype; nothing to do on one process.

    A parameter without a gradient counts as zero, so that every process sends the same message.
    """
    n = n_processes()
    if n == 1:
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad and not is_sharded(parameter):
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in by_kind.values():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group])
        sum_over_processes_(flat).div_(n)
        for parameter, mean in zip(group, torch.split(flat, [p.numel() for p in group]), strict=True):
            parameter.grad = mean.view_as(parameter).clone()


def shards_itself(network: nn.Module) -> bool:
    """Whether ``fully_shard`` looks after a network's weights, whole or in parts at this moment."""
    return any(hasattr(module, "reshard") and hasattr(module, "unshard") for module in network.modules())


def to_the_input_alone(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` with a gradient at x and none at the weights of a network whose weights cannot be detached."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        with torch.no_grad():
            return function(x)
    return _ToTheInputAlone.apply(x, function)  # type: ignore[no-any-return]


class _ToTheInputAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.y = function(ctx.x)
        return ctx.y.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (at_x,) = torch.autograd.grad(ctx.y, ctx.x, gradient)
        return at_x, None


class ReplicaCheck:
    """Notices that the processes train denoisers of their own, because nothing averages their gradients.

    That happens in silence where a trainer averages in its own backward and ``loss.backward()`` is called instead. The
    weights behind x_hat are compared (two sums in one message) before the second, third, fourth, eighth... step, in a
    call that all processes make anyway: after one step of Adam, whose first goes by signs alone, they may agree by
    chance. Weights that a trainer shards are left out: they differ by right.
    """

    def __init__(self) -> None:
        self._weights: list[weakref.ref[Tensor]] = []
        self._calls = 0
        self._told = False

    def __reduce__(self) -> tuple[type[ReplicaCheck], tuple[()]]:
        return type(self), ()  # a copy knows no denoiser

    def note(self, x_hat: Tensor) -> None:
        """Remember the weights behind x_hat, at the first image that has any."""
        if n_processes() > 1 and not self._weights:
            self._weights = [weakref.ref(weight) for weight in _leaves(x_hat)]

    def compare(self, where: str, device: torch.device) -> None:
        """Warn once, on every process, if the weights differ; all processes must make this call."""
        self._calls += 1
        due = self._calls == 3 or (self._calls > 1 and self._calls & (self._calls - 1) == 0)
        if n_processes() == 1 or self._told or not due:
            return
        sums = self._sums(device)
        spread = torch.cat([sums, -sums])
        dist.all_reduce(spread, op=dist.ReduceOp.MAX)
        most, least = spread[: len(sums)], -spread[len(sums) :]
        if bool((most - least > 1e-9 * most[-1]).any()):
            self._told = True
            warnings.warn(
                f"{where}: the denoiser's weights differ between the processes, because nothing averages its "
                "gradients; call the trainer's own backward (self.manual_backward(loss), fabric.backward(loss)) "
                "in place of loss.backward(), or call the denoiser through DistributedDataParallel",
                stacklevel=3,
            )

    def _sums(self, device: torch.device) -> Tensor:
        weights = [weight for reference in self._weights if (weight := reference()) is not None]
        whole = [type(w) is nn.Parameter and w.untyped_storage().size() > 0 for w in weights]
        if not weights or not all(whole):
            return torch.zeros(2, dtype=torch.float64, device=device)
        wide = (weight.detach().double() for weight in weights)  # one at a time: twice the memory of the largest
        return torch.stack([torch.stack([w.sum(), w.square().sum()]) for w in wide]).sum(0).to(device)


def _leaves(x: Tensor) -> list[Tensor]:
    """The parameters that x was computed from."""
    found: list[Tensor] = []
    seen, waiting = set(), [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        weight = getattr(node, "variable", None)
        if isinstance(weight, nn.Parameter):
            found.append(weight)
        waiting += [before for before, _ in node.next_functions]
    return found
