"""A loss is a weighted sum of named terms at x_hat: the one idea that carries the library."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn

from taskloss.calls import function_of_image, gradient_norm
from taskloss.checks import InputError, nearest, readable, snake_case
from taskloss.finite import not_finite, watch_gradient
from taskloss.sharing import Look, Step, step_of
from taskloss.values import LossValue, check_finite, zero_loss
from taskloss.weights import Weight, at_step, check_weight, product

Target = Literal["reference", "label"]
Kind = TypeVar("Kind", bound="Term")


class Term(nn.Module):
    """One scalar loss of the restored image; the base class of everything a :class:`LossSum` adds up.

    A subclass says in ``reads`` what it compares x_hat with and implements ``forward(x_hat, target)``, or
    ``forward(x_hat)`` where ``reads`` is None. It returns a scalar and leaves its inputs as they were.
    """

    reads: ClassVar[Target | None] = None
    _where: ClassVar[str] = "term"
    if TYPE_CHECKING:  # nn.Module calls everything Any
        __call__: Callable[..., Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._where = snake_case(cls.__name__)  # once: a regular expression in every forward cannot be compiled

    @property
    def where(self) -> str:
        """The name that errors carry until a sum gives the term a better one."""
        return self._where

    def _looks(self) -> Iterable[Look | None]:
        """What the term is going to see through frozen networks, for others to share."""
        return ()

    def __add__(self, other: Term | LossSum) -> LossSum:
        return as_sum(self) + as_sum(other)

    def __mul__(self, factor: Weight) -> LossSum:
        return as_sum(self) * factor

    __rmul__ = __mul__


class LossSum(nn.Module):
    """A weighted sum of named terms, ``L(x_hat) = sum_i w_i L_i(x_hat)``.

    The sum is linear only, so the total's gradient is exactly the weighted sum of the terms' gradients. A term
    whose weight is zero is not computed. Terms that look through one :class:`Frozen` with the same ``preprocess`` run
    it once for x_hat, and once for the reference. Sums nest: ``LossSum(task=a + b)`` names its parts ``task/a`` and
    ``task/b``, and ``LossSum(mse=0.5 * Fidelity(...))`` is ``mse`` with weight 0.5.

    Args:
        terms: Terms by name. A weight is a number, or a schedule: a callable of the step, as in
            ``(lambda step: min(1.0, step / 500)) * TaskOrientedLoss(...)``.

    Attributes:
        check_finite: Name the term in an error when its value, or in the backward pass its gradient at x_hat, is NaN
            or infinite (default), before a weight of the denoiser has seen it. It shares the one device sync of
            :meth:`breakdown` and costs one more in the backward pass; False trains without any sync. Overflows that a
            ``GradScaler`` expects are left to it; nothing is checked under ``torch.compile`` or ``torch.func``.

    Raises:
        InputError: For a name used twice or a weight that is no finite number.
        TypeError: For a part that is neither a term nor a sum.

    Example:
        >>> from taskloss import Fidelity, LossSum
        >>> loss = LossSum(mse=0.5 * Fidelity(nn.MSELoss()), l1=Fidelity(nn.L1Loss()))
        >>> loss(torch.ones(1, 1, 4), reference=torch.zeros(1, 1, 4))
        tensor(1.5000)

    Reference:
        Task-Oriented Low-Dose CT Image Denoising, Eq. 8.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    def __init__(self, *unnamed: NoReturn, **terms: Term | LossSum) -> None:
        super().__init__()
        if unnamed:
            example = getattr(unnamed[0], "where", "task")
            raise TypeError(
                f"loss_sum: its terms have names; write LossSum({example}={type(unnamed[0]).__name__}(...))"
            )
        self.check_finite = True
        self.terms = nn.ModuleDict()
        self.weights: dict[str, Weight] = {}
        for name, part in terms.items():
            if not isinstance(part, (Term, LossSum)):
                raise TypeError(
                    f"{name}: expected a term or a LossSum, got {type(part).__name__}; "
                    "wrap an image criterion in Fidelity(...)"
                )
            for inner, term, weight in _parts(part):
                alone = isinstance(part, Term) or len(part.terms) == 1
                self._add(name if alone else f"{name}/{inner}", term, weight)

    @classmethod
    def weighted(cls, terms: dict[str, Term | LossSum], weights: dict[str, float] | None = None) -> LossSum:
        """A sum from plain dicts, as configuration files hold them (hydra, LightningCLI); weights left out are 1.

        Args:
            terms: Terms by name.
            weights: Weights by name.

        Raises:
            InputError: For the weight of a term that is not there.

        Example:
            >>> from taskloss import Fidelity
            >>> LossSum.weighted({"mse": Fidelity(nn.MSELoss())}, {"mse": 0.5}).weights
            {'mse': 0.5}
        """
        weights = weights or {}
        check_names("loss_sum", weights, terms)
        return cls(**{name: as_sum(term) * weights.get(name, 1.0) for name, term in terms.items()})

    def forward(
        self,
        x_hat: Tensor,
        target: object = None,
        *,
        reference: Tensor | None = None,
        label: object = None,
        step: int | None = None,
    ) -> Tensor:
        """The scalar total; each target goes to the terms that read it.

        Args:
            x_hat: Restored batch.
            target: For trainers that call ``loss(x_hat, target)``: it goes to the one kind of target that the terms
                read. Where they read both, it must be a dict with the keys ``reference`` and ``label``.
            reference: The image it should equal, for terms that read one.
            label: The task's annotation, for terms that read one.
            step: Step of training, for weights that are schedules.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; the result is a scalar.

        Raises:
            InputError: For a missing or an ambiguous target, or a schedule without a step; it names the term.
            FloatingPointError: If a term is NaN or infinite; it names the term.
        """
        return self.breakdown(x_hat, target, reference=reference, label=label, step=step).total

    def breakdown(
        self,
        x_hat: Tensor,
        target: object = None,
        *,
        reference: Tensor | None = None,
        label: object = None,
        step: int | None = None,
    ) -> LossValue:
        """The same computation as calling the sum, seen whole: total, terms and weights. See :meth:`forward`.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; total and terms are scalars.
        """
        reference, label = self._by_kind(target, reference, label)
        weights = self.weights_at(step)
        checked = self.check_finite and isinstance(x_hat, Tensor) and readable(x_hat)
        # A view gets the gradient of this sum alone, whatever else the caller makes of x_hat.
        seen = x_hat.view_as(x_hat) if checked and x_hat.requires_grad and torch.is_grad_enabled() else x_hat
        terms: dict[str, Tensor] = {}
        total: Tensor | None = None
        with self.sharing(weights):
            for name, compute in self.computations(weights, reference=reference, label=label):
                terms[name] = compute(seen)
                weighted = weights[name] * terms[name]
                total = weighted if total is None else total + weighted
        value = LossValue(zero_loss(seen) if total is None else total, terms, weights)
        if checked:
            check_finite(value, x_hat=x_hat, reference=reference)
            if seen is not x_hat and value.total.requires_grad:
                self._watch(seen, value, reference, label)
        return value

    def computations(
        self, weights: Mapping[str, float], *, reference: Tensor | None, label: object
    ) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Each term that counts as a function of x_hat alone: what maps and balancing are made of.

        Shape:
            reference ``(N, C, *spatial)``; each function takes such an x_hat to a scalar.
        """
        targets = {"reference": reference, "label": label}
        for name, term in self.terms.items():
            if weights[name] == 0:
                continue
            assert isinstance(term, Term)  # for the type checker: only _add fills the dict
            reads = term.reads
            if reads is not None and targets[reads] is None:
                raise InputError(name, f"needs a {reads}, but {reads} is None; call loss(x_hat, {reads}=...)")
            yield name, function_of_image(name, term, None if reads is None else targets[reads])

    def sharing(self, weights: Mapping[str, float]) -> contextlib.AbstractContextManager[Step | None]:
        """While it is open, the terms that count run a network once where they look through it at the same image."""
        if torch.compiler.is_compiling():
            return contextlib.nullcontext()
        counting = [term for name, term in self.terms.items() if weights[name] != 0 and isinstance(term, Term)]
        return step_of(chain.from_iterable(term._looks() for term in counting))

    def _by_kind(self, target: Any, reference: Tensor | None, label: object) -> tuple[Tensor | None, object]:
        if target is None:
            return reference, label
        if reference is not None or label is not None:
            raise InputError(
                "loss_sum", "got a positional target and a named one; call loss(x_hat, reference=..., label=...)"
            )
        if isinstance(target, Mapping) and set(target) == {"reference", "label"}:
            return target["reference"], target["label"]
        kinds = {term.reads for term in self.terms.values() if isinstance(term, Term)} - {None}
        if len(kinds) > 1:
            raise InputError(
                "loss_sum",
                "its terms read a reference and a label, and one positional target could be either; "
                "call loss(x_hat, reference=..., label=...), or give a dict with the keys 'reference' and 'label'",
            )
        return (target, None) if kinds == {"reference"} else (None, target)

    def _watch(self, seen: Tensor, value: LossValue, reference: Tensor | None, label: object) -> None:
        still = seen.detach()

        def complain() -> FloatingPointError:
            for name, compute in self.computations(value.weights, reference=reference, label=label):
                norm = gradient_norm(compute, still)
                if not math.isfinite(norm):
                    return not_finite([name], value.floats()[name], norm, inputs={"x_hat": still})
            return not_finite(value.terms, value.floats()["total"], math.nan, inputs={"x_hat": still})

        watch_gradient(seen, value.total, complain)

    def weights_at(self, step: int | None = None) -> dict[str, float]:
        """The weights by name at a step of training; a sum without schedules needs no step."""
        return {name: at_step(name, weight, step) for name, weight in self.weights.items()}

    def __add__(self, other: Term | LossSum) -> LossSum:
        result = LossSum()
        for part in (self, as_sum(other)):
            for name, term, weight in _parts(part):
                result._add(name, term, weight)
        return result

    def __mul__(self, factor: Weight) -> LossSum:
        result = LossSum()
        for name, term, weight in _parts(self):
            result._add(name, term, product(name, weight, factor))
        return result

    __rmul__ = __mul__

    @overload
    def __getitem__(self, name: str) -> Any: ...

    @overload
    def __getitem__(self, name: tuple[str, type[Kind]]) -> Kind: ...

    def __getitem__(self, name: str | tuple[str, type[Kind]]) -> Any:
        """A term by its name; ``loss["task", TaskOrientedLoss]`` tells type checkers, and checks, which kind it is.

        Raises:
            InputError: If there is no such term.
            TypeError: If it is of another kind.

        Example:
            >>> from taskloss import Fidelity
            >>> LossSum(mse=0.5 * Fidelity(nn.MSELoss()))["mse"]
            Fidelity(...)
        """
        key, kind = name if isinstance(name, tuple) else (name, Term)
        if key not in self.terms:
            raise InputError("loss_sum", f"there is no term {key!r}; {nearest(str(key), self.weights)}")
        term = self.terms[key]
        if not isinstance(term, kind):
            raise TypeError(f"loss_sum: the term {key!r} is a {type(term).__name__}, not a {kind.__name__}")
        return term

    def extra_repr(self) -> str:
        """The weights by name."""
        return ", ".join(f"{n}: {w if not callable(w) else 'schedule'}" for n, w in self.weights.items())

    def _add(self, name: str, term: Term, weight: Weight) -> None:
        if name in self.terms:
            raise ValueError(f"two terms are called {name!r}; name them: LossSum(a=..., b=...)")
        if hasattr(self.terms, name):
            raise ValueError(f"a term cannot be called {name!r}: nn.Module uses that name; choose another")
        if not callable(weight):
            check_weight(name, weight)
        self.terms[name] = term
        self.weights[name] = weight


def as_sum(part: Term | LossSum) -> LossSum:
    """A term alone, as a sum with its class's name; a sum as it is."""
    if isinstance(part, LossSum):
        return part
    if isinstance(part, Term):
        return LossSum(**{part.where: part})
    raise TypeError(f"expected a term or a LossSum, got {type(part).__name__}; wrap a criterion in Fidelity(...)")


def check_names(where: str, given: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Refuse a mapping whose names are not the sum's names."""
    for name in given:
        if name not in known:
            raise InputError(where, f"there is no term {name!r}; {nearest(name, known)}")


def _parts(part: Term | LossSum) -> Iterator[tuple[str, Term, Weight]]:
    if isinstance(part, Term):
        yield part.where, part, 1.0
    else:
        for name, term in part.terms.items():
            assert isinstance(term, Term)  # for the type checker: only _add fills the dict
            yield name, term, part.weights[name]
