"""The transfer meter: a guide that is fooled by construction, an honest one, and known answers by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from taskloss import Frozen, InputError, TransferMeter


def right(logits: Tensor, label: Tensor) -> Tensor:
    return logits.argmax(1) == label


class Watermark(nn.Module):
    """A classifier that reads one pixel, as a guide that a restorer has learned to please may do."""

    def __init__(self, pixel: int) -> None:
        super().__init__()
        self.pixel = pixel

    def forward(self, x: Tensor) -> Tensor:
        seen = x.flatten(1)[:, self.pixel]
        return torch.stack([0.5 - seen, seen - 0.5], 1)


def images(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 2, 2, generator=generator), torch.randint(2, (n,), generator=generator)


def marked(x: Tensor, label: Tensor, pixels: list[int], share: float = 1.0) -> Tensor:
    """The label written into some pixels of the first ``share`` of the samples."""
    out, n = x.clone().flatten(1), int(share * len(x))
    out[:n, pixels] = label[:n, None].float()
    return out.view_as(x)


def meter_of(**options: object) -> TransferMeter:
    return TransferMeter(Watermark(0), {"a": Watermark(1), "b": Watermark(2)}, right, **options)


def test_a_guide_fooled_by_construction_is_low() -> None:
    baseline, label = images()
    meter = meter_of()
    meter.update(marked(baseline, label, [0]), baseline, label)
    report = meter.report()
    assert report.verdict == "low"
    assert report.guide.low > 0.4
    assert report.unseen == (0, 0, 0) and report.transfer == (0, 0, 0)
    assert "the restorer pleases its guide" in str(report) and "they lose" not in str(report)


def test_an_honest_gain_carries_over() -> None:
    baseline, label = images()
    meter = meter_of()
    meter.update(marked(baseline, label, [0, 1, 2]), baseline, label)
    report = meter.report()
    assert report.verdict == "carries over"
    assert report.transfer.mean == pytest.approx(1, abs=0.15)
    assert str(report).startswith("carries over:")


def test_the_numbers_by_hand() -> None:
    label = torch.ones(4, dtype=torch.long)
    baseline = torch.zeros(4, 1, 2, 2)
    x_hat = baseline.clone()
    x_hat[:, 0, 0, 0] = 1  # the guide gains 4 of 4
    x_hat[:2, 0, 0, 1] = 1  # judge a gains 2, judge b none
    meter = meter_of()
    meter.update(x_hat, baseline, label)
    report = meter.report()
    assert (report.n, report.guide.mean) == (4, 1)
    assert {name: gain.mean for name, gain in report.judges.items()} == {"a": 0.5, "b": 0}
    assert report.unseen.mean == report.transfer.mean == 0.25


def test_a_worse_judge_counts_against_it() -> None:
    baseline, label = images()
    meter = meter_of()
    meter.update(marked(baseline, label, [0]), marked(baseline, label, [1]), label)
    report = meter.report()
    assert report.unseen.high < 0 and report.transfer.high < 0
    assert "they lose by it" in str(report)


def test_without_a_gain_there_is_nothing_to_carry_over() -> None:
    baseline, label = images()
    meter = meter_of()
    meter.update(baseline, baseline, label)
    report = meter.report()
    assert report.verdict == "no gain" and all(math.isnan(part) for part in report.transfer)
    assert str(report).startswith("no gain to carry over:")


def test_few_samples_are_uncertain() -> None:
    baseline, label = images(24)
    meter = meter_of()
    meter.update(marked(marked(baseline, label, [0]), label, [1, 2], share=0.5), baseline, label)
    report = meter.report()
    assert report.verdict == "uncertain" and report.transfer.low < 0.5 < report.transfer.high
    assert str(report).startswith("uncertain:")


@pytest.mark.parametrize(("enough", "verdict"), [(0.2, "carries over"), (0.9, "low")], ids=["easy", "strict"])
def test_enough_is_the_callers(enough, verdict) -> None:
    baseline, label = images(2000)
    meter = meter_of(enough=enough)
    meter.update(marked(marked(baseline, label, [0]), label, [1, 2], share=0.5), baseline, label)
    assert meter.report().verdict == verdict


def test_batches_add_up_and_their_order_does_not_matter() -> None:
    baseline, label = images()
    x_hat = marked(baseline, label, [0, 1], share=0.5)
    whole, parts = meter_of(), meter_of()
    whole.update(x_hat, baseline, label)
    for i in torch.arange(len(label)).split(64):
        parts.update(x_hat[i], baseline[i], label[i])
    parts.update(x_hat[:0], baseline[:0], label[:0])
    assert parts.report() == whole.report()
    whole.reset()
    with pytest.raises(InputError, match="needs at least two samples or groups, got 0"):
        whole.report()


def test_the_interval_is_the_binomials() -> None:
    label = torch.ones(1000, dtype=torch.long)
    baseline = torch.zeros(1000, 1, 2, 2)
    meter = meter_of()
    meter.update(marked(baseline, label, [0], share=0.3), baseline, label)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    gain = meter.report().guide
    assert gain.low == pytest.approx(0.3 - half, abs=0.004) and gain.high == pytest.approx(0.3 + half, abs=0.004)


def test_samples_of_one_patient_are_resampled_together() -> None:
    label = torch.ones(400, dtype=torch.long)
    baseline = torch.zeros(400, 1, 2, 2)
    x_hat = marked(baseline, label, [0], share=0.5)
    alone, grouped = meter_of(), meter_of()
    alone.update(x_hat, baseline, label)
    grouped.update(x_hat[:200], baseline[:200], label[:200], group=["p", "q"] * 50 + ["p"] * 100)
    grouped.update(x_hat[200:], baseline[200:], label[200:], group=["r"] * 100 + ["s"] * 100)
    wide, narrow = grouped.report().guide, alone.report().guide
    assert wide.mean == narrow.mean == 0.5
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_the_networks_are_looked_at_in_eval_mode_and_left_as_found() -> None:
    guide = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.9), Watermark(0)).train()
    before = {name: tensor.clone() for name, tensor in guide.state_dict().items()}
    baseline, label = images()
    meter = TransferMeter(guide, {"plain": lambda x: Watermark(1)(x)}, right, preprocess=lambda x: 2 * x - 0.5)
    x_hat = marked(baseline, label, [0]).requires_grad_()
    meter.update(x_hat, baseline, label)
    assert guide.training and all(torch.equal(before[name], tensor) for name, tensor in guide.state_dict().items())
    assert x_hat.grad is None
    seen = (2 * baseline - 0.5) / math.sqrt(1 + 1e-5)  # what batch norm in eval mode hands on
    first = float(right(Watermark(0)(seen), label).double().mean())
    assert meter.report().guide.mean == pytest.approx(1 - first)


def test_a_frozen_network_is_shared() -> None:
    frozen = Frozen(Watermark(0))
    assert TransferMeter(frozen, {"a": Watermark(1)}, right).networks[0] is frozen


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"judges": {}}, ValueError, "judges must name at least one held-out network"),
        ({"judges": [Watermark(1)]}, ValueError, "judges must name at least one held-out network"),
        ({"judges": {"a": Watermark}}, TypeError, "'a' must be a network or a callable"),
        ({"guide": None}, TypeError, "'guide' must be a network or a callable, got None"),
        ({"enough": 0.0}, ValueError, "enough must be positive, got 0.0"),
        ({"enough": math.nan}, ValueError, "enough must be positive, got nan"),
        ({"n_resamples": 1}, ValueError, "n_resamples must be at least 100, got 1"),
    ],
    ids=["no judge", "a list", "a class", "no guide", "enough 0", "enough NaN", "one resample"],
)
def test_bad_arguments_get_one_sentence(options, error, words) -> None:
    arguments = {"guide": Watermark(0), "judges": {"a": Watermark(1)}, "metric": right} | options
    with pytest.raises(error, match=words):
        TransferMeter(**arguments)


def test_the_guide_cannot_judge_itself() -> None:
    guide = Watermark(0)
    with pytest.raises(ValueError, match="judge 'a' is the guide itself"):
        TransferMeter(guide, {"a": guide}, right)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda logits, label: right(logits, label).float().mean(), r"one value per sample, \(8,\), got \(\)"),
        (lambda logits, label: 0.5, r"one value per sample, \(8,\), got float"),
        (lambda logits, label: logits[:, 0] * math.nan, "not finite for 8 of 8 samples"),
    ],
    ids=["averaged", "a number", "NaN"],
)
def test_a_bad_metric_gets_one_sentence(metric, words) -> None:
    baseline, label = images(8)
    meter = TransferMeter(Watermark(0), {"a": Watermark(1)}, metric)
    with pytest.raises(InputError, match=words):
        meter.update(baseline, baseline, label)


def test_images_that_do_not_belong_together_are_refused() -> None:
    baseline, label = images(8)
    with pytest.raises(InputError, match=r"x_hat \(8, 1, 2, 2\) and baseline \(4, 1, 2, 2\) differ"):
        meter_of().update(baseline, baseline[:4], label)
    with pytest.raises(InputError, match="x_hat holds 8 samples but group has 2 entries"):
        meter_of().update(baseline, baseline, label, group=["p", "q"])
    with pytest.raises(InputError, match="x_hat must be a tensor"):
        meter_of().update(baseline.numpy(), baseline, label)
