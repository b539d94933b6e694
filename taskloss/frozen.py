"""A task network that cannot change: not trained, not saved, not switched, not re-initialised."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from taskloss import lean as _lean
from taskloss import pieces as _pieces
from taskloss.arguments import arguments, label_name
from taskloss.checks import InputError
from taskloss.conv3d import QuickConv3d, quicken_
from taskloss.features import capture
from taskloss.folding import fold_
from taskloss.holdings import (
    checksums,
    copy_of,
    digest,
    keeps_values,
    modules_of,
    plain_tensors_of,
    put_back,
    registered_tensors_of,
    release_graphs,
    restore_,
    snapshot,
    tensor_slots,
)
from taskloss.trees import lent, tensors_in


class Frozen(nn.Module):
    """Hold a network so that no parent module, trainer or optimiser can change it.

    The network is deep-copied, put in eval mode, stripped of ``requires_grad`` and kept out of the module
    registry: it is absent from ``parameters()`` and ``state_dict()`` and untouched by ``train()``, ``apply()`` and
    ``requires_grad_()``, yet it is moved by ``.to()``, ``.cuda()`` and ``.double()`` and survives ``deepcopy``,
    pickling and a parent's ``to_empty()``. Gradients flow through it to its input. Pass one ``Frozen`` to several
    terms to share one copy, and one pass a step (see :class:`LossSum`). Modules that the network keeps in plain lists,
    tuples or dicts are frozen and moved too.

    Args:
        network: Any ``nn.Module``. ``DataParallel`` and ``DistributedDataParallel`` wrappers are taken off.
        copy: Keep a deep copy (default). With ``False`` the caller's own network is frozen in place, which saves
            its memory; every call then checks that nobody has switched it back.
        checkpoint: Recompute activations in the backward pass instead of storing them: module by module where that
            lowers the peak, which one more forward pass finds out at the first call, and else the whole at once (as
            with ``copy=False`` and under ``torch.compile``).
        computes_loss: The network computes its own loss. It stays in eval mode where it does so there (all of
            Hugging Face transformers). :meth:`wake_` is for those that do it in training mode only (torchvision's
            detectors): modules that only hold others are put in training mode, while layers (normalisation, dropout,
            attention, whether or not they have children) stay in eval, so that batch statistics are neither used nor
            moved.
        lean: Keep for the backward pass only what the gradient at the input needs (default): no layer's input for
            gradients of weights, one byte for each value of a rectifier. Values and gradients stay as they are.
        fold: Faster, equal up to rounding: puts batch norm into the weights of the convolution before it, where that
            is its only reader (found by ``torch.fx``, or within ``nn.Sequential``), and lets 3-D convolutions of a
            single volume on a CPU take oneDNN's kernel where PyTorch takes a slower one. Gradients differ by
            rounding too, and jump where that takes a rectifier across zero. A folded convolution gives what its norm
            gave, and :meth:`digest` is that of the folded weights.

    Raises:
        TypeError: If ``network`` is not an ``nn.Module``.
        InputError: If the network cannot be copied, or has no values because it was built on the meta device.

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
        fold: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            if isinstance(network, type):
                raise TypeError(
                    f"frozen: expected an nn.Module, got the class {network.__name__} itself; "
                    f"make one of it: {network.__name__}(...)"
                )
            mend = "wrap the function in an nn.Module" if callable(network) else "give the network itself"
            raise TypeError(f"frozen: expected an nn.Module, got {type(network).__name__}; {mend}")
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        if isinstance(network, Frozen):
            network = network.network
        _check_has_values(network)
        if fold and not copy:
            raise InputError("frozen", "fold=True changes weights, which copy=False shares; drop one of the two")
        if copy:
            network = copy_of(network)
            _pieces.cut_(network, [])
        modules = modules_of(network)
        for _, module in modules:
            release_graphs(module)
        plain = plain_tensors_of(network)
        for parameter in (*(t for _, t in registered_tensors_of(network)), *plain.values()):
            parameter.requires_grad_(False)
            parameter.grad = None
        for _, module in modules:
            module.training = False
        self.n_folded: int | None = fold_(network) if fold else None  # batch norms that went into a convolution
        if fold:
            quicken_(network)
        # A list is invisible to nn.Module's registry; that is the whole trick.
        self._hidden = [network]
        registered = set(network.modules())
        self._unregistered = [(path, module) for path, module in modules if module not in registered]
        self._plain = set(plain)
        self._keepers: dict[bool, list[nn.Module]] = {}  # modules that keep what they compute: with a graph, without
        self._values: dict[str, Tensor] | None = None  # the weights, while the network is on the meta device
        self._shared = not copy
        self.checkpoint = checkpoint
        self.computes_loss = computes_loss
        self.label_name = label_name(network) if computes_loss else None
        self.is_awake: bool | None = None if computes_loss else False  # None: nobody has looked yet
        self.lean = lean
        self.made_lean: dict[str, int] = {}  # in the last run, how many calls of which functions
        self.n_pieces: int | None = None  # that checkpointing computes again; 0: the whole; None: nobody has looked yet
        self.kept_apart: set[str] = set()  # layers that nobody can look at while the network goes on
        if computes_loss and _is_detector(network):
            self.wake_(True)

    @property
    def network(self) -> nn.Module:
        """The frozen network itself, for reading."""
        return self._hidden[0]

    @property
    def n_quick(self) -> int:
        """How many 3-D convolutions may take a faster kernel (``fold=True``)."""
        return sum(isinstance(module, QuickConv3d) for module in self.network.modules())

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network; gradients reach its inputs and nothing else."""
        self._check_untouched()
        return self._run(self.network, *inputs, **named)

    def wake_(self, awake: bool) -> None:
        """Put the modules that only hold others in training mode, or all in eval; layers stay in eval."""
        for _, module in modules_of(self.network):
            module.training = awake and not is_layer(module)
        self.is_awake = awake

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """All in eval for a while."""
        before = self.is_awake
        if before:
            self.wake_(False)
        try:
            yield
        finally:
            if before:
                self.wake_(True)

    def features(self, x: Any, layers: Sequence[str]) -> dict[str, Any]:
        """The outputs of the named layers, at their first call; the network stops once it has them all.

        Args:
            x: Input of the network; a tuple is its positional arguments, a dict its keyword arguments.
            layers: Paths as ``network.named_modules()`` spells them; ``""`` is the network's own output.

        Shape:
            ``x`` as the network takes it; each output as its layer gives it.

        Raises:
            InputError: If a layer does not exist, is never reached, or is overwritten in place after it ran.
        """
        self._check_untouched()
        names = list(layers)
        outputs = self._run(lambda value: capture(self.network, value, names), x)
        return dict(zip(names, outputs, strict=True))

    def check_input(self, where: str, image: Tensor) -> None:
        """Refuse an input on another device or of another dtype than the network's weights.

        Shape:
            ``image`` of any shape.
        """
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
        """SHA-256 of every weight: equal digests prove that the network did not change.

        Parameters and buffers, those of modules in plain lists included, packed (quantised) weights, and the plain
        tensor attributes that were there when the network was frozen.
        """
        weights = self._values or dict(registered_tensors_of(self.network))
        plain = plain_tensors_of(self.network)
        return digest({**weights, **{name: plain[name] for name in plain if name in self._plain}})

    def stamp(self) -> tuple[object, ...]:
        """Equal while the weights are the same; those of a shared network are looked at, which costs a device sync."""
        weights = [t for _, t in registered_tensors_of(self.network)]
        if self._shared:
            weights += [t for name, t in plain_tensors_of(self.network).items() if name in self._plain]
        written = tuple((id(t), t.dtype, t.device, -1 if t.is_inference() else t._version) for t in weights)
        return (*written, *(checksums(weights) if self._shared else ()))

    def extra_repr(self) -> str:
        """The kind and size of what is inside."""
        count = sum(p.numel() for p in self.network.parameters())
        made = f" ({', '.join(f'{n} {name}' for name, n in self.made_lean.items())})" if self.made_lean else ""
        pieces = f" ({self.n_pieces} pieces)" if self.n_pieces else ""
        words = f"{type(self.network).__name__}, {count:,} parameters, checkpoint={self.checkpoint}{pieces}"
        quick = f", {self.n_quick} 3-D convolutions" if self.n_quick else ""
        folds = self.n_folded is not None or self.n_quick
        folded = f", fold=True ({self.n_folded or 0} batch norms{quick})" if folds else ""
        return f"{words}, lean={self.lean}{made}{folded}"

    def _run(self, function: Callable[..., Any], /, *inputs: Any, **named: Any) -> Any:
        if self.lean and _lean.is_possible():
            function = partial(self._run_lean, function)
        if self.checkpoint and torch.is_grad_enabled():
            return self._checkpointed(function, *inputs, **named)
        return self._once(function, *inputs, **named)

    def _checkpointed(self, function: Callable[..., Any], /, *inputs: Any, **named: Any) -> Any:
        images = [t for t in tensors_in([inputs, named]) if t.requires_grad]
        if images and not self._shared and _lean.is_possible():
            first = self.n_pieces is None
            if first:
                self._cut(inputs, named, images[0].device)
            if self.n_pieces:
                given, given_named = lent((inputs, named)) if first else (inputs, named)
                with _pieces.in_pieces(self.lean) as run:
                    outputs = self._once(function, *given, **given_named)
                spoilt = run.overwritten()
                if not (first and spoilt):
                    return outputs
                del outputs
                _pieces.cut_(self.network, [])  # what would be computed again is no longer what it was
                self.n_pieces = 0
        from torch.utils.checkpoint import checkpoint  # it brings sympy along

        return checkpoint(partial(self._once, function, **named), *inputs, use_reentrant=False)

    def _cut(self, inputs: tuple[Any, ...], named: dict[str, Any], device: torch.device) -> None:
        """Find the pieces that checkpointing computes again one by one."""
        positional, more = lent(arguments(inputs[0], named) if len(inputs) == 1 else (inputs, named))
        network = partial(self._run_lean, self.network) if self.lean else self.network
        modules = _pieces.find(self.network, partial(self._once, network, *positional, **more), device)
        if self._keepers.get(True):  # what it keeps would be kept again by each piece, after the run
            modules = []
        _pieces.cut_(self.network, modules)
        self.n_pieces = len(modules)

    def _run_lean(self, function: Callable[..., Any], /, *inputs: Any, **named: Any) -> Any:
        with _lean.Lean() as mode:
            outputs = function(*inputs, **named)
        self.made_lean = dict(mode.made)
        return outputs

    def _once(self, function: Callable[..., Any], /, *inputs: Any, **named: Any) -> Any:
        """Run, and put back what the network keeps of the run in plain attributes, if it is one that does."""
        if torch.compiler.is_compiling():
            return function(*inputs, **named)
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in([inputs, named]))
        suspects = self._keepers.get(graph)
        if suspects is None:
            suspects = [module for _, module in modules_of(self.network)]
        before = [(module, tensor_slots(module)) for module in suspects]
        try:
            return function(*inputs, **named)
        finally:
            changed = [module for module, slots in before if put_back(module, slots)]
            self._keepers.setdefault(graph, changed)

    def _check_untouched(self) -> None:
        if not self._shared or torch.compiler.is_compiling():
            return
        for name, module in (*self.network.named_modules(), *self._unregistered):
            if module.training and not (self.is_awake and not is_layer(module)):
                raise InputError(
                    "frozen",
                    f"the shared network's {name or 'root'!r} was switched to training mode; "
                    "call network.eval(), or let Frozen keep its own copy (copy=True)",
                )
            for inner, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    where = f"{name}.{inner}" if name else inner
                    raise InputError(
                        "frozen",
                        f"the shared network's {where!r} requires a gradient again; "
                        "call network.requires_grad_(False), or let Frozen keep its own copy (copy=True)",
                    )

    def _apply(self, fn: Any, recurse: bool = True) -> Frozen:
        # Modules move and cast through _apply: the hidden network has to be handed on.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse:
            values = self._values
            if values is None and not keeps_values(fn):  # to_empty(), or to("meta")
                values = snapshot(self.network)
            self.network._apply(fn)  # type: ignore[no-untyped-call]
            for _, module in self._unregistered:
                module._apply(fn, recurse=False)  # type: ignore[no-untyped-call]
            self._values = None if values is None or restore_(self.network, values) else values
        return self

    def __getstate__(self) -> dict[str, Any]:
        for _, module in modules_of(self.network):
            release_graphs(module)  # a graph can be neither copied nor saved
        return dict(self.__dict__)


def freeze(
    network: nn.Module,
    *,
    copy: bool = True,
    checkpoint: bool = False,
    computes_loss: bool = False,
    lean: bool = True,
    fold: bool = False,
) -> Frozen:
    """Freeze a network, or share one that is frozen already."""
    if isinstance(network, Frozen):
        folds = fold and network.n_folded is None
        if not (checkpoint or computes_loss or folds or (network.lean and not lean)):
            return network
    return Frozen(network, copy=copy, checkpoint=checkpoint, computes_loss=computes_loss, lean=lean, fold=fold)


def hold(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Freeze a callable that is a module (so that it moves with its parent); leave a plain function as it is."""
    return freeze(function) if isinstance(function, nn.Module) else function


def _check_has_values(network: nn.Module) -> None:
    for name, tensor in registered_tensors_of(network):
        if tensor.is_meta or is_lazy(tensor):
            raise InputError(
                "frozen",
                f"{name!r} of the network has no values (it was built on the meta device, or is lazy); "
                "build it outside of torch.device('meta') and load its weights first",
            )


def _is_detector(network: nn.Module) -> bool:
    """Whether a network is one of torchvision's detectors, or holds one: they give their loss in training mode only."""
    kinds = {kind for module in network.modules() for kind in type(module).__mro__}
    heads = ("GeneralizedRCNN", "RetinaNet", "FCOS", "SSD")
    return any(k.__name__ in heads and k.__module__.startswith("torchvision.models.detection") for k in kinds)


def is_layer(module: nn.Module) -> bool:
    """Whether a module computes something of its own, rather than only holding others together.

    Having children says little: attention has a child, yet its dropout is its own; a batch norm may own an activation.
    """
    if next(module.children(), None) is None:
        return True
    kinds = {kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules.")}
    if kinds - {nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict}:
        return True
    statistics = any(name.startswith("running_") or name == "num_batches_tracked" for name in module._buffers)
    return statistics or re.search(r"Norm(?![a-z])|Drop(out|Path|Block)|Stochastic", type(module).__name__) is not None
