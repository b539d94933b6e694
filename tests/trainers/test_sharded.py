"""FSDP2 on the denoiser and the critic: two processes that hold half the weights each take one process's steps."""

from __future__ import annotations

import faulthandler
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from taskloss import AdversarialLoss, Fidelity, GradientPenalty, InputError, LossSum, WassersteinCritic, WeightClipping

PATIENCE_S = 150


def flat(module: nn.Module) -> Tensor:
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters())
    return torch.cat([w.detach().flatten() for w in whole])


def play(rank: int, n_processes: int) -> dict[str, Any]:
    """Three steps of the game on this process's part of every batch."""
    torch.manual_seed(0)
    denoiser = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(36, 1))
    critic = WassersteinCritic(network=network, constraint=WeightClipping(0.1))
    loss = LossSum(adv=AdversarialLoss(critic), mse=Fidelity(nn.MSELoss()))
    if n_processes > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (n_processes,))
        fully_shard(denoiser, mesh=mesh)
        fully_shard(network, mesh=mesh)
    opt_g = torch.optim.SGD(denoiser.parameters(), lr=0.05)
    opt_d = torch.optim.SGD(network.parameters(), lr=0.05)
    n = 4 // n_processes
    for step in range(3):
        torch.manual_seed(10 + step)
        reference = torch.rand(4, 1, 8, 8)
        low = reference + 0.3 * torch.randn_like(reference)
        low, reference = (x[rank * n : (rank + 1) * n] for x in (low, reference))
        x_hat = denoiser(low)
        critic.step(opt_d, x_hat.detach(), reference)
        opt_d.zero_grad()
        opt_g.zero_grad()
        loss(x_hat, reference=reference).backward()
        untouched = all(p.grad is None for p in network.parameters())
        opt_g.step()
    record = {"denoiser": flat(denoiser), "critic": flat(network), "untouched": untouched}
    if n_processes > 1:
        penalised = WassersteinCritic(network=network, constraint=GradientPenalty(10.0))
        with pytest.raises(InputError, match="the critic is sharded, and fully_shard frees"):
            penalised.step(opt_d, x_hat.detach(), reference)
    return record


def work(rank: int, folder: str) -> None:
    """What each process does: join the other, play, and leave a record."""
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
    torch.set_num_threads(1)
    address = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(play(rank, 2), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_sharded_game_is_the_whole_game(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.fsdp", reason="fully_shard came with torch 2.6")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("fully_shard came with torch 2.6")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    one = play(0, 1)
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert two["untouched"], "the denoiser's step left a gradient in the critic"
        for part in ("denoiser", "critic"):
            torch.testing.assert_close(two[part], one[part], rtol=1e-4, atol=1e-6)
