"""Balance or de-conflict the terms where they meet: at x_hat, with one backward pass through the denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from taskloss.algebra import LossSum, check_names
from taskloss.checks import InputError, check_callable, check_image
from taskloss.distributed import ReplicaCheck, n_processes, sum_over_processes_
from taskloss.finite import not_finite
from taskloss.gradients import values_and_gradients
from taskloss.precision import full_precision
from taskloss.values import LossValue


class GradientBalancer:
    r"""Give each term its share of the gradient at x_hat, or combine the gradients with an aggregator.

    Every term reaches the denoiser through x_hat alone (Eq. 4 of the paper), so all scale and all conflict lives in
    the gradients :math:`g_i = \partial L_i / \partial \hat x`. They are taken one term at a time, each graph freed
    before the next, combined to one gradient, and sent back through the denoiser once.

    With ``shares``, moving averages of the norms set the weights,

    .. math:: g = \sum_i w_i g_i, \quad w_i = R\, \frac{s_i}{\sum_j s_j} \frac{1}{\overline{\|g_i\|}}

    so a loss rescaled by any factor changes nothing; the shares take the place of the sum's own weights (a weight
    of zero still leaves the term out). With ``aggregator``, the weighted gradients ``w_i g_i`` are its rows.

    Args:
        loss: The sum whose terms are balanced.
        shares: Share of the gradient's norm by term; every term that counts needs one.
        aggregator: A callable from a matrix ``(terms, numel)`` to a vector ``(numel,)``, such as
            ``torchjd.aggregation.UPGrad()``, in place of shares. On several processes each aggregates its own part.
        decay: Of the moving average, which is corrected for its start.
        total_norm: R, the norm that the shares divide. Adam and RMSprop do not feel it; SGD does.

    Raises:
        ValueError: If not exactly one of ``shares`` and ``aggregator`` is given, or a share is not positive.
        InputError: If the names of the shares are not the terms'.

    Example:
        >>> from taskloss import Fidelity
        >>> loss = LossSum(mse=Fidelity(torch.nn.MSELoss()), l1=1000 * Fidelity(torch.nn.L1Loss()))
        >>> balancer = GradientBalancer(loss, shares={"mse": 1.0, "l1": 1.0})
        >>> x_hat = torch.ones(1, 1, 4, requires_grad=True)
        >>> value = balancer.backward(x_hat, reference=torch.zeros(1, 1, 4))
        >>> value.weights
        {'mse': 0.5, 'l1': 1.0}
        >>> x_hat.grad
        tensor([[[0.5000, 0.5000, 0.5000, 0.5000]]])

    Reference:
        Défossez et al., High Fidelity Neural Audio Compression, 2022, section 3.4 (shares, for audio); Sener and
        Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018 (gradients at a shared representation).
    """

    def __init__(
        self,
        loss: LossSum,
        *,
        shares: Mapping[str, float] | None = None,
        aggregator: Callable[[Tensor], Tensor] | None = None,
        decay: float = 0.99,
        total_norm: float = 1.0,
    ) -> None:
        if (shares is None) == (aggregator is None):
            raise ValueError("gradient_balancer: give either shares={...} or aggregator=..., not both")
        if aggregator is not None:
            usage = "aggregator must be callable as aggregator(matrix), such as torchjd.aggregation.UPGrad()"
            check_callable("gradient_balancer", aggregator, usage)
        if not isinstance(loss, LossSum):
            raise TypeError(f"gradient_balancer: expected a LossSum, got {type(loss).__name__}; LossSum(name=term)")
        if not 0 <= decay < 1:
            raise ValueError(f"gradient_balancer: decay must be in [0, 1), got {decay!r}")
        for name, share in (shares or {}).items():
            if not (math.isfinite(share) and share > 0):
                raise ValueError(
                    f"gradient_balancer: the share of {name!r} must be positive, got {share!r}; "
                    "leave a term out with weight 0"
                )
        check_names("gradient_balancer", shares or {}, loss.weights)
        self.loss = loss
        self.shares = None if shares is None else dict(shares)
        self.aggregator = aggregator
        self.decay = decay
        self.total_norm = total_norm
        self._replicas = ReplicaCheck()
        self._averages: dict[str, tuple[float, int]] = {}  # moving average of the norm, and how many it has seen

    def backward(
        self,
        x_hat: Tensor,
        *,
        reference: Tensor | None = None,
        label: object = None,
        step: int | None = None,
        backward: Callable[[Tensor], object] | None = None,
    ) -> LossValue:
        """Compute the terms, combine their gradients at x_hat, and go back through the denoiser once.

        In place of ``loss.breakdown(...)`` and ``value.total.backward()``.

        Args:
            x_hat: Restored batch, with the denoiser's graph behind it.
            reference: For terms that read one.
            label: For terms that read one.
            step: For weights that are schedules.
            backward: In place of ``x_hat.backward(g)``: called with a scalar whose gradient at x_hat is g, for
                instance ``fabric.backward`` or ``lambda s: scaler.scale(s).backward()``.

        Shape:
            x_hat and reference ``(N, C, *spatial)``; the terms are scalars.

        Returns:
            The value, detached, with the effective weights: ``total`` is the sum under the weights that were used.

        Raises:
            InputError: If x_hat carries no graph, a target is missing, or a term has no share.
            FloatingPointError: If a term or its gradient is not finite; it names the term.
        """
        check_image("gradient_balancer", x_hat)
        if not x_hat.requires_grad:
            raise InputError("gradient_balancer", "x_hat carries no graph; pass the denoiser's output, not detached")
        self._replicas.note(x_hat)
        self._replicas.compare("gradient_balancer", x_hat.device)
        base = self.loss.weights_at(step)
        for name, weight in base.items():
            if self.shares is not None and weight != 0 and name not in self.shares:
                raise InputError("gradient_balancer", f"term {name!r} has no share; add it to shares={{...}}")
        found = values_and_gradients(self.loss, base, x_hat, reference=reference, label=label)
        terms = {name: value for name, value, _ in found}
        gradients = {name: gradient for name, _, gradient in found}
        del found
        norms, numbers = self._measure(terms, gradients, x_hat=x_hat, reference=reference)
        if self.shares is not None:
            weights = self._weights_by_share(norms)
            combined = torch.zeros_like(full_precision(x_hat.detach()))
            for name, gradient in gradients.items():
                combined.add_(gradient, alpha=weights[name])
        else:
            combined, weights = self._aggregate(gradients, base, x_hat)
        if backward is None:
            torch.autograd.backward(x_hat, combined.to(x_hat.dtype))
        else:
            backward((x_hat * combined).sum())
        effective = {name: weights.get(name, 0.0) for name in base}
        total = sum((weights[n] * t for n, t in terms.items()), torch.zeros((), device=x_hat.device))
        numbers["total"] = sum(weights[n] * numbers[n] for n in terms)
        return LossValue(total, terms, effective, numbers)

    def norms(self) -> dict[str, float]:
        """The moving average of each term's gradient norm at x_hat."""
        return {name: self._average(name) for name in self._averages}

    def state_dict(self) -> dict[str, Any]:
        """The moving averages, for a checkpoint."""
        return {"averages": {name: list(pair) for name, pair in self._averages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved moving averages.

        Raises:
            InputError: If they belong to a sum with other terms.
        """
        check_names("gradient_balancer", state["averages"], self.loss.weights)
        self._averages = {name: (float(mean), int(n)) for name, (mean, n) in state["averages"].items()}

    def _measure(
        self, terms: dict[str, Tensor], gradients: dict[str, Tensor], **inputs: Tensor | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Norms over all processes' samples, and the terms' values, in one transfer from the device."""
        names = list(terms)
        if not names:
            return {}, {}
        wide = any(g.dtype == torch.float64 for g in gradients.values())
        dtype = torch.float64 if wide else torch.float32
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=dtype).square() for g in gradients.values()])
        squares = sum_over_processes_(squares)
        values = torch.stack([terms[name].to(dtype) for name in names])
        numbers_, squares_ = torch.stack([values, squares]).tolist()
        numbers = dict(zip(names, numbers_, strict=True))
        # Losses are means over the batch: the whole batch's gradient is each part's over the number of parts.
        norms = {n: math.sqrt(s) / n_processes() for n, s in zip(names, squares_, strict=True)}
        for name in names:
            if not (math.isfinite(norms[name]) and math.isfinite(numbers[name])):
                raise not_finite([name], numbers[name], norms[name], inputs=inputs)
        return norms, numbers

    def _weights_by_share(self, norms: Mapping[str, float]) -> dict[str, float]:
        assert self.shares is not None
        whole = sum(self.shares[name] for name in norms)
        weights = {}
        for name, norm in norms.items():
            mean, seen = self._averages.get(name, (0.0, 0))
            if norm > 0:  # a batch without labels says nothing about the norm
                mean, seen = self.decay * mean + (1 - self.decay) * norm, seen + 1
                self._averages[name] = (mean, seen)
            weights[name] = self.total_norm * self.shares[name] / whole / self._average(name) if seen else 0.0
        return weights

    def _average(self, name: str) -> float:
        mean, seen = self._averages[name]
        return mean / (1 - self.decay**seen)

    def _aggregate(
        self, gradients: Mapping[str, Tensor], base: Mapping[str, float], x_hat: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        assert self.aggregator is not None
        if not gradients:
            return torch.zeros_like(x_hat), {}
        rows = torch.stack([base[name] * full_precision(g).flatten() for name, g in gradients.items()])
        combined = self.aggregator(rows)
        # What the aggregator did, as weights of the terms: least squares in the span of the rows.
        wide = rows.double() if rows.device.type != "mps" else rows
        gram = wide @ wide.T
        solved = torch.linalg.pinv(gram, hermitian=True) @ (wide @ combined.to(wide.dtype))
        weights = {n: base[n] * w for n, w in zip(gradients, solved.tolist(), strict=True)}
        return full_precision(combined).view_as(x_hat), weights
