"""Everything a network holds, whether or not ``nn.Module`` knows of it.

Modules in Python lists, plain tensor attributes and packed (quantised) weights are in nobody's ``parameters()``, yet
they decide what the network says.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.checks import InputError
from taskloss.trees import children, map_tensors, tensors_in

Slot = tuple[Any, Any, Any]  # a dict or list, a key in it, and what is there

_BOOKKEEPING = frozenset(nn.Module().__dict__)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ATOMS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def modules_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module by its path, the registered ones first; ``blocks[0].conv`` is one kept in a Python list."""
    found = list(network.named_modules())
    seen = {id(module) for _, module in found}
    for path, module in found:  # grows while it is read: hidden modules may hide more
        for name, value in _kept(module, path):
            if isinstance(value, nn.Module) and id(value) not in seen:
                inner = [(_join(name, rest), m) for rest, m in value.named_modules() if id(m) not in seen]
                seen.update(id(m) for _, m in inner)
                found.extend(inner)
    return found


def plain_tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither parameters nor buffers: attributes, in containers or not, and packed weights."""
    return {
        name: value
        for path, module in modules_of(network)
        for name, value in _kept(module, path)
        if isinstance(value, Tensor)
    }


def registered_tensors_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, of every module of :func:`modules_of`, each once."""
    modules = modules_of(network)
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        seen: set[int] = set()
        for path, module in modules:
            for name, tensor in kind(module, recurse=False):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield _join(path, name), tensor


def copy_of(network: nn.Module) -> nn.Module:
    """A deep copy, in which tensors that carry a graph have become plain values.

    Raises:
        InputError: If the network holds something that cannot be copied.
    """
    held = (*plain_tensors_of(network).values(), *(t for _, t in registered_tensors_of(network)))
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in held if t.grad_fn is not None}
    try:
        with torch.no_grad():  # else the copy of a TorchScript network has no leaves
            return copy.deepcopy(network, memo)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            "frozen",
            f"this {type(network).__name__} cannot be copied ({str(error).splitlines()[0]}); "
            "pass copy=False to freeze it in place",
        ) from error


def tensor_slots(module: nn.Module) -> list[Slot]:
    """Every place among a module's plain attributes that holds tensors, with what it holds."""
    return [slot for name in _plain_names(module) for slot in _slots(module.__dict__, name)]


def put_back(module: nn.Module, slots: Iterable[Slot]) -> bool:
    """Undo what a forward pass wrote over a module's tensors and detach what it added; whether there was any.

    A kept output would hold the whole graph, the denoiser's too, until the next call, and could not be copied.
    """
    changed = False
    for holder, key, value in slots:
        with contextlib.suppress(KeyError, IndexError):
            if holder[key] is not value:
                holder[key] = value
                changed = True
    return release_graphs(module) or changed


def release_graphs(module: nn.Module) -> bool:
    """Detach the buffers and plain attributes that carry a graph; whether there were any."""
    places: list[Slot] = [(module._buffers, name, None) for name, _ in module._buffers.items()]
    places += [slot for name in _plain_names(module) for slot in _slots(module.__dict__, name)]
    found = False
    for holder, key, _ in places:
        released = map_tensors(holder[key], lambda t: t if t.grad_fn is None else t.detach())
        if released is not holder[key]:
            holder[key] = released
            found = True
    return found


def keeps_values(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function that moves tensors keeps what is in them; ``to_empty()`` and ``to("meta")`` do not."""
    probe = torch.frombuffer(bytearray(os.urandom(64)), dtype=torch.uint8).float()
    moved = function(probe)
    return not moved.is_meta and torch.equal(moved.cpu(), probe.to(moved.dtype))


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """The present parameters and buffers by path; one object where several names share one."""
    once: dict[int, Tensor] = {}
    return {
        _join(path, name): once.setdefault(id(tensor), tensor.detach())
        for path, module in modules_of(network)
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        if tensor is not None
    }


@torch.no_grad()
def restore_(network: nn.Module, values: Mapping[str, Tensor]) -> bool:
    """Write values back; False while there is no memory to write to, on the meta device."""
    written: dict[int, Tensor] = {}
    for path, module in modules_of(network):
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is None:
                    continue
                if tensor.is_meta:
                    return False
                value = values[_join(path, name)]
                if written.setdefault(id(value), tensor) is tensor:
                    tensor.copy_(value)
                else:
                    holder[name] = written[id(value)]  # tied weights stay tied
    return True


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and every bit."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _feed(sha.update, name, tensor)
    return sha.hexdigest()


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """One number for each tensor that changes with its bits and with their places, in one transfer from the device."""
    sums: list[Tensor] = []
    for tensor in tensors:
        if tensor.layout is torch.strided and not tensor.is_quantized:
            flat = tensor.detach().reshape(-1)
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
            bits = flat.view(_INTEGERS[flat.itemsize])
            places = torch.arange(1, bits.numel() + 1, device=bits.device)
            sums.append((bits.long() * places).sum())  # wraps round, which does no harm
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []


def _feed(update: Callable[[bytes], None], name: str, tensor: Tensor) -> None:
    tensor = tensor.detach()
    update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # a wrapper (DTensor, torchao) has no storage of its own
        for inner in tensor.__tensor_flatten__()[0]:
            _feed(update, inner, getattr(tensor, inner))
        return
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    elif tensor.is_quantized:
        tensor = tensor.dequantize()
    data = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    update(ctypes.string_at(data.data_ptr(), data.nbytes) if data.nbytes else b"")


def _plain_names(module: nn.Module) -> list[str]:
    return [
        name
        for name, value in module.__dict__.items()
        if name not in _BOOKKEEPING and not (value is None or isinstance(value, _ATOMS))
    ]


def _kept(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """The tensors and modules in a module's plain attributes, by path."""
    for name, value in _scripted(module) if isinstance(module, torch.jit.ScriptModule) else _attributes(module):
        yield from _leaves(value, _join(path, name), depth=8)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module.__dict__[name]) for name in _plain_names(module))


def _scripted(module: torch.jit.ScriptModule) -> Iterator[tuple[str, Any]]:
    """What TorchScript holds beside parameters and buffers: attributes, and tensors in the code of a traced method."""
    registered = {name for kind in (module.named_parameters, module.named_buffers) for name, _ in kind(recurse=False)}
    kinds = getattr(module, "_concrete_type", None)  # none once it is frozen: all of it is in the code then
    for name in () if kinds is None else kinds.get_attributes():
        if name not in registered:
            yield name, getattr(module, name)
    for name in module._c._method_names():
        yield f"{name}.constants", module._c._get_method(name).code_with_constants[1]


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, nn.Module)):
        yield path, value
    elif depth > 0 and not isinstance(value, _ATOMS):
        if type(value) is torch.ScriptObject and hasattr(value, "__getstate__"):  # packed weights
            value = value.__getstate__()
        for name, inner in children(value):
            yield from _leaves(inner, path + name, depth - 1)


def _slots(holder: Any, key: Any, depth: int = 8) -> Iterator[Slot]:
    value = holder[key]
    if isinstance(value, (dict, list)) and depth > 0:  # they may be shared between modules: look into them
        for inner in list(value) if isinstance(value, dict) else range(len(value)):
            yield from _slots(value, inner, depth - 1)
    elif not isinstance(value, _ATOMS) and any(True for _ in tensors_in(value)):
        yield holder, key, value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
