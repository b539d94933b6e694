"""A network's modules watched at work: what each takes in and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.arguments import arguments
from taskloss.holdings import modules_of
from taskloss.trees import lent, map_tensors, tensors_in

Record = dict[str, tuple[Any, Any]]  # a module's inputs and outputs at its first call, by its path


def watched(
    network: nn.Module,
    inputs: Any,
    named: Mapping[str, Any] | None = None,
    *,
    before: Callable[[str, nn.Module, Any], None] | None = None,
    after: Callable[[str, nn.Module, Any, Any], None] | None = None,
) -> Any:
    """Run a network and call ``before`` and ``after`` around every module's forward pass, innermost first.

    Modules in plain lists are watched too; TorchScript takes no hooks, so only its root is.

    Args:
        network: The network, whose path is ``""``.
        inputs: A tuple of its arguments, a dict of them by name, or the one argument.
        named: Further arguments by name.
        before: Called as ``before(path, module, inputs)``.
        after: Called as ``after(path, module, inputs, result)``.
    """
    handles = []
    for name, module in modules_of(network):
        if module is network or isinstance(module, torch.jit.ScriptModule):
            continue
        if before is not None:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, named, name=name: before(name, m, (args, named)), with_kwargs=True
                )
            )
        if after is not None:
            handles.append(
                module.register_forward_hook(
                    lambda m, args, named, result, name=name: after(name, m, (args, named), result), with_kwargs=True
                )
            )
    try:
        if before is not None:
            before("", network, (inputs, named))
        result = call(network, inputs, named)
        if after is not None:
            after("", network, (inputs, named), result)
    finally:
        for handle in handles:
            handle.remove()
    return result


def call(network: nn.Module, inputs: Any, named: Mapping[str, Any] | None = None) -> Any:
    """A network called with a tuple of arguments, a dict of arguments by name, or the one argument."""
    positional, named = arguments(inputs, named)
    return network(*positional, **named)


def record(network: nn.Module, inputs: Any, *, seed: int) -> Record:
    """What every module takes and gives at its first call, without a graph, from a fixed random state."""
    taken: dict[str, Any] = {}
    given: dict[str, Any] = {}

    def before(name: str, _module: nn.Module, inputs: Any) -> None:
        if name not in taken:
            taken[name] = lent(inputs)

    def after(name: str, _module: nn.Module, _inputs: Any, result: Any) -> None:
        if name not in given:
            given[name] = lent(result)

    torch.manual_seed(seed)
    with torch.no_grad():
        watched(network, lent(inputs), before=before, after=after)
    return {name: (taken[name], given[name]) for name in given}


def image_in(inputs: Any) -> Tensor | None:
    """The image among a network's inputs: the first floating-point tensor."""
    return next((t for t in tensors_in(inputs) if t.is_floating_point()), None)


def with_image(inputs: Any, image: Tensor) -> Any:
    """The same inputs with another image, the rest copied."""
    old = image_in(inputs)
    return map_tensors(inputs, lambda t: image if t is old else t.clone())


def innermost(names: list[str]) -> Iterator[str]:
    """Names that contain no other name of the list."""
    for name in names:
        if not any(other != name and (name == "" or other.startswith((f"{name}.", f"{name}["))) for other in names):
            yield name


def spell(network: nn.Module, name: str) -> str:
    """A module's path as people know it; the class's name for the network itself."""
    return name or getattr(network, "original_name", type(network).__name__)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors of any dtype and layout agree, up to a share of the second one's greatest number."""
    if a.is_nested or b.is_nested:
        return True  # nothing is known
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = _plain(a), _plain(b)
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.nan_to_num().abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * max(scale, 1e-12), equal_nan=True)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj()).double()
    return tensor.double() if tensor.is_floating_point() and tensor.device.type != "mps" else tensor
