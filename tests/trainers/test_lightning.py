"""LightningModules: precision, checkpoints, configuration files, and two processes that stay one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from taskloss import Fidelity, LossSum
from tests.trainers.recipes import recipes

RECIPES = recipes()
GAN = RECIPES["Lightning, adversarial"]
L = pytest.importorskip("lightning")


def fit(module: Any, loader: DataLoader, path: Path, **options: Any) -> Any:
    options = {"logger": False, "enable_checkpointing": False, "max_steps": 4} | options
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        **options,
    )
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("mark", ["-", "+"], ids=["before", "after"])
def test_automatic_optimisation(mark: str, precision: Any, tmp_path: Path) -> None:
    names = RECIPES["Lightning"].run(mark)
    module = names["Restorer"]()
    start = module.denoiser.weight.detach().clone()
    trainer = fit(module, names["loader"], tmp_path, precision=precision)
    assert not torch.equal(module.denoiser.weight.float(), start)
    logged = {"-": {"train/mse"}, "+": {"train/task", "train/mse", "train/total"}}
    assert set(trainer.logged_metrics) >= logged[mark]
    assert not [name for name in module.state_dict() if not name.startswith("denoiser.")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("mark", ["-", "+"], ids=["before", "after"])
def test_adversarial(mark: str, precision: Any, tmp_path: Path) -> None:
    names = GAN.run(mark)
    module = names["Adversarial"]()
    parts = {"denoiser": module.denoiser, "critic": module.critic}
    start = {name: [p.detach().clone() for p in part.parameters()] for name, part in parts.items()}
    fit(module, names["loader"], tmp_path, precision=precision)
    for name, part in parts.items():
        weights = list(part.parameters())
        assert all(torch.isfinite(p).all() for p in weights)
        assert any(not torch.equal(p.float(), q) for p, q in zip(weights, start[name], strict=True)), name


def test_a_checkpoint_loads_with_weights_only_and_holds_no_task_network(tmp_path: Path) -> None:
    names = RECIPES["Lightning"].run()
    module = names["Restorer"](lr=0.02)
    trainer = fit(module, names["loader"], tmp_path)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == {"denoiser.weight", "denoiser.bias"}
    again = names["Restorer"].load_from_checkpoint(path, weights_only=True)
    assert again.hparams.lr == 0.02
    assert torch.equal(again.denoiser.weight, module.denoiser.weight)
    batch = next(iter(names["loader"]))
    x_hat = again.denoiser(batch[0])
    value = again.loss(x_hat, reference=batch[1], label=batch[2])
    assert torch.equal(value, module.loss(x_hat, reference=batch[1], label=batch[2]))


def test_a_loss_handed_in_is_left_out_of_the_hyper_parameters(tmp_path: Path) -> None:
    class Given(L.LightningModule):
        def __init__(self, loss: nn.Module, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["loss"])
            self.denoiser, self.loss = nn.Conv2d(1, 1, 3, padding=1), loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.denoiser.parameters(), lr=self.hparams.lr)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.loss(self.denoiser(batch[0]), batch[1])

    loss = LossSum(mse=Fidelity(nn.MSELoss()))
    trainer = fit(Given(loss), RECIPES["Lightning"].run("")["loader"], tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Given.load_from_checkpoint(tmp_path / "last.ckpt", loss=loss, weights_only=True)
    assert again.loss is loss


@pytest.mark.parametrize("mark", ["-", "+"], ids=["before", "after"])
def test_the_loss_is_built_from_yaml_by_the_command_line(mark: str, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    names = RECIPES["LightningCLI"].run(mark)
    import yaml

    options = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)}
    cli = names["LightningCLI"](
        names["Configured"],
        args={"model": yaml.safe_load(names["config"]), "trainer": options},
        run=False,
        save_config_callback=None,
    )
    if mark == "+":
        assert cli.model.loss.weights == {"mse": 0.5}
    cli.trainer.fit(cli.model, names["loader"])
    assert cli.trainer.global_step == 2


def weights_of_two_processes(module: Any, loader: DataLoader, path: Path) -> list[torch.Tensor]:
    """Train on two processes, forked from this one; the denoiser's weights on each."""

    class Keep(L.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            flat = torch.cat([p.detach().flatten() for p in module.denoiser.parameters()])
            torch.save(flat, path / f"{trainer.global_rank}.pt")

    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", find_unused_parameters=True)
    fit(module, loader, path, strategy=strategy, devices=2, callbacks=[Keep()], max_steps=6)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("mark", ["-", "+"], ids=["before", "after"])
def test_two_processes_keep_one_denoiser(mark: str, tmp_path: Path) -> None:
    names = GAN.run(mark)
    first, second = weights_of_two_processes(names["Adversarial"](), names["loader"], tmp_path)
    assert torch.equal(first, second)


def test_two_processes_that_drift_apart_are_told(tmp_path: Path) -> None:
    source = GAN.source("+")
    plain = source.replace("self.manual_backward(loss_g)", "loss_g.backward()")
    assert plain != source
    names = GAN.run("+")
    exec(compile(plain, "plain backward", "exec"), names)

    class Told(names["Adversarial"]):
        def on_train_end(self) -> None:
            (tmp_path / f"told-{self.global_rank}").write_text("\n".join(str(w.message) for w in caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = weights_of_two_processes(Told(), names["loader"], tmp_path)
    assert not torch.equal(first, second)
    for rank in range(2):
        told = (tmp_path / f"told-{rank}").read_text()
        assert told.count("the denoiser's weights differ between the processes") == 1
