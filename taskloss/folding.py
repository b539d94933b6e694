"""Batch norm of a frozen network folded into the convolution before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_(network: nn.Module) -> int:
    """Put every eval-mode batch norm into the weights of the convolution whose only reader it is.

    The pairs are those that a trace by ``torch.fx`` shows; of a network that cannot be traced, neighbours within
    ``nn.Sequential``. The norm's place is taken by ``nn.Identity``.

    Args:
        network: A network in eval mode; it is changed.

    Returns:
        How many were folded.
    """
    once = {
        module for module, n in Counter(m for _, m in network.named_modules(remove_duplicate=False)).items() if n == 1
    }
    owners = Counter(id(p) for m in once for p in m.parameters(recurse=False))
    n_folded = 0
    for conv_name, norm_name in list(_pairs(network)):
        conv: Any = network.get_submodule(conv_name)
        norm: Any = network.get_submodule(norm_name)
        alone = {conv, norm} <= once and all(owners[id(p)] == 1 for p in conv.parameters())
        if not (alone and _is_plain(conv, CONVOLUTIONS) and _is_plain(norm, NORMS)) or norm.running_var is None:
            continue
        state = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        with torch.no_grad():
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *state)
        for parameter in conv.parameters():
            parameter.requires_grad_(False)
        parent, _, own = norm_name.rpartition(".")
        setattr(network.get_submodule(parent), own, nn.Identity().eval())
        n_folded += 1
    return n_folded


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is exactly PyTorch's, with nobody watching it and no weight that is computed."""
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in kinds and not watched and "forward" not in vars(module)


def _pairs(network: nn.Module) -> Iterator[tuple[str, str]]:
    from torch import fx  # it is slow to import

    try:
        graph = fx.Tracer().trace(network)
    except Exception:  # whatever the network's own code raises when it meets a proxy
        yield from _neighbours(network)
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        before: Any = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1 or node.kwargs:
            continue
        if calls[node.target] == calls[before.target] == 1:
            yield str(before.target), str(node.target)


def _neighbours(network: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in network.named_modules():
        if _is_chain(module):
            flat = list(_flat(name, module))
            yield from zip(flat, flat[1:], strict=False)


def _is_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _flat(name: str, chain: nn.Module) -> Iterator[str]:
    for own, child in chain.named_children():
        path = f"{name}.{own}" if name else own
        watched = child._forward_hooks or child._forward_pre_hooks
        if _is_chain(child) and not watched:
            yield from _flat(path, child)
        else:
            yield path
