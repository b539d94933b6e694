"""What would go wrong if this network were used as a task network, found by running a copy of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.blame import find_blocker
from taskloss.checks import InputError
from taskloss.frozen import Frozen, is_layer
from taskloss.holdings import modules_of
from taskloss.reach import reaches
from taskloss.samples import all_close, first_sample_agrees, first_twice
from taskloss.trees import lent, tensors_in
from taskloss.watching import Record, call, close, image_in, innermost, record, spell, watched, with_image


@dataclass(frozen=True)
class Finding:
    """One thing that makes a network a bad guide.

    Attributes:
        kind: ``inputs``, ``random``, ``batch_statistics``, ``moving_state``, ``blocked_gradient``, ``zero_gradient``,
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
    example: Any,
    *,
    output: Callable[[Any], Any] | None = None,
) -> tuple[Finding, ...]:
    """Look for what would spoil a task loss: each finding names the module; a clean network gives none.

    The network is copied and frozen as a task loss would freeze it, and run a few times on ``example`` and on
    constant images. The caller's network, tensors and random state are left as they were. The ``task_model`` of a
    :class:`TaskOrientedLoss` without a criterion is looked at in training mode too, where it may have to run.

    Args:
        task_model: The network T, frozen already or not.
        example: A batch in T's own range and units, as ``preprocess`` gives it; real images find more than noise. A
            network with more inputs takes a tuple of them or a dict by name; one that computes its own loss, a tuple
            with the label.
        output: Picks the prediction out of what T returns, as in :class:`TaskOrientedLoss`.

    Shape:
        example ``(N, C, *spatial)``, or whatever T takes; N = 1 is enough.

    Returns:
        Findings for: inputs that the example lacks, randomness or batch statistics active in eval mode, buffers that
        move, a blocked or zero gradient, an input changed in place, an output that is no tensor, a NaN gradient on a
        constant image, and an input far from what the first batch norm saw in training (probably the wrong range).

    Raises:
        InputError: If the example holds no floating-point image, or the network does not run on it.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> audit_task_model(net, torch.rand(2, 1, 8, 8))
        ()
    """
    image = image_in(example)
    if image is None or image.dim() == 0:
        raise InputError("audit_task_model", "example must hold a floating-point batch (N, C, *spatial), got none")
    computes_loss = isinstance(task_model, Frozen) and task_model.computes_loss
    network = Frozen(task_model).network
    network = getattr(network, "_orig_mod", network)  # as it was before torch.compile
    lacking = _lacking(network, example)
    if lacking is not None:
        return (lacking,)
    example = with_image(example, image.detach().clone())
    with torch.random.fork_rng(devices=[image.device] if image.device.type == "cuda" else []), torch.enable_grad():
        try:
            with torch.no_grad():
                call(network, lent(example))
        except Exception as error:
            if not computes_loss:
                raise InputError(
                    "audit_task_model",
                    f"the network does not run on the example ({type(error).__name__}: {_first_line(error)})",
                ) from error
        else:
            found = list(_findings(network, example, output or (lambda prediction: prediction)))
            return (*found, *(_awake(network, example, found) if computes_loss else ()))
        return tuple(_awake(network, example, []))


def _lacking(network: nn.Module, example: Any) -> Finding | None:
    if isinstance(network, torch.jit.ScriptModule):
        return None  # it has no signature to read
    try:
        signature = inspect.signature(network.forward)
        signature.bind(**example) if isinstance(example, Mapping) else signature.bind(
            *(example if type(example) is tuple else (example,))
        )
    except ValueError:
        return None
    except TypeError as error:
        return Finding(
            "inputs",
            spell(network, ""),
            f"it cannot be called with this example ({error}); give everything that it takes, as "
            "audit_task_model(network, (image, ...)) or as a dict by name",
        )
    return None


def _findings(network: nn.Module, example: Any, output: Callable[[Any], Any]) -> Iterator[Finding]:
    before = {name: buffer.clone() for name, buffer in _buffers(network)}
    yield from _input_range(network, example)
    yield from _in_place(network, example)
    yield from _randomness(network, example)
    with contextlib.suppress(Exception):  # a network for batches of one size only
        yield from _batch_statistics(network, example)
    for name, buffer in _buffers(network):
        if not close(before[name], buffer, 0.0):
            yield Finding(
                "moving_state",
                spell(network, name.rpartition(".")[0]),
                f"its buffer {name.rpartition('.')[2]!r} moves in eval mode, so T would not stay the same",
            )
    prediction = output(call(network, lent(example)))
    if not isinstance(prediction, Tensor):
        yield Finding(
            "output_type",
            spell(network, ""),
            f"it returns a {type(prediction).__name__}, not a tensor; pick one with output=lambda prediction: ...",
        )
        if not any(t.is_floating_point() for t in tensors_in(prediction)):
            return
    yield from _gradients(network, example, output)


def _awake(network: nn.Module, example: Any, found: list[Finding]) -> Iterator[Finding]:
    """Randomness in training mode, where a network that computes its own loss may have to run."""
    for _, module in modules_of(network):
        module.training = not is_layer(module)
    known = {(finding.kind, finding.module) for finding in found}
    with contextlib.suppress(Exception):  # without a label some do not run at all
        for finding in _randomness(network, example):
            if (finding.kind, finding.module) not in known:
                yield Finding(
                    finding.kind,
                    finding.module,
                    "its output changes from call to call in training mode, which a network that computes its own loss "
                    "may need (a dropout called as a function?); set its probability to 0",
                )


def _input_range(network: nn.Module, example: Any) -> Iterator[Finding]:
    """The first trained batch norm knows what its input looked like; compare."""
    found: list[Finding] = []

    def before(name: str, module: nn.Module, inputs: Any) -> None:
        if found or not isinstance(module, nn.modules.batchnorm._BatchNorm) or not seen:
            return
        seen.clear()
        counted, mean, var = module.num_batches_tracked, module.running_mean, module.running_var
        if mean is None or var is None or counted is None or int(counted) == 0:
            return
        x = next(tensors_in(inputs)).detach().transpose(0, 1).flatten(1)
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
    with torch.no_grad():
        watched(network, lent(example), before=before)
    yield from found


def _in_place(network: nn.Module, example: Any) -> Iterator[Finding]:
    inputs = lent(example)
    image = image_in(inputs)
    assert image is not None  # audit_task_model has looked
    versions: dict[str, int] = {}
    culprits: list[str] = []

    def before(name: str, _module: nn.Module, _inputs: Any) -> None:
        versions[name] = image._version

    def after(name: str, _module: nn.Module, _inputs: Any, _result: Any) -> None:
        if image._version != versions[name] and not culprits:
            culprits.append(spell(network, name))

    with torch.no_grad():
        watched(network, inputs, before=before, after=after)
    if culprits:
        yield Finding("in_place", culprits[0], "it changes its input in place; pass a clone, or set inplace=False")


def _randomness(network: nn.Module, example: Any) -> Iterator[Finding]:
    first = record(network, example, seed=0)
    second = record(network, example, seed=1)

    def agree(a: Any, b: Any) -> bool:
        return all_close(a, b, 1e-5)

    for name in _changed(first, second, agree):
        yield Finding(
            "random",
            spell(network, name),
            "its output changes from call to call in eval mode; call dropout with training=self.training",
        )


def _batch_statistics(network: nn.Module, example: Any) -> Iterator[Finding]:
    # The first sample keeps its value; its companion changes. Nothing of it may show in the first sample's output.
    twice = first_twice(example)
    image = image_in(twice)
    assert image is not None  # audit_task_model has looked
    one = image[:1]
    spread = one.amax() - one.amin() + 1
    companion = 2 * (one.flip(-1) if one.dim() > 1 else one) + spread
    alike = record(network, twice, seed=0)
    other = record(network, with_image(twice, torch.cat([one, companion])), seed=0)
    for name in _changed(alike, other, first_sample_agrees):
        yield Finding(
            "batch_statistics",
            spell(network, name),
            "one sample's output depends on the others in eval mode; make it use running statistics",
        )


def _changed(first: Record, second: Record, agree: Callable[[Any, Any], bool]) -> list[str]:
    """The innermost modules whose inputs agree between two runs while their outputs do not, if it shows at the end."""
    if agree(first[""][1], second[""][1]):
        return []
    both = [name for name in first if name in second and (name == "" or any(True for _ in tensors_in(first[name][0])))]
    return list(
        innermost([n for n in both if agree(first[n][0], second[n][0]) and not agree(first[n][1], second[n][1])])
    ) or [""]


def _gradients(network: nn.Module, example: Any, output: Callable[[Any], Any]) -> Iterator[Finding]:
    given = image_in(example)
    assert given is not None  # audit_task_model has looked
    image = given.clone().requires_grad_()
    reached = [t for t in tensors_in(output(call(network, with_image(example, image.clone())))) if reaches(t, image)]
    if not reached:
        blocker = find_blocker(network, example) or "output"
        yield Finding("blocked_gradient", blocker, "no gradient passes it (argmax, detach or no_grad inside?)")
        return
    total = torch.stack(
        [(t.flatten() * torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device)).sum() for t in reached]
    ).sum()
    (gradient,) = torch.autograd.grad(total, image, allow_unused=True, materialize_grads=True)
    if not gradient.any():
        root = spell(network, "")
        yield Finding("zero_gradient", root, "the gradient at its input is zero everywhere (rounding inside?)")
    for constant in (torch.zeros_like(given), torch.full_like(given, float(given.mean()))):
        if (name := _nan_source(network, with_image(example, constant), output)) is not None:
            yield Finding(
                "nan_gradient",
                name,
                "its gradient is NaN on a constant image (a square root or norm of zero?); add a small epsilon",
            )
            return


def _nan_source(network: nn.Module, constant: Any, output: Callable[[Any], Any]) -> str | None:
    given = image_in(constant)
    assert given is not None  # audit_task_model has looked
    image = given.clone().requires_grad_()
    ran: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def after(name: str, _module: nn.Module, inputs: Any, result: Any) -> None:
        sides = ([t for t in tensors_in(side) if t.requires_grad] for side in (inputs, result))
        ran.append((name, *sides))  # type: ignore[arg-type]

    prediction = output(watched(network, with_image(constant, image.clone()), after=after))
    squares = [t.square().sum() for t in tensors_in(prediction) if reaches(t, image)]
    if not squares:
        return None
    total = torch.stack(squares).sum()
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
    names = list(innermost(suspects))
    return spell(network, names[-1] if names else "")


def _buffers(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in modules_of(network):
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{path}.{name}" if path else name, buffer


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
