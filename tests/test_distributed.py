"""Two processes with half the batch each take the steps that one process takes with the whole batch."""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from taskloss import (
    AdversarialLoss,
    Fidelity,
    GradientBalancer,
    GradientPenalty,
    LossSum,
    TaskOrientedLoss,
    WassersteinCritic,
    WeightClipping,
    distributed,
)
from tests.properties import segmenter

N_PROCESSES = 2
N_STEPS = 3
BATCH = 4
PATIENCE_S = 180  # a deadlock fails; it never hangs
RTOL, ATOL = 1e-8, 1e-12  # everything is float64: only the order of additions differs

GAMES = {
    f"{constraint}-{how}": (constraint, how)
    for constraint in ("clipping", "penalty")
    for how in ("total-backward", "balanced", "balanced-surrogate")
}
Record = dict[str, Any]

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def play(
    constraint: str,
    how: str,
    rank: int,
    n_processes: int,
    *,
    unlabelled_rank: int | None = None,
    wrapped: bool = True,
) -> Record:
    """A few steps of the whole game on this process's part of every batch; denoisers start equal, critics do not."""
    torch.manual_seed(0)
    denoiser = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1)).double()
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(36, 1))
    draws = torch.Generator()
    keep = WeightClipping(0.1) if constraint == "clipping" else GradientPenalty(10.0, generator=draws)
    critic = WassersteinCritic(network=network, constraint=keep).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(rank)  # the first step shares the first process's weights
    loss = LossSum(
        adv=0.3 * AdversarialLoss(critic),
        task=TaskOrientedLoss(segmenter(), nn.CrossEntropyLoss()),
        mse=0.5 * Fidelity(nn.MSELoss()),
    ).double()
    balancer = GradientBalancer(loss, shares={"adv": 1.0, "task": 2.0, "mse": 1.0}, decay=0.9)
    model = nn.parallel.DistributedDataParallel(denoiser) if n_processes > 1 and wrapped else denoiser
    opt_g = torch.optim.SGD(denoiser.parameters(), lr=0.05)
    opt_d = torch.optim.SGD(critic.parameters(), lr=0.05)
    n = BATCH // n_processes
    mine = slice(rank * n, (rank + 1) * n)
    record: Record = {"gradients": [], "critic": [], "weights": [], "critic_gradients": []}
    for step in range(N_STEPS):
        torch.manual_seed(10 + step)
        reference = torch.rand(BATCH, 1, 8, 8).double()
        low = (reference + 0.3 * torch.randn_like(reference))[mine]
        label: Any = (reference[:, 0] > 0.5).long()[mine]
        reference = reference[mine]
        if rank == unlabelled_rank:
            label = [None] * n
        draws.manual_seed(step)
        torch.rand(rank * n, generator=draws)  # so that every sample gets the alpha that it has in the whole batch
        x_hat = model(low)
        critic.step(opt_d, x_hat.detach(), reference)
        record["critic"].append(flat(critic.parameters()))
        record["critic_gradients"].append(flat(p.grad for p in critic.parameters()))
        opt_g.zero_grad()
        if how == "total-backward":
            value = loss.breakdown(x_hat, reference=reference, label=label)
            value.total.backward()
        else:
            surrogate = torch.Tensor.backward if how == "balanced-surrogate" else None
            value = balancer.backward(x_hat, reference=reference, label=label, backward=surrogate)
        record["weights"].append(dict(value.weights))
        record["gradients"].append(flat(p.grad for p in denoiser.parameters()))
        opt_g.step()
    record["norms"] = balancer.norms()
    return record


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def work(rank: int, folder: str) -> None:
    """What each process does: join the others, play every game, and leave a record."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=(Path(folder) / "rendezvous").as_uri(),
            rank=rank,
            world_size=N_PROCESSES,
            timeout=datetime.timedelta(seconds=PATIENCE_S / 2),
        )
        warnings.simplefilter("error")  # no word about denoisers that are one
        records = {name: play(*game, rank, N_PROCESSES) for name, game in GAMES.items()}
        records["unlabelled"] = play("clipping", "balanced", rank, N_PROCESSES, unlabelled_rank=1)
        for how in ("total-backward", "balanced"):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                records[f"drift-{how}"] = play("clipping", how, rank, N_PROCESSES, wrapped=False)
            records[f"drift-{how}"]["told"] = [str(warning.message) for warning in told]
        torch.save(records, Path(folder) / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Record]]:
    """The records of two processes that share every batch."""
    folder = tmp_path_factory.mktemp("two-processes")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder)), daemon=True) for rank in range(N_PROCESSES)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
    assert not stuck, f"{len(stuck)} of {N_PROCESSES} processes hung\n{errors}"
    assert all(process.exitcode == 0 for process in processes), errors or [p.exitcode for p in processes]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(N_PROCESSES)]


@pytest.fixture(scope="module")
def one() -> dict[str, Record]:
    """The records of one process that has the whole batch."""
    return {name: play(*game, 0, 1) for name, game in GAMES.items()}


every_game = pytest.mark.parametrize("game", GAMES)


@every_game
@pytest.mark.parametrize("what", ["gradients", "critic_gradients", "critic", "weights", "norms"])
def test_two_processes_have_what_one_process_has(
    two: list[dict[str, Record]], one: dict[str, Record], game: str, what: str
) -> None:
    expected = one[game][what]
    for records in two:
        torch.testing.assert_close(records[game][what], expected, rtol=RTOL, atol=ATOL)
    assert what == "norms" or len(expected) == N_STEPS


@every_game
def test_the_game_moves(one: dict[str, Record], game: str) -> None:
    """Else the comparisons above would be of nothing with nothing."""
    for what in ("gradients", "critic", "critic_gradients"):
        first, *_, last = one[game][what]
        assert first.any()
        assert not torch.allclose(first, last, rtol=1e-3)


@pytest.mark.parametrize("what", ["gradients", "critic", "weights", "norms"])
def test_a_process_without_labels_stays_in_step_with_the_others(two: list[dict[str, Record]], what: str) -> None:
    first, second = (records["unlabelled"][what] for records in two)
    torch.testing.assert_close(first, second, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(("how", "who"), [("total-backward", "wasserstein_critic"), ("balanced", "gradient_balancer")])
def test_denoisers_that_drift_apart_are_told_once_on_every_process(
    two: list[dict[str, Record]], how: str, who: str
) -> None:
    first, second = (records[f"drift-{how}"] for records in two)
    assert not torch.equal(first["gradients"][-1], second["gradients"][-1])
    for record in (first, second):
        (told,) = record["told"]
        assert told.startswith(f"{who}: the denoiser's weights differ between the processes")
        assert "self.manual_backward(loss)" in told


def test_replicas_are_compared_before_the_second_third_fourth_and_eighth_step(monkeypatch) -> None:
    looked: list[int] = []
    check = distributed.ReplicaCheck()
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda sums, op: looked.append(check._calls))
    for _ in range(9):
        check.compare("here", torch.device("cpu"))
    assert looked == [2, 3, 4, 8]
