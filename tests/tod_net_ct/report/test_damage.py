"""A damaged evaluation or log is one sentence that says what to remove, whatever is in the file."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("monai")

from examples.tod_net_ct.evaluation import read_rows, read_summary, scores  # noqa: E402
from examples.tod_net_ct.report.plots import read_log  # noqa: E402

WHOLE = {"n_cases": 1, "means": {}, "comparisons": [], "focus": {}}


def file_at(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{}", b"{", b"\xff\xfe", b"[" * 100_000, json.dumps(WHOLE | {"means": []}).encode()],
    ids=["empty", "list", "null", "object", "cut", "bytes", "deep", "means"],
)
def test_a_summary_that_is_none(tmp_path, content):
    file_at(tmp_path / "evaluation" / "summary.json", content)
    words = r"summary.json: expected .*, got .*; remove the folder .*evaluation and run evaluate again$"
    with pytest.raises(ValueError, match=words):
        read_summary(tmp_path)
    file_at(tmp_path / "evaluation" / "summary.json", json.dumps(WHOLE).encode())
    assert read_summary(tmp_path) == WHOLE


@pytest.mark.parametrize(
    "content",
    [b"", b"case,dose,denoiser\n", b"a,b\n1,2\n", b"case,dose,denoiser,x\nt,low,none,many\n", b"\xff\xff", b"case\n,\n"]
    + [b"case,dose,denoiser,x\nt,low,none,1,2\n", b"case,dose,denoiser,x\nt,low\n"],
    ids=["empty", "header", "foreign", "text", "bytes", "blank", "too long", "too short"],
)
def test_cases_that_are_none(tmp_path, content):
    file_at(tmp_path / "evaluation" / "cases.csv", content)
    with pytest.raises(ValueError, match="cases.csv: expected the rows of an evaluation, got .*; remove the folder"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"step,loss\n", b"loss\n1\n", b"step\nmany\n", b"step,loss\n1,2,3\n", b"\xff", b"step,loss\n,1\n"],
    ids=["empty", "header", "no step", "text", "too long", "bytes", "blank step"],
)
def test_a_log_that_is_none(tmp_path, content):
    with pytest.raises(ValueError, match="log.csv: expected the log of a training, got .*; remove the folder"):
        read_log(file_at(tmp_path / "mse" / "log.csv", content))
    assert read_log(file_at(tmp_path / "log.csv", b"step,loss,validation/mse\n1,2,\n")) == [{"step": 1, "loss": 2}]
    assert read_log(tmp_path / "none.csv") == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[1]", b"\xff", b"[{}]"])
def test_a_damaged_part_of_a_killed_evaluation_is_measured_again(tmp_path, content):
    assert scores._kept(file_at(tmp_path / "test-000.json", content)) is None
    assert scores._kept(file_at(tmp_path / "test-000.json", b'[{"case": "test-000"}]')) == [{"case": "test-000"}]
