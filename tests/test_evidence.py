"""The page of evidence: its statistics by hand and beside SciPy, and that nothing on it is stale."""

import csv
import math
from statistics import fmean

import pytest

pytest.importorskip("scipy")

import numpy as np
from scipy import stats

from benchmarks import effects, evidence
from benchmarks.effects import Row


def rows(gains: dict[str, list[float]], setting: str = "task", unit: str = "", **where: str) -> list[Row]:
    """A baseline at 50 and a setting above it by seed, for a guide ``g`` and judges ``a`` and ``b``."""
    place = {"world": "cifar10", "degradation": "half", "stage": "confirming"} | where
    found = []
    for network, values in gains.items():
        role = "guide" if network == "g" else "judge"
        for seed, gain in enumerate(values):
            base = 50.0 + seed
            for name, value, part in (("mse", base, "judge"), (setting, base + gain, role)):
                what = {"setting": name, "network": network, "role": part, "metric": "top1", "value": value}
                found.append(Row(seed=str(seed), unit=unit, **what, **place))
    return found


GAINS = {"g": [10.0, 12.0, 11.0, 13.0, 9.0], "a": [8.0, 9.0, 7.0, 8.0, 8.0], "b": [6.0, 7.0, 5.0, 6.0, 6.0]}


def test_gains_are_paired_by_seed() -> None:
    (one,) = effects.comparisons(rows(GAINS))
    assert (one.guide.mean, one.guide.n, one.unseen.mean) == (11, 5, 7)
    reach = stats.t.ppf(0.975, 4) * stats.sem([10, 12, 11, 13, 9])
    assert one.guide.low == pytest.approx(11 - reach) and one.guide.high == pytest.approx(11 + reach)
    assert one.unseen.p == pytest.approx(stats.ttest_1samp([7, 8, 6, 7, 7], 0).pvalue)
    assert one.transfer.mean == pytest.approx(7 / 11)


def test_patients_are_the_unit_where_there_are_patients() -> None:
    both = rows(GAINS, unit="p") + rows({name: [v + 2 for v in values] for name, values in GAINS.items()}, unit="q")
    (one,) = effects.comparisons(both)
    assert (one.guide.n, one.guide.mean) == (2, 12)  # five seeds of two patients


def test_shares_of_the_room() -> None:
    place = {
        "world": "cifar10",
        "degradation": "half",
        "stage": "confirming",
        "seed": "0",
        "unit": "",
        "metric": "top1",
    }
    references = [
        *(Row(setting="clean", network=n, role="judge", value=72.0, **place) for n in "gab"),
        Row(setting="oracle", network="g", role="judge", value=74.0, **place),
    ]
    (one,) = effects.comparisons(rows(GAINS) + references)
    assert one.to_clean == pytest.approx(7 / 20)  # the judges stand at 52 with MSE
    assert one.to_oracle == pytest.approx(11 / 22)
    second = [row._replace(network="h") for row in rows({"g": [1.0] * 5})]  # a guide that has no oracle
    (both,) = effects.comparisons(rows(GAINS) + second + references)
    assert both.guide.mean == pytest.approx((11 + 1) / 2) and both.to_oracle == pytest.approx(11 / 22)


def test_a_share_of_the_room_is_that_of_the_people_who_were_measured() -> None:
    one_patient = rows(GAINS, unit="p")
    other = [row._replace(unit="q", value=row.value - 30) for row in rows(GAINS) if row.setting == "mse"]
    clean = [row._replace(setting="clean", seed="", value=72.0) for row in one_patient[:1] + one_patient[10:11]]
    (one,) = effects.comparisons([*one_patient, *other, *[row._replace(network=n) for row in clean for n in "ab"]])
    assert one.to_clean == pytest.approx(7 / 20)


def test_fieller_covers_what_it_should() -> None:
    draws = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        below = draws.normal(10, 1, 5)
        above = 0.7 * below + draws.normal(0, 0.7, 5)
        found = effects.ratio(list(above), list(below))
        covered += found.low <= 0.7 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_a_ratio_over_what_may_be_zero_has_no_bounds() -> None:
    found = effects.ratio([1.0, 2.0, 3.0], [-1.0, 2.0, 1.0])
    assert math.isnan(found.low) and math.isnan(found.high)


def test_holm_by_hand() -> None:
    assert effects.holm([0.01, 0.04, math.nan, 0.03])[:2] == [0.03, 0.06]
    assert effects.holm([0.01, 0.04, math.nan, 0.03])[3] == 0.06
    assert effects.holm([0.9, 0.8]) == [1.0, 1.0]


def test_only_confirming_comparisons_of_a_world_are_corrected_together() -> None:
    several = rows(GAINS) + rows(GAINS, degradation="jpeg10") + rows(GAINS, world="imagenet")
    found = effects.comparisons(several + rows(GAINS, stage="exploration", setting="late"))
    p = found[0].unseen.p
    corrected = {(one.world, one.degradation, one.stage): one.holm for one in found}
    assert corrected["cifar10", "half", "confirming"] == corrected["cifar10", "jpeg10", "confirming"] == 2 * p
    assert corrected["imagenet", "half", "confirming"] == p
    assert math.isnan(corrected["cifar10", "half", "exploration"])


def test_on_ct_guide_and_judges_are_one_family() -> None:
    found = effects.comparisons(rows(GAINS, world="ct_liver") + rows(GAINS, world="ct_liver", degradation="jpeg10"))
    p = sorted([*(one.guide.p for one in found), *(one.unseen.p for one in found)])
    for one in found:
        for raw, corrected in ((one.guide.p, one.holm_guide), (one.unseen.p, one.holm)):
            assert raw < corrected <= 4 * raw and corrected in effects.holm(p)
    (alone,) = effects.comparisons(rows(GAINS))
    assert alone.holm == alone.unseen.p and math.isnan(alone.holm_guide)


def test_the_first_sentences_speak_of_patients_where_there_are_any() -> None:
    one = evidence.blocks(rows(GAINS, world="ct_liver"))["sentences"]
    assert "on patients they change by +7.0 [" in one and "the guide changes by +11.0 [" in one
    assert "1 of 1 significant" in one
    lost = {name: [-gain for gain in gains] for name, gains in GAINS.items()}
    both = evidence.blocks(rows(GAINS, world="ct_liver") + rows(lost, setting="late", world="ct_liver"))["sentences"]
    assert "on patients they change from -7.0 [" in both and "to +7.0 [" in both  # the worst is told with the best
    assert "patients" not in evidence.blocks(rows(GAINS))["sentences"]


def test_a_change_is_compared_with_the_same_change_without_the_task() -> None:
    there = ["mse", "mse_wgan", "mse_wgan@balance=false", "tod_net"]
    assert effects._baseline_of("tod_net@balance=false", there) == "mse_wgan@balance=false"
    assert effects._baseline_of("tod_net@share_task=8", there) == effects._baseline_of("tod_net", there) == "mse_wgan"
    assert effects._baseline_of("late", there) == "mse"


def test_with_fewer_than_five_seeds_nothing_is_confirmed() -> None:
    few = rows({name: values[:4] for name, values in GAINS.items()})
    (one,) = effects.comparisons(few)
    assert one.stage == "exploration" and math.isnan(one.holm)
    assert evidence.blocks(few)["sentences"].startswith("No confirming run is complete yet")


def test_the_pilot_is_no_result() -> None:
    assert effects.comparisons(rows(GAINS, stage="pilot")) == []


def test_the_page_says_what_the_rows_say() -> None:
    parts = evidence.blocks(rows(GAINS))
    assert "+11.0 [" in parts["effects"] and "0.64 [" in parts["effects"]
    assert "1 of 1 confirming comparisons" in parts["sentences"]
    assert "| MSE | 5 | 52.0 |" in parts["levels"]
    page = evidence.filled("a\n<!-- evidence:sentences -->\nold\n<!-- /evidence -->\nz", parts)
    assert "old" not in page and page.startswith("a\n") and page.endswith("\nz")


@pytest.mark.parametrize("page", [evidence.PAGE, evidence.README], ids=["evidence.md", "README.md"])
def test_the_page_is_not_stale(page) -> None:
    text = page.read_text()
    assert evidence.filled(text, evidence.blocks(effects.read(evidence.RESULTS))) == text, (
        "run python -m benchmarks.evidence"
    )


def test_the_alarms_are_quoted_from_what_was_printed(tmp_path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "output.txt").write_text("a table\nthe transfer meter on the last seed: low transfer: no\n")
    assert evidence.blocks([], tmp_path)["alarms"] == "- **digits** (the last seed): low transfer: no."


def test_the_figure_has_a_mark_for_each_comparison(tmp_path, monkeypatch) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    marks = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **_: marks.append((x, y)))
    monkeypatch.setattr(Figure, "legend", lambda self, **_: None)
    evidence.draw(effects.comparisons(rows(GAINS) + rows(GAINS, degradation="jpeg10")), tmp_path / "figure.png")
    assert marks == [(11, 7), (11, 7)] and (tmp_path / "figure.png").stat().st_size > 5000


# --- what docs/evidence.md says in words ------------------------------------------------------------------------------


def measured(path: str) -> list[dict[str, str]]:
    with (evidence.RESULTS / "ct" / path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_no_network_finds_the_tumours_even_at_normal_dose() -> None:
    rows = measured("lits_tumour/measurements/heavy/fold-A/none.csv")
    found = [r for r in rows if (r["input"], r["metric"]) == ("normal", "dice_tumour")]
    means = {n: fmean(float(r["value"]) for r in found if r["network"] == n) for n in {r["network"] for r in found}}
    assert len(means) == 4 and round(max(means.values())) == 2  # "2 % and less"


def test_the_papers_own_optimisation_drifts_where_the_balanced_one_does_not() -> None:
    own = evidence.PAPERS_OWN.replace("=", "_").replace(";", "-")
    folder = "lits_liver_factors/measurements/heavy/fold-A/seed-0"
    kinds = {"balanced": "mse_wgan", "own": f"mse_wgan-{own}", "own, task": f"tod_net-{own}"}
    tables = {kind: measured(f"{folder}/{name}.csv") for kind, name in kinds.items()}

    def organ(kind: str) -> float:
        rows = [r for r in tables[kind] if (r["input"], r["metric"]) == ("low", "roi_rmse_hu")]
        people = {r["patient"] for r in rows}
        return fmean(fmean(float(r["value"]) for r in rows if r["patient"] == p) for p in people)

    assert 4 / 3 < organ("own") / organ("balanced") < 3 / 2  # "larger by a good third"
    assert organ("own, task") / organ("balanced") == pytest.approx(2, abs=0.1)  # "twice"
    curves = {
        kind: [float(r["value"]) for r in rows if r["metric"].startswith("validation_rmse_hu_at_")]
        for kind, rows in tables.items()
    }
    assert len(curves["own"]) == 3 and curves["own"] == sorted(curves["own"])
    assert curves["balanced"] == sorted(curves["balanced"], reverse=True)


def test_the_words_of_the_page_are_those_of_its_tables() -> None:
    found = {
        (one.degradation, one.setting): one
        for one in effects.comparisons(effects.read(evidence.RESULTS))
        if one.stage == "confirming"
    }
    equal, more = found["half", "guides_together"], found["half", "together_more_task"]
    assert equal.transfer.mean >= 0.7 and equal.holm < 0.05  # "carry over as much as was asked for"
    assert equal.image["psnr_db"].high > 0 and equal.clean.low >= 0  # "no loss of PSNR and without hurting clean input"
    assert 1 / 3 < equal.to_clean < 0.4 and more.to_clean > 0.5  # "a good third of the room", "half of it"
    assert more.image["psnr_db"].high < 0 and round(more.image["psnr_db"].mean, 1) == -0.1  # "a tenth of a decibel"
    assert 0.5 < found["half", "late"].transfer.mean < 0.6  # "little more than half of the gain"
    assert found["jpeg10", "late"].to_oracle == pytest.approx(0.1, abs=0.02)  # "a tenth of its room"
    one, two = found["heavy", "tod_net"], found["heavy", "tod_net@guides=unet+res_unet"]
    assert min(two.guide.mean, two.unseen.mean) > 0 > max(two.guide.low, two.unseen.low)  # "the intervals hold zero"
    assert two.transfer.mean == pytest.approx(1 / 3, abs=0.05)  # "a third of the guides' gain"
    assert two.image["roi_rmse_hu"].mean < 0 < one.image["roi_rmse_hu"].low  # "falls a little"; "grows surely"
    assert two.image["psnr_db"].high < 0  # "PSNR of the whole image falls"
    assert all(c.holm > 0.05 for c in found.values() if c.world == "ct_liver")
