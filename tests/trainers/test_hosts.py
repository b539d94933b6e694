"""Trainers that live in a project of their own: the pieces around them that need data or an account are stand-ins."""

from __future__ import annotations

import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.trainers.recipes import recipes

RECIPES = recipes()
both_sides = pytest.mark.parametrize("mark", ["-", "+"], ids=["before", "after"])


class Registry(dict[str, Any]):
    """What BasicSR's registry does for ``LOSS_REGISTRY.register()`` and ``build_loss``.

    The package itself does not import beside a current torchvision (``transforms.functional_tensor`` is gone).
    """

    def register(self) -> Any:
        return lambda made: self.setdefault(made.__name__, made)

    def build(self, options: dict[str, Any]) -> Any:
        options = dict(options)
        return self[options.pop("type")](**options)


@pytest.fixture
def basicsr(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()

    @registry.register()
    class L1Loss(nn.Module):
        def __init__(self, loss_weight: float) -> None:
            super().__init__()
            self.loss_weight = loss_weight

        def forward(self, pred: Tensor, target: Tensor) -> Tensor:
            return self.loss_weight * nn.functional.l1_loss(pred, target)

    names = {"losses": {"build_loss": registry.build}, "utils": {}, "utils.registry": {"LOSS_REGISTRY": registry}}
    monkeypatch.setitem(sys.modules, "basicsr", types.ModuleType("basicsr"))
    for name, contents in names.items():
        module = types.ModuleType(f"basicsr.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"basicsr.{name}", module)


@pytest.mark.usefixtures("basicsr")
@both_sides
def test_a_list_of_losses_with_types_and_weights(mark: str) -> None:
    recipe = RECIPES["BasicSR and its descendants"]
    start, names = recipe.run(""), recipe.run(mark)
    assert len(names["losses"]) == {"-": 1, "+": 2}[mark]
    assert not torch.equal(start["denoiser"].weight, names["denoiser"].weight)
    if mark == "+":
        assert names["losses"][1].weights == {"task_consistency_loss": 0.1}


class Pairs(Dataset[dict[str, Tensor]]):
    """A few images in place of the Mayo data."""

    def __init__(self, phase: str, args: Namespace) -> None:
        self.weights = [1.0] * 4

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        y = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"x": y + 0.1, "y": y}

    def denormalize(self, x: Any) -> Any:
        return x


@both_sides
def test_the_ldct_benchmark_trains(mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = types.SimpleNamespace(dir=str(tmp_path), name="run")
    account = types.SimpleNamespace(run=run, log=lambda *a, **k: None, Image=lambda *a, **k: None)
    monkeypatch.setitem(sys.modules, "wandb", account)
    base = pytest.importorskip("ldctbench.methods.base", exc_type=ImportError)
    monkeypatch.setattr(base, "wandb", account)
    monkeypatch.setattr(base, "LDCTMayo", Pairs)
    names = RECIPES["LDCT benchmark"].run(mark)
    args = Namespace(
        mbs=2, iterations_before_val=2, max_iterations=2, num_workers=0, cuda=False, devices=0, seed=0, valsamples=0
    )
    vars(args).update(optimizer="adam", lr=1e-3, adam_b1=0.9, adam_b2=0.999, patchsize=16, data_norm="minmax")
    trainer = names["Trainer"](args, torch.device("cpu"))
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit()
    assert trainer.iteration == 2
    assert any(not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), start, strict=True))
    assert len(list(tmp_path.glob("best_*.pt"))) == 1


@both_sides
def test_metrics_beside_the_terms_means(mark: str) -> None:
    pytest.importorskip("torchmetrics")
    names = RECIPES["TorchMetrics"].run(mark)
    found = names["metrics"].compute()
    assert set(found) == {"PeakSignalNoiseRatio", "StructuralSimilarityIndexMeasure"}
    if mark == "+":
        means = {name: float(mean.compute()) for name, mean in names["means"].items()}
        values = [
            names["loss"].breakdown(names["denoiser"](low), reference=clean, label=label).terms
            for low, clean, label in names["loader"]
        ]
        expected = {name: float(sum(value[name] for value in values)) / len(values) for name in means}
        assert means == pytest.approx(expected)


def test_a_metric_as_a_criterion_keeps_the_state_of_the_one_that_is_logged() -> None:
    metrics = pytest.importorskip("torchmetrics.image")
    from taskloss import Fidelity, LossSum

    ssim = metrics.StructuralSimilarityIndexMeasure(data_range=1.0)
    x, reference = torch.rand(2, 1, 16, 16, requires_grad=True), torch.rand(2, 1, 16, 16)
    loss = LossSum(ssim=-1 * Fidelity(ssim))
    loss(x, reference=reference).backward()
    again = loss(x, reference=reference)
    assert ssim.update_count == 0
    ssim.update(x.detach(), reference)
    torch.testing.assert_close(-again.detach(), ssim.compute())
    assert x.grad.any()
