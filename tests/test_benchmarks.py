"""The benchmarks run, and compare things that are equal."""

import pytest
import torch

from benchmarks import step


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_step_beside_the_same_lines_by_hand(device, capsys) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    assert step.main(["--device", device, "--size", "8", "16", "16", "--rounds", "2"]) > 0
    assert "ratio of medians" in capsys.readouterr().out
