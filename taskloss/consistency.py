"""A task loss without labels: T should see the same in the restored image as in the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskloss.algebra import Term
from taskloss.arguments import arguments, images_in
from taskloss.blame import who_blocks
from taskloss.checks import check_callable, check_function, check_image, check_same
from taskloss.diagnosis import told
from taskloss.features import check_layers
from taskloss.frozen import Frozen, freeze, hold
from taskloss.looks import Shared, look_of, shared
from taskloss.memory import Remembered
from taskloss.precision import full_precision, no_autocast
from taskloss.preprocess import Draw, only_reads, prepare
from taskloss.ranges import RangeCheck
from taskloss.reach import ReachCheck
from taskloss.sharing import Look
from taskloss.values import to_scalar, zero_loss


class TaskConsistencyLoss(Term):
    r"""The distance between what a frozen network makes of the restored image and of the reference.

    .. math:: L(\hat x, x^*) = \sum_l w_l\, \mathrm{distance}\big(f_l(\hat x), f_l(x^*)\big)

    where f_l is the network's output or a named layer. The reference branch builds no graph. With an ImageNet
    network, its layers and ``nn.MSELoss()`` this is the perceptual loss (Eq. 7 of the paper, up to its factor 1/2
    and the mean over features).

    Args:
        task_model: The network f.
        distance: ``distance(prediction, target)``; :func:`soft_kl` for logits, ``nn.MSELoss()`` for features.
        layers: Layers by their ``named_modules()`` path, or a mapping from path to weight; None compares the
            output. The network stops after the last layer it needs. They are read by hooks, at which ``torch.compile``
            breaks its graph, so that ``fullgraph=True`` refuses them.
        preprocess: Differentiable map from the restorer's units to the network's, applied to both images; where it
            is random, both see the same draw (``torch.compile`` breaks its graph there). A module augments as it
            came while the loss is in training mode.
            A tuple that it returns is the network's positional arguments, a dict its keyword arguments.
        output: Picks the tensor out of what the network (or a layer) returns.
        copy: Keep a deep copy of the network (default); False freezes the caller's own in place.
        checkpoint: Recompute the activations of x_hat's branch in the backward pass instead of storing them.
        lean: Keep only what the gradient at x_hat needs (default; see :class:`Frozen`).
        fold: Faster, equal up to rounding: batch norm in the convolution before it, and a faster 3-D convolution on
            a CPU (see :class:`Frozen`).
        cache: Keep the reference's features and reuse them while an equal reference comes again (fitting one image
            for many steps, balancing after logging), unless ``preprocess`` is random. Costs a comparison with a copy
            of the reference, and a device sync; with ``copy=False`` a look at every weight too.
        expects: Range of the network's input, for instance ``(0, 1)``; checked until a reference has shown it.
        generator: Seeds a random ``preprocess`` at each call, so that it can be repeated; None leaves it to the
            global random states.

    Shape:
        x_hat and reference ``(N, C, *spatial)``.

    Returns:
        A scalar.

    Raises:
        InputError: For a layer that does not exist, images that differ in shape or device, an input out of
            ``expects``, or a network through which no gradient reaches x_hat.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> perceptual = TaskConsistencyLoss(net, nn.MSELoss(), layers=["1"])
        >>> image = torch.rand(1, 1, 8, 8)
        >>> perceptual(image, image)
        tensor(0.)

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Eq. 7.
    """

    reads = "reference"

    def __init__(
        self,
        task_model: nn.Module,
        distance: nn.Module | Callable[[Any, Any], Tensor],
        *,
        layers: Sequence[str] | Mapping[str, float] | None = None,
        preprocess: Callable[[Tensor], Any] | None = None,
        output: Callable[[Any], Any] | None = None,
        copy: bool = True,
        checkpoint: bool = False,
        lean: bool = True,
        fold: bool = False,
        cache: bool = False,
        expects: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_callable(self.where, distance, "distance must be callable as distance(prediction, target)")
        self.task_model: Frozen = freeze(task_model, copy=copy, checkpoint=checkpoint, lean=lean, fold=fold)
        if isinstance(layers, str):
            layers = [layers]
        if layers is not None and not layers:
            raise ValueError(f"{self.where}: layers is empty; name at least one, or pass None for the output")
        self.layers = (
            None if layers is None else dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, 1.0)
        )
        if self.layers is not None:
            check_layers(self.where, self.task_model.network, list(self.layers))
        self.distance = hold(distance)
        self.preprocess = prepare(self.where, preprocess, generator)
        if output is not None:
            check_function(self.where, output, "output must be callable as output(what the network returns)")
        self.output = hold(output)
        self.check_range = RangeCheck(self.where, expects)
        self._reach = ReachCheck()
        self._cache = Remembered() if cache else None

    def forward(self, x_hat: Tensor, reference: Tensor) -> Tensor:
        """The distance between what the network sees in ``x_hat`` and in ``reference``; see the class.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; a scalar comes back.
        """
        check_image(self.where, x_hat)
        check_same(self.where, x_hat, reference)
        if x_hat.shape[0] == 0:
            return zero_loss(x_hat)
        look = shared(self.task_model, self.preprocess, x_hat, self._names)
        draw = Draw(self.preprocess, x_hat.device) if look is None else look.draw
        image = draw(x_hat) if look is None else look.image
        target = self._target(reference, draw, look)
        seen = self._see(image, look=look)
        with no_autocast(x_hat.device):
            value: Tensor | None = None
            for name, weight in (self.layers or {"": 1.0}).items():
                distance = self.distance(full_precision(seen[name]), full_precision(target[name]))  # type: ignore[misc]
                distance = weight * to_scalar(self.where, distance, x_hat.shape[0])
                value = distance if value is None else value + distance
        assert value is not None  # layers are never empty
        return self._reach(self.where, value, x_hat, lambda: self._blame(x_hat))

    @property
    def _names(self) -> tuple[str, ...]:
        return ("",) if self.layers is None else tuple(self.layers)

    def _looks(self) -> list[Look | None]:
        return [look_of(self.task_model, self.preprocess, self._names, what) for what in ("x_hat", "reference")]

    def _blame(self, x_hat: Tensor) -> str:
        return who_blocks(x_hat, self.preprocess, self.task_model.network) or "the output function or the distance"

    def _target(self, reference: Tensor, draw: Draw, first: Shared | None) -> dict[str, Any]:
        stamp: object = None
        if self._cache is not None and not draw.random:
            stamp = (self.preprocess, self.task_model.stamp())
            remembered = self._cache.recall(reference, stamp)
            if remembered is not None:
                return remembered
        with torch.no_grad():
            look = None
            if first is not None:
                look = shared(self.task_model, self.preprocess, reference, self._names, first=first)
            target = self._see(draw(reference) if look is None else look.image, check=True, look=look)
        if self._cache is not None and not draw.random:
            self._cache.keep(reference, stamp, target)
        return target

    def _see(self, image: Any, *, check: bool = False, look: Shared | None = None) -> dict[str, Any]:
        if not torch.compiler.is_compiling():
            images = images_in(image)
            for tensor in images:
                self.task_model.check_input(self.where, tensor)
            if check and not self.check_range.settled:
                self.check_range(self.where, *images)
        positional, named = arguments(image)

        def run() -> dict[str, Any]:
            if look is not None:
                return look.outputs(self._names, only_reads=self.output is None and only_reads(self.distance))
            if self.layers is None:
                return {"": self.task_model(*positional, **named)}
            return self.task_model.features(image, list(self.layers))

        features: dict[str, Any] = told(self.where, self.task_model.network, image, run)
        if self.output is not None:
            features = {name: self.output(value) for name, value in features.items()}
        return features


def soft_kl(prediction: Tensor, target: Tensor, *, temperature: float = 1.0, dim: int = 1) -> Tensor:
    r"""The Kullback-Leibler divergence of two sets of logits, averaged over everything but the classes.

    .. math:: \tau^2\, \mathrm{mean} \sum_c q_c \log (q_c / p_c), \quad
        p = \mathrm{softmax}(\mathrm{prediction}/\tau),\; q = \mathrm{softmax}(\mathrm{target}/\tau)

    Args:
        prediction: Logits of the restored image.
        target: Logits of the reference.
        temperature: Softens both, as in distillation.
        dim: The axis of the classes.

    Shape:
        Both ``(N, classes, *spatial)``; the result is a scalar.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    if temperature != 1:  # dividing full-size logits by one takes as long as by anything else
        prediction, target = prediction / temperature, target / temperature
    log_p, log_q = prediction.log_softmax(dim), target.log_softmax(dim)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim).mean()
