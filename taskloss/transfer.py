"""Does a restorer help networks that it never saw, or does it please its guide alone?"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from taskloss.checks import InputError, check_image, shape
from taskloss.frozen import freeze

Verdict = Literal["carries over", "low", "uncertain", "no gain"]


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval.

    Attributes:
        mean: Over all samples.
        low: The 2.5th percentile over resamples.
        high: The 97.5th.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


@dataclass(frozen=True)
class Transfer:
    """What a restorer gains over its baseline, and how much of it carries over; ``str()`` says it in words.

    Attributes:
        n: Samples seen.
        guide: Gain of the network that guided the training, in the metric's unit.
        judges: Gain of each network that did not.
        unseen: Mean gain over the judges.
        transfer: ``unseen / guide``: 1 when strangers gain as much as the guide, 0 when it alone gains; NaN with
            the verdict ``"no gain"``, since there is nothing to divide by.
        enough: The transfer that was asked for.
        verdict: ``"carries over"`` or ``"low"`` when the whole interval of the transfer lies on that side of
            ``enough``, ``"uncertain"`` when it does not, and ``"no gain"`` when the guide's own gain is not surely
            positive.
    """

    n: int
    guide: Interval
    judges: dict[str, Interval]
    unseen: Interval
    transfer: Interval
    enough: float
    verdict: Verdict

    def __str__(self) -> str:
        gains = f"over the baseline, the guide gains {self.guide} and unseen networks {self.unseen}"
        if self.verdict == "no gain":
            return f"no gain to carry over: {gains}; the task term has not helped even its guide"
        share = ", ".join(f"{100 * part:.0f} %" for part in self.transfer[1:])
        said = f"{gains}: {100 * self.transfer.mean:.0f} % [{share}] of the gain carries over"
        if self.verdict == "carries over":
            return f"carries over: {said}"
        if self.verdict == "uncertain":
            return f"uncertain: {said}; more samples would tell whether it reaches {100 * self.enough:.0f} %"
        loss = ", and they lose by it" if self.unseen.high < 0 else ""
        return (
            f"low transfer: {said}{loss}; the restorer pleases its guide, so do not read the guide's score as quality"
        )


class TransferMeter:
    r"""Measure, batch by batch, how much of the guide's gain reaches networks that the training never saw.

    With the metric m, the gain of a network T over n samples is the mean of
    :math:`m(T(\hat x), y) - m(T(b), y)`, b the baseline's image; the transfer is the judges' mean gain over the
    guide's. Intervals come from a bootstrap over samples (or groups of them), the networks held fixed.

    Args:
        guide: The task network that trained the restorer.
        judges: Held-out networks by name, never used in training.
        metric: ``metric(prediction, label)``, one value per sample, **higher is better**; booleans count as 0 and 1.
        preprocess: Map from the restorer's units to the networks'.
        output: Picks the prediction out of what a network returns.
        enough: The transfer that the verdict asks for.
        n_resamples: Of the bootstrap.

    A network is copied, frozen and put in eval mode as in :class:`Frozen`; any other callable is used as it is.

    Raises:
        TypeError: If a network cannot be called.
        ValueError: If there is no judge, a judge is the guide itself, or a number is out of range.

    Example:
        >>> def first(x): return x[:, 0, 0]
        >>> def second(x): return x[:, 0, 1]
        >>> meter = TransferMeter(first, {"second": second}, lambda seen, label: -(seen - label).abs())
        >>> baseline, label = torch.zeros(8, 1, 2), torch.ones(8)
        >>> x_hat = baseline.clone()
        >>> x_hat[:, 0, 0] = 1  # right where the guide looks, and nowhere else
        >>> meter.update(x_hat, baseline, label)
        >>> report = meter.report()
        >>> report.verdict, report.guide.mean, report.judges["second"].mean, report.transfer.mean
        ('low', 1.0, 0.0, 0.0)
    """

    where = "transfer_meter"

    def __init__(
        self,
        guide: Callable[..., Any],
        judges: Mapping[str, Callable[..., Any]],
        metric: Callable[[Any, Any], Tensor],
        *,
        preprocess: Callable[[Tensor], Any] | None = None,
        output: Callable[[Any], Any] | None = None,
        enough: float = 0.5,
        n_resamples: int = 2000,
    ) -> None:
        if not isinstance(judges, Mapping) or not judges:
            raise ValueError(f"{self.where}: judges must name at least one held-out network: judges={{'other': net}}")
        for name, network in {"guide": guide, **judges}.items():
            if not callable(network) or isinstance(network, type):
                raise TypeError(f"{self.where}: {name!r} must be a network or a callable, got {network!r}")
        for name, network in judges.items():
            if network is guide:
                raise ValueError(f"{self.where}: judge {name!r} is the guide itself; name networks that it never saw")
        if not (math.isfinite(enough) and enough > 0):
            raise ValueError(f"{self.where}: enough must be positive, got {enough!r}")
        if n_resamples < 100:
            raise ValueError(f"{self.where}: n_resamples must be at least 100, got {n_resamples!r}")
        self.judges = tuple(judges)
        self.networks = [freeze(n) if isinstance(n, nn.Module) else n for n in (guide, *judges.values())]
        self.metric = metric
        self.preprocess = preprocess
        self.output = output
        self.enough = enough
        self.n_resamples = n_resamples
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._gains: list[Tensor] = []  # (n, 1 + judges) for each batch
        self._groups: list[Hashable] = []

    @torch.no_grad()
    def update(self, x_hat: Tensor, baseline: Tensor, label: Any, *, group: Sequence[Hashable] | None = None) -> None:
        """Let every network look at the same samples, restored in two ways.

        Args:
            x_hat: What the restorer made of them.
            baseline: What the restorer without the task term made of them.
            label: As the metric wants it.
            group: One name per sample, such as the patient: samples that share it are resampled together.

        Shape:
            x_hat and baseline ``(N, C, *spatial)``; the metric gives ``(N,)``.

        Raises:
            InputError: If the two images differ in shape, or the metric does not give one finite value per sample.
        """
        check_image(self.where, x_hat)
        if not isinstance(baseline, Tensor) or baseline.shape != x_hat.shape:
            came = shape(baseline) if isinstance(baseline, Tensor) else type(baseline).__name__
            raise InputError(
                self.where, f"x_hat {shape(x_hat)} and baseline {came} differ; restore the same samples in both ways"
            )
        n = len(x_hat)
        groups = list(range(len(self._groups), len(self._groups) + n)) if group is None else list(group)
        if len(groups) != n:
            raise InputError(self.where, f"x_hat holds {n} samples but group has {len(groups)} entries")
        if n == 0:
            return
        gains = [self._scores(net, x_hat, label) - self._scores(net, baseline, label) for net in self.networks]
        self._gains.append(torch.stack(gains, 1))
        self._groups += [("sample", g) if group is None else ("group", g) for g in groups]

    def report(self) -> Transfer:
        """What has been seen so far.

        Raises:
            InputError: Before there are two samples (or groups) to resample.
        """
        place = {group: i for i, group in enumerate(dict.fromkeys(self._groups))}
        if len(place) < 2:
            raise InputError(
                self.where,
                f"needs at least two samples or groups, got {len(place)}; call update(x_hat, baseline, label)",
            )
        index = torch.tensor([place[group] for group in self._groups])
        gains = torch.cat(self._gains)
        sums = torch.zeros(len(place), gains.shape[1] + 1, dtype=torch.float64)  # the last column counts samples
        sums.index_add_(0, index, torch.cat([gains, torch.ones(len(gains), 1, dtype=torch.float64)], 1))
        drawn = self._resample(sums)
        means = sums.sum(0)
        means = means[:-1] / means[-1]
        guide, *judges = (_interval(float(m), drawn[:, i]) for i, m in enumerate(means))
        unseen = _interval(float(means[1:].mean()), drawn[:, 1:].mean(1))
        if guide.low > 0:
            transfer = _interval(unseen.mean / guide.mean, drawn[:, 1:].mean(1) / drawn[:, 0])
        else:
            transfer = Interval(math.nan, math.nan, math.nan)
        named = dict(zip(self.judges, judges, strict=True))
        return Transfer(len(gains), guide, named, unseen, transfer, self.enough, self._verdict(guide, transfer))

    def _verdict(self, guide: Interval, transfer: Interval) -> Verdict:
        if not guide.low > 0:
            return "no gain"
        if transfer.low >= self.enough:
            return "carries over"
        return "low" if transfer.high < self.enough else "uncertain"

    def _resample(self, sums: Tensor) -> Tensor:
        """Mean gains ``(n_resamples, networks)`` of groups drawn with replacement; the same draws every time."""
        generator = torch.Generator().manual_seed(0)
        n = len(sums)
        means = []
        for _ in range(self.n_resamples):
            total = sums[torch.randint(n, (n,), generator=generator)].sum(0)
            means.append(total[:-1] / total[-1])
        return torch.stack(means)

    def _scores(self, network: Callable[..., Any], image: Tensor, label: Any) -> Tensor:
        prediction = network(image if self.preprocess is None else self.preprocess(image))
        score = self.metric(prediction if self.output is None else self.output(prediction), label)
        if not isinstance(score, Tensor) or score.shape != image.shape[:1]:
            came = shape(score) if isinstance(score, Tensor) else type(score).__name__
            raise InputError(
                self.where,
                f"the metric must give one value per sample, ({len(image)},), got {came}; do not average in it",
            )
        score = score.detach().to("cpu", torch.float64)
        if not bool(score.isfinite().all()):
            raise InputError(
                self.where,
                f"the metric is not finite for {int((~score.isfinite()).sum())} of {len(image)} samples; "
                "leave them out",
            )
        return score


def _interval(mean: float, drawn: Tensor) -> Interval:
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return Interval(mean, low, high)
