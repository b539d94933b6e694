"""What would go wrong if this network were used as a task network, found by running a copy of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.arguments import arguments
from taskloss.checks import check_image
from taskloss.frozen import Frozen
from taskloss.reach import reaches
from taskloss.trees import map_tensors

Record = dict[str, tuple[list[Tensor], list[Tensor]]]  # a module's inputs and outputs, by its path


@dataclass(frozen=True)
class Finding:
    """One thing that makes a network a bad guide.

    Attributes:
        kind: ``random``, ``batch_statistics``, ``moving_state``, ``blocked_gradient``, ``zero_gradient``,
            ``in_place``, ``output_type``, ``nan_gradient`` or ``input_range``.
        module: Path of the module, as ``named_modules()`` spells it; the class name for the network itself.
        message: One sentence: what happens, and the mend.
    """

    kind: str
    module: str
    message: str

    def __str__(self) -> str:
        return f"{self.module}: {self.message}"


def audit_task_model(
    task_model: nn.Module,
    example: Tensor,
    *,
    output: Callable[[Any], Any] | None = None,
) -> tuple[Finding, ...]:
    """Look for what would spoil a task loss: each finding names the module; a clean network gives none.

    The network is copied and frozen as a task loss would freeze it, and run a few times on ``example`` and on
    constant images. The caller's network, tensor and random state are left as they were.

    Args:
        task_model: The network T.
        example: A batch in T's own range and units (after ``preprocess``); real images find more than noise.
        output: Picks the prediction out of what T returns, as in :class:`TaskOrientedLoss`.

    Shape:
        example ``(N, C, *spatial)``; N = 1 is enough.

    Returns:
        Findings for: randomness or batch statistics active in eval mode, buffers that move, a blocked or zero
        gradient, an input changed in place, an output that is no tensor, a NaN gradient on a constant image, and
        an input far from what the first batch norm saw in training (probably the wrong range).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> audit_task_model(net, torch.rand(2, 1, 8, 8))
        ()
    """
    check_image("audit_task_model", example)
    network = Frozen(task_model).network
    output = output or (lambda prediction: prediction)
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return tuple(_findings(network, example.detach(), output))


def who_blocks(
    x_hat: Tensor, preprocess: Callable[[Any], Any] | None, network: nn.Module | None = None, *own: Any, **more: Any
) -> str | None:
    """The part of a term that stops the gradient on its way to x_hat, or None if it comes after the network.

    It never fails itself: what goes wrong while it looks is no news to the caller.
    """
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), torch.enable_grad():
        image = x_hat.detach().clone().requires_grad_()
        seen = image.clone() if preprocess is None else preprocess(image)
        if not any(reaches(t, image) for t in _tensors(seen)):
            return "preprocess"
        if network is not None:
            positional, named = arguments(seen, more)
            name = find_blocker(network, *positional, *own, **named)
            return None if name is None else repr(name)
    return None


def find_blocker(network: nn.Module, *inputs: Any, **named: Any) -> str | None:
    """The innermost module that takes a gradient in and gives none out; None if there is none."""
    suspects: list[str] = []
    image = next(t for t in _tensors([inputs, named]) if t.is_floating_point()).detach().clone().requires_grad_()

    def after(name: str, module: nn.Module, inputs: Any, result: Any) -> None:
        takes = any(reaches(t, image) for t in _tensors(inputs))
        gives = any(reaches(t, image) for t in _tensors(result))
        inner = any(s.startswith(f"{name}.") or name == "" for s in suspects)
        if takes and not gives and not inner:
            suspects.append(name)

    first = [image.clone()]
    inputs, named = map_tensors((inputs, named), lambda t: first.pop() if first and t.is_floating_point() else t)
    with _watching(network, after=after), torch.enable_grad():
        result = network(*inputs, **named)
    after("", network, inputs, result)  # once more, for a network that takes no hooks
    return _spell(network, suspects[0]) if suspects else None


def _findings(network: nn.Module, example: Tensor, output: Callable[[Any], Any]) -> Iterator[Finding]:
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    yield from _input_range(network, example)
    yield from _in_place(network, example)
    yield from _randomness(network, example)
    yield from _batch_statistics(network, example)
    for name, buffer in network.named_buffers():
        if not torch.equal(before[name], buffer) and not torch.isnan(buffer).any():
            owner = _spell(network, name.rpartition(".")[0])
            yield Finding(
                "moving_state",
                owner,
                f"its buffer {name.rpartition('.')[2]!r} moves in eval mode, so T would not stay the same",
            )
    prediction = output(network(example.clone()))
    if not isinstance(prediction, Tensor):
        kind = type(prediction).__name__
        yield Finding(
            "output_type",
            type(network).__name__,
            f"it returns a {kind}, not a tensor; pick one with output=lambda prediction: ...",
        )
        return
    yield from _gradients(network, example, output)


def _input_range(network: nn.Module, example: Tensor) -> Iterator[Finding]:
    """The first trained batch norm knows what its input looked like; compare."""
    found: list[Finding] = []

    def before(name: str, module: nn.Module, inputs: Any) -> None:
        if found or not isinstance(module, nn.modules.batchnorm._BatchNorm) or not seen:
            return
        seen.clear()
        counted, mean, var = module.num_batches_tracked, module.running_mean, module.running_var
        if mean is None or var is None or counted is None or int(counted) == 0:
            return
        x = inputs[0].detach().transpose(0, 1).flatten(1)
        shift = (x.mean(1) - mean).abs() / (var + module.eps).sqrt()
        growth = x.var(1) / (var + module.eps)
        if float(shift.median()) > 10 or not 1e-3 < float(growth.median()) < 1e3:
            found.append(
                Finding(
                    "input_range",
                    name,
                    f"its input is far from what it saw in training (mean shifted by {float(shift.median()):.0f} "
                    f"standard deviations, variance times {float(growth.median()):.2g}); "
                    "is the example in the range that T was trained on?",
                )
            )

    seen = {"first"}
    with _watching(network, before=before), torch.no_grad():
        network(example.clone())
    yield from found


def _in_place(network: nn.Module, example: Tensor) -> Iterator[Finding]:
    image = example.clone()
    versions: dict[str, int] = {}
    culprits: list[str] = []

    def before(name: str, module: nn.Module, inputs: Any) -> None:
        versions[name] = image._version

    def after(name: str, module: nn.Module, inputs: Any, result: Any) -> None:
        if image._version != versions[name] and not culprits:
            culprits.append(_spell(network, name))

    with _watching(network, before=before, after=after), torch.no_grad():
        network(image)
    if culprits:
        yield Finding("in_place", culprits[0], "it changes its input in place; pass a clone, or set inplace=False")


def _randomness(network: nn.Module, example: Tensor) -> Iterator[Finding]:
    first = _outputs_by_module(network, example, seed=0)
    second = _outputs_by_module(network, example, seed=1)
    for name in _innermost(_changed(first, second, rows=slice(None), tolerance=1e-5)):
        yield Finding(
            "random",
            _spell(network, name),
            "its output changes from call to call in eval mode; call dropout with training=self.training",
        )


def _batch_statistics(network: nn.Module, example: Tensor) -> Iterator[Finding]:
    # The first sample keeps its value; its companion changes. Nothing of it may show in the first sample's output.
    one = example[:1]
    spread = one.amax() - one.amin() + 1
    alike = _outputs_by_module(network, torch.cat([one, one]), seed=0)
    other = _outputs_by_module(network, torch.cat([one, 2 * one.flip(-1) + spread]), seed=0)
    for name in _innermost(_changed(alike, other, rows=slice(0, 1), tolerance=1e-4)):
        yield Finding(
            "batch_statistics",
            _spell(network, name),
            "one sample's output depends on the others in eval mode; make it use running statistics",
        )


def _gradients(network: nn.Module, example: Tensor, output: Callable[[Any], Any]) -> Iterator[Finding]:
    image = example.clone().requires_grad_()
    prediction = output(network(image.clone()))
    root = type(network).__name__
    if not prediction.requires_grad:
        blocker = find_blocker(network, example) or "output"
        yield Finding("blocked_gradient", blocker, "no gradient passes it (argmax, detach or no_grad inside?)")
        return
    direction = torch.linspace(-1, 1, prediction.numel(), dtype=prediction.dtype, device=prediction.device)
    (gradient,) = torch.autograd.grad(
        (prediction.flatten() * direction).sum(), image, allow_unused=True, materialize_grads=True
    )
    if not gradient.any():
        yield Finding("zero_gradient", root, "the gradient at its input is zero everywhere (rounding inside?)")
    for constant in (torch.zeros_like(example), torch.full_like(example, float(example.mean()))):
        if (name := _nan_source(network, constant, output)) is not None:
            yield Finding(
                "nan_gradient",
                name,
                "its gradient is NaN on a constant image (a square root or norm of zero?); add a small epsilon",
            )
            return


def _nan_source(network: nn.Module, constant: Tensor, output: Callable[[Any], Any]) -> str | None:
    image = constant.clone().requires_grad_()
    ran: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def after(name: str, module: nn.Module, inputs: Any, result: Any) -> None:
        tensors = (
            [t for t in _tensors(inputs) if t.requires_grad],
            [t for t in _tensors(result) if t.requires_grad],
        )
        ran.append((name, *tensors))

    with _watching(network, after=after):
        total = output(network(image.clone())).square().sum()
    (gradient,) = torch.autograd.grad(total, image, retain_graph=True, materialize_grads=True)
    if torch.isfinite(gradient).all():
        return None
    suspects = []
    for name, inputs, results in ran:
        into, out = (
            [g for g in torch.autograd.grad(total, side, retain_graph=True, allow_unused=True) if g is not None]
            if side
            else []
            for side in (inputs, results)
        )
        healthy = all(torch.isfinite(g).all() for g in out)
        if healthy and not all(torch.isfinite(g).all() for g in into):
            suspects.append(name)
    innermost = list(_innermost(suspects))
    return _spell(network, innermost[-1] if innermost else "")


def _outputs_by_module(network: nn.Module, image: Tensor, seed: int) -> Record:
    taken: dict[str, list[Tensor]] = {}
    given: dict[str, list[Tensor]] = {}

    def before(name: str, module: nn.Module, inputs: Any) -> None:
        taken.setdefault(name, [t.clone() for t in _tensors(inputs)])

    def after(name: str, module: nn.Module, inputs: Any, result: Any) -> None:
        given.setdefault(name, [t.clone() for t in _tensors(result)])

    torch.manual_seed(seed)
    with _watching(network, before=before, after=after), torch.no_grad():
        network(image.clone())
    return {name: (taken[name], given[name]) for name in given}


def _changed(
    first: Record,
    second: Record,
    *,
    rows: slice,
    tolerance: float,
) -> list[str]:
    """Modules whose inputs agree between two runs while their outputs do not."""

    def agree(a: list[Tensor], b: list[Tensor]) -> bool:
        return len(a) == len(b) and all(_close(s[rows], t[rows], tolerance) for s, t in zip(a, b, strict=True))

    both = [name for name in first if name in second]
    return [n for n in both if agree(first[n][0], second[n][0]) and not agree(first[n][1], second[n][1])]


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(b.detach().abs().max()) if b.numel() else 0.0
    return torch.allclose(a.float(), b.float(), rtol=0.0, atol=tolerance * max(scale, 1e-12), equal_nan=True)


def _innermost(names: list[str]) -> Iterator[str]:
    """Names that contain no other name of the list."""
    for name in names:
        prefix = f"{name}." if name else ""
        if not any(other != name and other.startswith(prefix) for other in names):
            yield name


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _spell(network: nn.Module, name: str) -> str:
    return name or type(network).__name__


@contextlib.contextmanager
def _watching(
    network: nn.Module,
    *,
    before: Callable[[str, nn.Module, Any], None] | None = None,
    after: Callable[[str, nn.Module, Any, Any], None] | None = None,
) -> Iterator[None]:
    """Call ``before`` and ``after`` around every module's forward pass, innermost first."""
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # it takes no hooks
        if before is not None:
            handles.append(module.register_forward_pre_hook(lambda m, inputs, name=name: before(name, m, inputs)))
        if after is not None:
            handles.append(
                module.register_forward_hook(lambda m, inputs, result, name=name: after(name, m, inputs, result))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
