"""The harness of the benchmarks, and the page and the comparison that are made of results alone."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, page, projection
from benchmarks.harness import Case, Options, Target

QUICK = Options(quick=True)


def result(seconds: float = 1.0, **changes: object) -> dict:
    """One case in which ours takes `seconds` where theirs takes two."""
    case = Case("case", {"ours": [seconds] * 3, "theirs": [2.0, 2.0, 2.0]}, {"ours": 10, "theirs": 20})
    case.targets = [
        Target("seconds", "ours", "theirs", at_most=0.6),
        Target("peak_bytes", "ours", "theirs", at_most=0.4),
    ]
    benchmark = {"about": "About.", "cases": [asdict(case)], "threads": 1, "rounds": 3, "seconds": 9.0, "peak_bytes": 0}
    benchmark["commit"] = "abc"
    machine = {"machine": {"device": "cpu"}, "versions": {"torch": "2"}}
    return {**machine, "benchmarks": {"step": {**benchmark, **changes}}}


def test_ratios_are_taken_round_by_round() -> None:
    case = Case("drifting", {"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 4.0, 8.0]})
    assert case.ratio(Target("seconds", "ours", "theirs")) == (0.5, 0.5, 0.5)


def test_sides_take_turns_and_the_warm_up_does_not_count() -> None:
    turns: list[str] = []
    case = harness.compare(Case("c"), {n: lambda n=n: turns.append(n) for n in ("a", "b")}, Options(rounds=3))
    assert turns[:8] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [len(samples) for samples in case.seconds.values()] == [3, 3]


def test_peak_memory_is_what_one_turn_takes() -> None:
    megabytes = {n: harness.peak_bytes(lambda n=n: torch.ones(n, 250_000).sum(), torch.device("cpu")) / 1e6
                 for n in (20, 80)}  # fmt: skip
    if min(megabytes.values()) < 0:
        pytest.skip("this system does not tell")
    assert megabytes[20] == pytest.approx(20, abs=4) and megabytes[80] == pytest.approx(80, abs=4)


def test_sides_that_differ_are_refused() -> None:
    case = Case("c")
    harness.agree(case, "a and b", {"x": torch.ones(3)}, {"x": torch.ones(3) + 1e-7}, 1e-5)
    assert case.agreement["a and b"][0] < 1e-6
    with pytest.raises(AssertionError, match="c, a and b: expected a relative difference up to 1e-05, got 0.5"):
        harness.agree(case, "a and b", torch.ones(3), torch.full((3,), 2.0), 1e-5)


def test_the_page_says_which_targets_are_met_and_why_others_are_not(tmp_path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "box.json").write_text(json.dumps(result()))
    (results / "reasons.json").write_text(json.dumps({"box": {"step": "The peak is T's."}}))
    page.write(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| step | case | time, ours / theirs | at most 0.6 | 0.5 | yes |" in text
    assert "| step | case | peak memory, ours / theirs | at most 0.4 | 0.5 | **no** |" in text
    assert "1 threads, 3 rounds, 9 s; at commit abc." in text
    assert "- step: The peak is T's." in text and "![step](page/box-step.png)" in text
    assert (tmp_path / "page" / "box-step.png").stat().st_size > 1000


def test_a_failed_benchmark_is_told_and_not_passed_over(tmp_path) -> None:
    (tmp_path / "box.json").write_text(
        json.dumps({**result(), "benchmarks": {"step": {"failed": "ended with status 1"}}})
    )
    page.write(tmp_path, tmp_path / "page.md")
    assert "| step | | | | ended with status 1 | **no** |" in (tmp_path / "page.md").read_text()


def test_a_ratio_that_grew_by_more_than_a_tenth_is_reported() -> None:
    def told(seconds: list[float]) -> list[str]:
        found = result()["benchmarks"]["step"]
        found["cases"][0]["seconds"]["ours"] = seconds
        return command.slower("step", result(1.0), found)

    assert told([1.05] * 3) == []
    assert told([1.2] * 3) == ["step, case: time, ours / theirs was 0.5, is 0.6"]
    (line,) = told([0.9, 1.2, 1.3])
    assert line == f"step, case: time, ours / theirs was 0.5, is 0.6 (0.45 to 0.65){command.OPEN}"


def test_what_is_open_is_measured_again_and_then_said_to_be_open(monkeypatch) -> None:
    runs = iter([[0.9, 1.2, 1.3], [1.2] * 9, [5.0] * 3])

    def run_apart(name: str, args: object) -> dict:
        found = result()["benchmarks"]["step"]
        seconds = next(runs)
        found["cases"][0]["seconds"] = {"ours": seconds, "theirs": [2.0] * len(seconds)}
        return found

    monkeypatch.setattr(command, "run_apart", run_apart)
    (line,) = command.compared("step", result(1.0), command.parser().parse_args([]))
    assert line.endswith("is 0.6"), "the second run settles it, and a third is not made"
    assert next(runs) == [5.0] * 3
    runs = iter([[0.9, 1.2, 1.3]] * command.MEASURED)
    (line,) = command.compared("step", result(1.0), command.parser().parse_args([]))
    assert line.endswith(command.OPEN)


@pytest.mark.parametrize(("samples", "expected"), [
    ([3.0], (3, 3, 3)), (range(5), (2, 0, 4)), (range(6), (2.5, 0, 5)), (range(15), (7, 3, 11)),
    (range(100), (49.5, 39, 60)),
])  # fmt: skip
def test_the_interval_of_a_median_is_that_of_the_binomial_distribution(samples, expected) -> None:
    assert harness.median(samples) == expected


@pytest.mark.parametrize(("found", "verdict"), [((0.9, 0.8, 1.2), "yes"), ((1.1, 1.0, 1.2), "within noise"),
                                               ((1.1, 1.01, 1.2), "no")])  # fmt: skip
def test_a_verdict_knows_the_noise(found, verdict) -> None:
    assert Target("seconds", "ours", "theirs", at_most=1.0).verdict(*found) == verdict
    turned = tuple(1 / x for x in found)
    assert Target("seconds", "ours", "theirs", at_least=1.0).verdict(*turned) == verdict


def test_the_committed_page_is_that_of_the_committed_results(tmp_path) -> None:
    if not set(page.RESULTS.glob("*.json")) - {page.REASONS}:
        pytest.skip("no results are committed")
    page.write(page.RESULTS, tmp_path / page.PAGE.name)
    assert (tmp_path / page.PAGE.name).read_text() == page.PAGE.read_text(), "stale: python -m benchmarks.page"


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.4 cannot checkpoint on the meta device")
def test_operations_are_counted_as_by_hand() -> None:
    found = projection.count(
        lambda x: torch.nn.Conv3d(1, 2, 3, padding=1, device="meta")(x), (1, 1, 4, 4, 4), weights=True
    )
    assert found["flop"] == 3 * 2 * 27 * 2 * 64  # forward, and backward to the input and to the weights
    assert found["saved"] == 4 * 64  # the input; the weights are no activations
    (case,) = projection.run(QUICK)
    assert case.values["denoiser, recomputing: TFLOP"] > 1.3 * case.values["denoiser: TFLOP"]
    assert any("cards of 24 GB" in note for note in case.notes)
