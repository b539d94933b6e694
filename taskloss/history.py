"""What a training did, step by step: terms, weights, gradient norms and cosines, for a logger and for one picture."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from taskloss.balancing import GradientBalancer
from taskloss.checks import InputError
from taskloss.gradients import GradientMaps
from taskloss.values import LossValue

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PANELS = {
    "loss": "terms, unweighted",
    "weight": "weights",
    "norm": r"gradient norms at $\hat{x}$",
    "cosine": r"cosines at $\hat{x}$",
}


class History:
    """Record a training's loss values as plain numbers, log them, and draw them in one call.

    Only numbers are kept, no tensors and no graphs. Norms and cosines are those at x_hat: the moving averages of a
    :class:`GradientBalancer`, or what :func:`gradient_maps` found now and then.

    Example:
        >>> import torch
        >>> from taskloss import Fidelity, LossSum
        >>> loss, history = LossSum(mse=0.5 * Fidelity(torch.nn.MSELoss())), History()
        >>> for step in range(3):
        ...     value = loss.breakdown(torch.full((1, 1, 4), 1.0 + step), reference=torch.zeros(1, 1, 4))
        ...     row = history.record(value, step=step)
        >>> row
        {'step': 2, 'loss/mse': 9.0, 'loss/total': 4.5, 'weight/mse': 0.5}
        >>> figure = history.plot()
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._rows: list[dict[str, dict[str, float]]] = []  # of each step, by kind and name

    def record(
        self,
        value: LossValue,
        *,
        step: int | None = None,
        gradients: GradientBalancer | GradientMaps | None = None,
    ) -> dict[str, float]:
        """Keep one step's numbers; at most one device sync, which ``value.floats()`` shares.

        Args:
            value: From :meth:`LossSum.breakdown` or :meth:`GradientBalancer.backward`.
            step: The step; one after the last if None.
            gradients: Where norms come from; maps tell the cosines too.

        Returns:
            The row, flat, as loggers take it: ``step``, ``loss/<term>``, ``loss/total``, ``weight/<term>``,
            ``norm/<term>``, ``cosine/<term>,<term>``.

        Raises:
            InputError: If the step is not after the last one.
        """
        last = self._steps[-1] if self._steps else -1
        if step is not None and step <= last:
            raise InputError("history", f"step {step} comes after step {last}; record steps in order")
        row = {"loss": value.floats(), "weight": dict(value.weights)}
        if gradients is not None:
            row["norm"] = gradients.norms()
        if isinstance(gradients, GradientMaps):
            cosines = gradients.cosines()
            row["cosine"] = {f"{a},{b}": cosines[a][b] for a, b in combinations(cosines, 2)}
        self._steps.append(last + 1 if step is None else step)
        self._rows.append(row)
        return _flat(self._steps[-1], row)

    def rows(self) -> list[dict[str, float]]:
        """Every row, flat, oldest first, for ``csv.DictWriter`` or ``pandas.DataFrame``."""
        return [_flat(step, row) for step, row in zip(self._steps, self._rows, strict=True)]

    def plot(self, *, smooth: int = 1) -> Figure:
        """Draw what was recorded: terms, weights, norms and cosines, as far as there are any, two panels in a row.

        Args:
            smooth: Steps of a running mean, drawn over the pale raw curve.

        Returns:
            A matplotlib figure; save it with ``figure.savefig("history.png")``.

        Raises:
            InputError: If nothing was recorded, or ``smooth`` is below 1.
        """
        from matplotlib.figure import Figure

        if not self._rows:
            raise InputError("history", "nothing was recorded; call history.record(value) in the loop")
        if smooth < 1:
            raise InputError("history", f"smooth must be at least 1, got {smooth!r}")
        kinds = [kind for kind in PANELS if any(row.get(kind) for row in self._rows)]
        columns = min(len(kinds), 2)
        rows = -(-len(kinds) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained", dpi=130)
        for place, kind in enumerate(kinds, 1):
            self._draw(figure.add_subplot(rows, columns, place), kind, smooth)
        return figure

    def state_dict(self) -> dict[str, Any]:
        """The rows, for a checkpoint."""
        return {"steps": list(self._steps), "rows": [{k: dict(v) for k, v in row.items()} for row in self._rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved rows."""
        self._steps = list(state["steps"])
        self._rows = [{kind: dict(numbers) for kind, numbers in row.items()} for row in state["rows"]]

    def _draw(self, panel: Any, kind: str, smooth: int) -> None:
        curves: dict[str, tuple[list[int], list[float]]] = {}
        for step, row in zip(self._steps, self._rows, strict=True):
            for name, number in row.get(kind, {}).items():
                steps, numbers = curves.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(number)
        for name, (steps, numbers) in curves.items():
            style: dict[str, Any] = {"ls": "--", "color": "0.3"} if (kind, name) == ("loss", "total") else {}
            if len(steps) < 30:
                style["marker"] = "."
            if smooth > 1:
                (pale,) = panel.plot(steps, numbers, lw=0.8, alpha=0.3, **style)
                style = {"ls": pale.get_linestyle(), "color": pale.get_color()}
                numbers = _running_mean(numbers, smooth)
            panel.plot(steps, numbers, lw=1.3, label=name, **style)
        if kind == "cosine":
            panel.set_ylim(-1.05, 1.05)
            panel.axhline(0, lw=0.6, color="0.5")
        elif all(number > 0 for _, numbers in curves.values() for number in numbers):
            panel.set_yscale("log")
        panel.set_title(PANELS[kind], fontsize=10)
        panel.set_xlabel("step", fontsize=9)
        panel.tick_params(which="both", labelsize=8)
        panel.legend(fontsize=8, frameon=False)


def _flat(step: int, row: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    numbers = {f"{kind}/{name}": number for kind, named in row.items() for name, number in named.items()}
    return {"step": step, **numbers}


def _running_mean(numbers: list[float], width: int) -> list[float]:
    """The mean of the last ``width`` numbers, of fewer at the start."""
    windows = (numbers[max(0, end - width) : end] for end in range(1, len(numbers) + 1))
    return [sum(window) / len(window) for window in windows]
