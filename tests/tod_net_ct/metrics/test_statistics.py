"""Statistics on known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from examples.tod_net_ct.metrics import holm, mean_and_sd, paired, paired_over_seeds


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_leaves_out_what_was_not_tested() -> None:
    adjusted = holm([0.02, math.nan, 0.03])
    assert adjusted[::2] == pytest.approx([0.04, 0.04]) and math.isnan(adjusted[1])


def test_paired_leaves_out_cases_that_were_not_measured() -> None:
    gap = paired([1.0, 5.0, 3.0, math.nan], [0.0, math.nan, 1.0, 2.0])
    assert gap["n"] == 2 and gap["mean"] == pytest.approx(1.5)
    assert math.isnan(paired([math.nan], [1.0])["mean"])


def test_the_same_numbers_twice_differ_by_nothing() -> None:
    gap = paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (gap["mean"], gap["low"], gap["high"], gap["t_p"], gap["wilcoxon_p"]) == (0.0, 0.0, 0.0, 1.0, 1.0)


def test_over_seeds_by_hand() -> None:
    scores = {0: ([2.0, 4.0], [1.0, 1.0]), 1: ([4.0, 8.0], [0.0, 0.0])}  # seeds' means: 2 and 6
    found = paired_over_seeds(scores)
    assert (found["mean"], found["n_seeds"], found["n_cases"], found["n_seeds_above"]) == (4.0, 2, 4, 2)
    reach = 12.706204736 * math.sqrt(8 / 2)  # t of one degree of freedom; the means' variance is 8
    assert found["by_seed_low"] == pytest.approx(4 - reach) and found["by_seed_high"] == pytest.approx(4 + reach)
    # within: variances 2 and 8, over n 1 and 4; standard error sqrt(5) / 2, 25 / 17 degrees of freedom
    from scipy import stats

    reach = stats.t.ppf(0.975, 25 / 17) * math.sqrt(5) / 2
    assert found["by_case_low"] == pytest.approx(4 - reach)


def test_over_seeds_tells_luck_of_the_seed_from_a_gain() -> None:
    """Every seed's cases agree among themselves, but the seeds do not agree: no gain, whatever the cases say."""
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 50))
    scores = {seed: (shift + noise[seed], np.zeros(50)) for seed, shift in enumerate((3.0, -1.0, 2.0, -1.5))}
    found = paired_over_seeds(scores)
    assert found["by_case_p"] < 1e-6 and found["by_seed_p"] > 0.3 and found["by_seed_low"] < 0 < found["by_seed_high"]


def test_one_seed_has_no_interval_over_seeds() -> None:
    found = paired_over_seeds({0: ([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])})
    assert math.isnan(found["by_seed_low"]) and math.isnan(found["by_seed_p"]) and found["by_case_p"] < 0.2


@pytest.mark.parametrize(("scores", "sentence_"), [({}, "at least one seed"), ({3: ([math.nan], [1.0])}, "seed 3:")])
def test_over_seeds_refuses_nothing_to_compare(scores, sentence_) -> None:
    with pytest.raises(ValueError, match=sentence_):
        paired_over_seeds(scores)


def test_mean_and_sd_of_what_was_measured() -> None:
    assert mean_and_sd([1.0, 3.0, math.nan]) == pytest.approx({"mean": 2.0, "sd": math.sqrt(2), "n": 2})
    assert mean_and_sd([math.inf])["n"] == 0
