"""The benchmarks run, and compare things that are equal."""

import importlib
import math

import pytest
import torch

from benchmarks.harness import Case, Options, agree

QUICK = ("step", "checkpointing", "sharing", "balancing", "maps", "critic", "limit")
SLOW = ("consistency", "scaling", "start")  # they import every peer, or start other processes
LIBRARY = (*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))


@pytest.mark.filterwarnings("default")  # the peers' own
@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_benchmark_of_the_library_runs_and_its_sides_agree(name, device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    if name == "balancing" and not hasattr(pytest.importorskip("torchjd.autojac"), "jac_to_grad"):
        pytest.skip("torchjd's way at the parameters needs its jac_to_grad, which came after the lowest release")
    cases = importlib.import_module(f"benchmarks.{name}").run(Options(torch.device(device), quick=True, rounds=2))
    assert len({case.name for case in cases}) == len(cases) > 0
    for case in cases:
        assert case.gaps or case.seconds or case.curve, case.name
        assert all(worst <= tolerance for worst, tolerance in case.agreement.values())
        assert all(math.isfinite(value) for value in case.values.values())
        for target in case.targets:
            if target.quantity != "peak_bytes":  # at such sizes the system's pages hide it
                assert math.isfinite(case.ratio(target)[0]), (case.name, target)
    gaps = [gap for case in cases for gap in case.gaps]
    if gaps:
        pytest.skip("; ".join(gaps))


@pytest.mark.parametrize("theirs", [torch.zeros(2), torch.tensor([1.0, math.nan]), torch.ones(1)])
def test_sides_that_differ_are_not_timed(theirs) -> None:
    with pytest.raises(AssertionError, match="expected"):
        agree(Case("a"), "ours and theirs", torch.ones(2), theirs, 1e-3)
