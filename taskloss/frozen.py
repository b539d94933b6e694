"""A task network that cannot change: not trained, not saved, not switched, not re-initialised."""

from __future__ import annotations

import contextlib
import copy as _copy
import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from taskloss import lean as _lean
from taskloss.checks import InputError, nearest


class Frozen(nn.Module):
    """Hold a network so that no parent module, trainer or optimiser can change it.

    The network is deep-copied, put in eval mode, stripped of ``requires_grad`` and kept out of the module
    registry: it is absent from ``parameters()`` and ``state_dict()`` and untouched by ``train()``, ``apply()`` and
    ``requires_grad_()``, yet it is moved by ``.to()``, ``.cuda()`` and ``.double()`` and survives ``deepcopy`` and
    pickling. Gradients flow through it to its input. Pass one ``Frozen`` to several terms to share one copy.

    Args:
        network: Any ``nn.Module``. ``DataParallel`` and ``DistributedDataParallel`` wrappers are taken off.
        copy: Keep a deep copy (default). With ``False`` the caller's own network is frozen in place, which saves
            its memory; every call then checks that nobody has switched it back.
        checkpoint: Recompute activations in the backward pass instead of storing them.
        computes_loss: The network computes its own loss, which it does in training mode only (torchvision's
            detectors): modules that have children are put in training mode, while leaves (normalisation, dropout)
            stay in eval, so that batch statistics are neither used nor moved.
        lean: Keep for the backward pass only what the gradient at the input needs (default): no layer's input for
            gradients of weights, one bit for each value of a rectifier. Values and gradients stay as they are.

    Raises:
        TypeError: If ``network`` is not an ``nn.Module``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> frozen = Frozen(net)
        >>> list(frozen.parameters()), frozen.state_dict(), frozen.train().network.training
        ([], OrderedDict(), False)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        copy: bool = True,
        checkpoint: bool = False,
        computes_loss: bool = False,
        lean: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"frozen: expected an nn.Module, got {type(network).__name__}; wrap the function in an nn.Module"
            )
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        if isinstance(network, Frozen):
            network = network.network
        if copy:
            with torch.no_grad():  # else the copy of a TorchScript network has no leaves
                network = _copy.deepcopy(network)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in network.modules():
            module.training = computes_loss and not _is_leaf(module)
        # A list is invisible to nn.Module's registry; that is the whole trick.
        self._hidden = [network]
        self._shared = not copy
        self.checkpoint = checkpoint
        self.computes_loss = computes_loss
        self.lean = lean
        self.made_lean: dict[str, int] = {}  # in the last run, how many calls of which functions

    @property
    def network(self) -> nn.Module:
        """The frozen network itself, for reading."""
        return self._hidden[0]

    def forward(self, *inputs: Any) -> Any:
        """Run the network; gradients reach ``inputs`` and nothing else."""
        self._check_untouched()
        return self._run(self.network, *inputs)

    def features(self, x: Tensor, layers: Sequence[str]) -> dict[str, Any]:
        """The outputs of the named layers, at their first call; the network stops once it has them all.

        Args:
            x: Input of the network.
            layers: Paths as ``network.named_modules()`` spells them.

        Raises:
            InputError: If a layer does not exist, is never reached, or is overwritten in place after it ran.
        """
        self._check_untouched()
        names = list(layers)
        outputs = self._run(lambda value: _capture(self.network, value, names), x)
        return dict(zip(names, outputs, strict=True))

    def check_input(self, where: str, image: Tensor) -> None:
        """Refuse an input on another device or of another dtype than the network's weights."""
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        if weight is None:
            return
        if weight.device != image.device:
            raise InputError(
                where,
                f"x_hat is on {image.device} but the task network is on {weight.device}; "
                f"call loss.to('{image.device}')",
            )
        if weight.dtype != image.dtype and not torch.is_autocast_enabled(image.device.type):
            raise InputError(
                where,
                f"x_hat is {image.dtype} but the task network is {weight.dtype}; call loss.to({image.dtype})",
            )

    def digest(self) -> str:
        """SHA-256 of every parameter and buffer: equal digests prove that the network did not change."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self._tensors(), key=lambda pair: pair[0]):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            data = tensor.detach().cpu().contiguous()
            sha.update(ctypes.string_at(data.data_ptr(), data.nbytes) if data.nbytes else b"")
        return sha.hexdigest()

    def extra_repr(self) -> str:
        """The kind and size of what is inside."""
        count = sum(p.numel() for p in self.network.parameters())
        made = f" ({', '.join(f'{n} {name}' for name, n in self.made_lean.items())})" if self.made_lean else ""
        words = f"{type(self.network).__name__}, {count:,} parameters, checkpoint={self.checkpoint}"
        return f"{words}, lean={self.lean}{made}"

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        if self.lean and _lean.is_possible():
            function = partial(self._run_lean, function)
        if self.checkpoint and torch.is_grad_enabled():
            return _checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def _run_lean(self, function: Callable[..., Any], *inputs: Any) -> Any:
        with _lean.Lean() as mode:
            outputs = function(*inputs)
        self.made_lean = dict(mode.made)
        return outputs

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        return chain(self.network.named_parameters(), self.network.named_buffers())

    def _check_untouched(self) -> None:
        if not self._shared or torch.compiler.is_compiling():
            return
        for name, module in self.network.named_modules():
            if module.training and not (self.computes_loss and not _is_leaf(module)):
                raise InputError(
                    "frozen",
                    f"the shared network's {name or 'root'!r} was switched to training mode; "
                    "call network.eval(), or let Frozen keep its own copy (copy=True)",
                )
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                raise InputError(
                    "frozen",
                    f"the shared network's {name!r} requires a gradient again; "
                    "call network.requires_grad_(False), or let Frozen keep its own copy (copy=True)",
                )

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        # Modules move and cast through _apply: the hidden network has to be handed on.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse:
            self.network._apply(fn)  # type: ignore[no-untyped-call]
        return self


def freeze(
    network: nn.Module,
    *,
    copy: bool = True,
    checkpoint: bool = False,
    computes_loss: bool = False,
    lean: bool = True,
) -> Frozen:
    """Freeze a network, or share one that is frozen already."""
    if isinstance(network, Frozen) and not (checkpoint or computes_loss or (network.lean and not lean)):
        return network
    return Frozen(network, copy=copy, checkpoint=checkpoint, computes_loss=computes_loss, lean=lean)


def hold(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Freeze a callable that is a module (so that it moves with its parent); leave a plain function as it is."""
    return freeze(function) if isinstance(function, nn.Module) else function


def check_layers(where: str, network: nn.Module, layers: Sequence[str]) -> None:
    """Refuse a layer path that the network does not have."""
    known = {name for name, _ in network.named_modules() if name}
    for layer in layers:
        if layer not in known:
            raise InputError(
                where,
                f"the network has no layer {layer!r}; {nearest(layer, known)} "
                "(see [name for name, _ in network.named_modules()])",
            )


def _is_leaf(module: nn.Module) -> bool:
    # Attention has a child, yet its dropout is its own.
    return next(module.children(), None) is None or isinstance(module, nn.MultiheadAttention)


class _AllReached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass that has nothing left to give."""


def _capture(network: nn.Module, x: Tensor, layers: Sequence[str]) -> tuple[Any, ...]:
    found: dict[str, tuple[Any, int]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.setdefault(name, (output, _version(output)))
            if len(found) == len(layers):
                raise _AllReached

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        with contextlib.suppress(_AllReached):
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in found:
            raise InputError("features", f"layer {name!r} never ran in the network's forward pass")
        output, version = found[name]
        if _version(output) != version:
            raise InputError(
                "features",
                f"layer {name!r} is overwritten in place by the layer after it; name that layer instead, "
                "or set its inplace to False",
            )
    return tuple(found[name][0] for name in layers)


def _version(output: Any) -> int:
    # Tensors of inference mode do not count their versions.
    return output._version if isinstance(output, Tensor) and not output.is_inference() else 0
