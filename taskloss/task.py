"""The term the library exists for: what a frozen task network says about the restored image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from taskloss import sharing
from taskloss.algebra import Term
from taskloss.arguments import arguments, images_in, split
from taskloss.blame import who_blocks
from taskloss.checks import InputError, check_callable, check_function, check_image
from taskloss.diagnosis import refusal_of_prediction, told
from taskloss.frozen import Frozen, freeze, hold
from taskloss.labels import Labels, select
from taskloss.looks import Shared, look_of, shared
from taskloss.precision import full_precision, no_autocast
from taskloss.preprocess import only_reads, prepare
from taskloss.ranges import RangeCheck
from taskloss.reach import ReachCheck
from taskloss.sharing import Look
from taskloss.trees import lent
from taskloss.values import to_scalar, zero_loss


class TaskOrientedLoss(Term):
    r"""The task's own loss on the restored image, seen through a frozen task network.

    .. math:: L_t(\hat x) = \mathrm{criterion}(T(\hat x), \mathrm{label})

    T is frozen for good (see :class:`Frozen`); the gradient flows through it to x_hat. The criterion runs in
    float32 under autocast.

    Samples without a label are left out before T runs, and the criterion averages over the others: give the label
    as a list with one entry per sample and None where there is none, or name with ``missing`` the value that fills
    such a label. A batch without any label gives a zero that still back-propagates. Labels of several kinds come as
    a dict or tuple of tensors or lists; a sample then needs all of them or none. Entries of a list that lie on the
    image, or are numbers, are stacked to a tensor; sequences, boxes and dicts reach the criterion as a list.

    Args:
        task_model: The network T, or several of them: their losses are averaged, or take turns.
        task_criterion: ``criterion(prediction, label)``, a scalar or one value per sample. None if the network
            computes its own loss: it gets the label by the name ``labels``, ``label``, ``targets`` or ``target`` if
            it has such a parameter, and as its last argument otherwise. It stays in eval mode, unless its first call
            shows that it gives no loss there, as torchvision's detectors: then its containers run in training mode,
            its normalisation and dropout layers stay in eval (a dropout called as a function inside a container does
            not: look for it with :func:`audit_task_model`).
        preprocess: Differentiable map from the restorer's units to T's (HU window, scale, channels, size). A tuple
            that it returns is T's positional arguments, a dict its keyword arguments. A module augments as it came
            while the loss is in training mode, and rests in eval mode.
        output: Picks the prediction out of what T returns (dict, tuple, deep supervision).
        inputs: Names of what T takes beside the image and is different for each sample (a prompt, a timestep,
            metadata). The label then is a dict that holds them too; T gets them by keyword, and the criterion gets
            what is left: one entry as it is, several as a dict.
        copy: Keep a deep copy of T (default); False freezes the caller's own network in place.
        checkpoint: Recompute T's activations in the backward pass instead of storing them.
        lean: Keep only what the gradient at x_hat needs (default; see :class:`Frozen`).
        fold: Faster, equal up to rounding: batch norm in the convolution before it, and a faster 3-D convolution on
            a CPU (see :class:`Frozen`).
        ensemble: With several networks, ``"mean"`` or ``"turns"`` (one per training call, not in eval mode or under
            ``no_grad``; the turn is in ``state_dict``).
        missing: A sample whose label is filled with this value alone has no label, in tensors, lists, tuples and
            dicts alike. Costs a device sync per call.
        expects: Range of T's input, for instance ``(0, 1)``; checked after ``preprocess``, until an image has shown it.
        generator: Seeds a random ``preprocess`` at each call, so that it can be repeated; None leaves it to the global
            random states.

    Shape:
        x_hat ``(N, C, *spatial)`` with one to three spatial axes; label as the criterion wants it, first axis N.

    Returns:
        A scalar.

    Raises:
        InputError: For a missing label, another device or dtype than T's, an input out of ``expects``, or a T
            through which no gradient reaches x_hat (the blocking module is named).

    Example:
        >>> segmenter = nn.Conv2d(1, 3, 3, padding=1)
        >>> task = TaskOrientedLoss(segmenter, nn.CrossEntropyLoss())
        >>> x_hat = torch.zeros(2, 1, 8, 8, requires_grad=True)
        >>> task(x_hat, torch.ones(2, 8, 8, dtype=torch.long)).backward()
        >>> x_hat.grad.shape, segmenter.weight.grad
        (torch.Size([2, 1, 8, 8]), None)

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Eq. 3 and 4.
    """

    reads = "label"

    def __init__(
        self,
        task_model: nn.Module | Sequence[nn.Module],
        task_criterion: Callable[..., Any] | None,
        *,
        preprocess: Callable[[Tensor], Any] | None = None,
        output: Callable[[Any], Any] | None = None,
        inputs: Sequence[str] = (),
        copy: bool = True,
        checkpoint: bool = False,
        lean: bool = True,
        fold: bool = False,
        ensemble: Literal["mean", "turns"] = "mean",
        missing: float | None = None,
        expects: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        models = _networks(task_model)
        if not models:
            raise ValueError("task_oriented_loss: task_model is empty; give at least one network")
        if ensemble not in ("mean", "turns"):
            raise ValueError(f"task_oriented_loss: ensemble must be 'mean' or 'turns', got {ensemble!r}")
        if task_criterion is not None:
            check_callable(
                self.where, task_criterion, "task_criterion must be callable as criterion(prediction, label)"
            )
        computes_loss = task_criterion is None
        self.task_models = nn.ModuleList(
            freeze(model, copy=copy, checkpoint=checkpoint, computes_loss=computes_loss, lean=lean, fold=fold)
            for model in models
        )
        self.task_criterion = hold(task_criterion)
        self.preprocess = prepare(self.where, preprocess, generator)
        self._reach = ReachCheck()
        if output is not None:
            check_function(self.where, output, "output must be callable as output(what the network returns)")
        self.output = hold(output)
        self.turns = Turns(len(models)) if ensemble == "turns" else None
        self.missing = missing
        self.inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        self.check_range = RangeCheck(self.where, expects)

    @property
    def task_model(self) -> Frozen:
        """The (first) frozen task network."""
        return self._models()[0]

    def forward(self, x_hat: Tensor, label: Any) -> Tensor:
        """The task's loss of ``x_hat`` against ``label``; see the class.

        Shape:
            x_hat ``(N, C, *spatial)``, the label as the criterion takes it; a scalar comes back.
        """
        check_image(self.where, x_hat)
        if label is None:
            raise InputError(self.where, "needs a label, but label is None; call loss(x_hat, label=...)")
        label, more = split(self.where, label, self.inputs)
        labels = Labels(self.where, label, x_hat, self.missing)
        if labels.kept is not None and not torch.compiler.is_compiling():
            sharing.leave(self._looks())  # other terms see the whole batch
        x_hat = select(x_hat, labels.kept, labels.n)
        if x_hat.shape[0] == 0:
            return zero_loss(x_hat)
        more = labels.beside(more)
        models = self._models()
        if self.turns is not None:
            models = [models[self.turns.next(self.training and torch.is_grad_enabled())]]
        losses = [self._loss(model, x_hat, labels, more) for model in models]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def predict(self, x: Tensor, inputs: Mapping[str, Any] | None = None) -> Any:
        """What the (first) task network makes of an image, through ``preprocess`` and ``output``; no graph.

        A network that computes its own loss is asked without a label and in eval mode, and what it returns comes as
        it is: a detector's boxes, for instance, which ``output`` would take for losses.

        Args:
            x: A batch of images.
            inputs: What T takes beside them, by name.

        Shape:
            x ``(N, C, *spatial)``; the prediction as the network gives it.

        Raises:
            InputError: If a network that computes its own loss gives nothing without a label.
        """
        model = self.task_model
        with torch.no_grad():
            image = self._checked(model, lent(x) if self.preprocess is None else self.preprocess(x))
            positional, named = arguments(image, inputs)
            if self.task_criterion is not None:
                prediction = model(*positional, **named)
                return prediction if self.output is None else self.output(prediction)
            with model.asleep():
                try:
                    return model(*positional, **named)
                except TypeError as error:
                    if "argument" not in str(error):
                        raise
                    raise InputError(
                        self.where, f"T cannot predict without a label: {error}; give its forward a default for it"
                    ) from error

    def _looks(self) -> Iterable[Look | None]:
        if self.task_criterion is None or self.inputs:  # the label goes through the network too
            return []
        models = self._models() if self.turns is None else [self._models()[self.turns.turn]]
        return [look_of(model, self.preprocess, ("",)) for model in models]

    def _models(self) -> list[Frozen]:
        return [model for model in self.task_models if isinstance(model, Frozen)]

    def _checked(self, model: Frozen, image: Any) -> Any:
        """An image in T's units, which T can take."""
        if not torch.compiler.is_compiling():
            tensors = images_in(image)
            for tensor in tensors:
                model.check_input(self.where, tensor)
            if not self.check_range.settled:
                self.check_range(self.where, *tensors)
        return image

    def _loss(self, model: Frozen, x_hat: Tensor, labels: Labels, more: Mapping[str, Any]) -> Tensor:
        # What preprocess made for the whole batch (a prompt per sample) is cut to the samples that have a label.
        look = None
        if labels.kept is None and self.task_criterion is not None and not self.inputs:
            look = shared(model, self.preprocess, x_hat, ("",))
        image = look.image if look else lent(x_hat) if self.preprocess is None else self.preprocess(x_hat)
        image = select(self._checked(model, image), labels.kept, labels.n)
        own: tuple[Any, ...] = ()
        if self.task_criterion is None:
            label = lent(labels.of_the_kept())
            own, more = ((label,), more) if model.label_name is None else ((), {**more, model.label_name: label})
        positional, named = arguments(image, more)
        if self.task_criterion is None:
            value = self._own_loss(model, (*positional, *own), named, x_hat)
        else:
            run = partial(model, *positional, **named) if look is None else partial(self._shared_output, look)
            prediction = told(self.where, model.network, image, run)
            prediction = prediction if self.output is None else self.output(prediction)
            value = self._compared(model, image, prediction, labels)
        with no_autocast(x_hat.device):
            value = to_scalar(self.where, full_precision(value), x_hat.shape[0])

        def blame() -> str:
            culprit = who_blocks(x_hat, self.preprocess, model.network, *own, **more)
            return culprit or "the output function or the criterion"

        return self._reach(self.where, value, x_hat, blame)

    def _shared_output(self, look: Shared) -> Any:
        return look.outputs(("",), only_reads=self.output is None and only_reads(self.task_criterion))[""]

    def _own_loss(self, model: Frozen, positional: tuple[Any, ...], named: dict[str, Any], x_hat: Tensor) -> Any:
        image = positional[0] if positional else named

        def run() -> Any:
            answer = told(self.where, model.network, image, lambda: model(*positional, **named))
            return answer if self.output is None else self.output(answer)

        value = run() if model.is_awake is not None or torch.compiler.is_compiling() else first_loss(model, run, x_hat)
        if not isinstance(value, Tensor):
            what = type(value).__name__
            raise InputError(
                self.where, f"T returned a {what}, not its loss; pick that with output=lambda answer: answer.loss"
            )
        return value

    def _compared(self, model: Frozen, image: Any, prediction: Any, labels: Labels) -> Any:
        criterion: Any = self.task_criterion
        with no_autocast(labels.device):
            prediction = full_precision(prediction)
            label = labels.of_the_kept(prediction)
            label = full_precision(label if only_reads(self.task_criterion) else lent(label))
            if torch.compiler.is_compiling() or not isinstance(image, Tensor):
                return criterion(prediction, label)
            try:
                return criterion(prediction, label)
            except (RuntimeError, ValueError, IndexError) as error:
                sentence = refusal_of_prediction(model.network, image, prediction)
                if sentence is None:
                    raise
                raise InputError(self.where, sentence) from error


def _networks(given: object) -> list[Any]:
    one = isinstance(given, (str, nn.Module)) and not isinstance(given, nn.ModuleList)  # a Sequential is one network
    return list(given) if isinstance(given, Iterable) and not one else [given]


def first_loss(model: Frozen, run: Callable[[], Any], x_hat: Tensor) -> Any:
    """A network's own loss at its first call, which decides for good in which mode it computes one."""
    devices = [x_hat.device] if x_hat.is_cuda else []
    model.wake_(False)
    asleep: Any = None
    with torch.random.fork_rng(devices=devices), contextlib.suppress(Exception):
        asleep = run()
    n = x_hat.shape[0]
    is_loss = isinstance(asleep, Tensor) and asleep.is_floating_point() and asleep.numel() == 1
    trains = x_hat.requires_grad and torch.is_grad_enabled()
    if is_loss and (n > 1 or not asleep.dim()) and (asleep.requires_grad or not trains):
        return asleep
    model.wake_(True)
    try:
        awake = run()
    except Exception:
        model.wake_(False)
        model.is_awake = None
        raise
    if isinstance(asleep, Tensor) and isinstance(awake, Tensor) and asleep.shape == awake.shape == (n,):
        model.wake_(False)  # one loss per sample, in either mode
        return asleep
    if not isinstance(awake, Tensor) or awake.numel() not in (1, n):
        model.wake_(False)
        model.is_awake = None
    return awake


class Turns(nn.Module):
    """Counts round n networks, one per call; the turn is saved, so that a resumed run goes on where it was."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.turn = 0

    def next(self, advance: bool = True) -> int:
        """The network whose turn it is; looking (validation) does not use the turn up."""
        turn = self.turn
        if advance:
            self.turn = (turn + 1) % self.n
        return turn

    def get_extra_state(self) -> int:
        """The turn, for ``state_dict``."""
        return self.turn

    def set_extra_state(self, state: int) -> None:
        """Take up the saved turn."""
        self.turn = state % self.n
