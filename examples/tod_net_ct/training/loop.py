"""What all trainings share: the machine, the order of the batches, the point to resume from, and the logs."""

from __future__ import annotations

import csv
import io
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..run import Settings, load_tensors, save_tensors, write_text
from ..scans import Cases


def machine(settings: Settings) -> Any:
    """Lightning Fabric, launched: CPU, one GPU, or many processes by `torchrun` or by `devices`."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    devices, nodes = settings.devices, settings.nodes
    if torch.distributed.is_torchelastic_launched():  # torchrun has said how many, and where
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices, nodes = str(local), int(os.environ["WORLD_SIZE"]) // local
    n_devices = max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)
    fabric = Fabric(
        accelerator=settings.accelerator,
        devices="auto" if devices == "auto" else n_devices,
        num_nodes=nodes,
        precision=settings.precision,  # type: ignore[arg-type]
        # Simulating a whole archive on the first process may take days; the others wait at a barrier.
        strategy=DDPStrategy(timeout=timedelta(days=7)) if n_devices * nodes > 1 else "auto",
    )
    fabric.launch()
    # Harmless: a weight with one input channel has the same layout in both memory formats, under different strides.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return fabric


def batches(cases: Cases, batch: int, settings: Settings, fabric: Any, start: int = 0) -> Iterator[list[torch.Tensor]]:
    """Batches for ever on this process's device: shuffled anew each epoch by a seeded generator, from step `start`.

    `batch` counts the samples of all processes together; each takes its part of the same order.
    """
    if batch % fabric.world_size:
        raise ValueError(
            f"batch: {batch} samples do not divide among {fabric.world_size} processes; "
            f"--set batch={-(-batch // fabric.world_size) * fabric.world_size}"
        )

    def indices() -> Iterator[list[Any]]:
        generator = torch.Generator().manual_seed(settings.seed)
        places = torch.Generator().manual_seed(settings.seed)
        waiting: list[Any] = []
        for step in itertools.count():
            while len(waiting) < batch:
                waiting += torch.randperm(len(cases), generator=generator).tolist()
            drawn = waiting[:batch]
            if any(settings.patch):
                drawn = list(zip(drawn, torch.rand(batch, 4, generator=places).tolist(), strict=True))
            if step >= start:
                yield drawn[fabric.global_rank :: fabric.world_size]
            waiting = waiting[batch:]

    own = torch.Generator()  # else the loader draws from torch's, and a resumed training draws otherwise
    items = Crops(cases, settings.patch) if any(settings.patch) else cases
    loader = DataLoader(items, batch_sampler=indices(), num_workers=settings.workers, generator=own)
    for tensors in loader:
        yield [fabric.to_device(tensor) for tensor in tensors]


class Crops(Dataset[tuple[torch.Tensor, ...]]):
    """Patches of training items, found by an item's number and four draws from [0, 1): whether the patch is centred on
    a voxel of the organ (below a half, where the item shows it), which voxel, and else the place in the plane.

    Raises:
        ValueError: a side of the patch is not positive or longer than the items'.
    """

    def __init__(self, cases: Cases, patch: tuple[int, int, int]) -> None:
        if not all(0 < side <= whole for side, whole in zip(patch, cases.shape, strict=True)):
            raise ValueError(f"patch: expected sides from 1 to shape's {cases.shape}, got {patch}; --set patch=0,0,0")
        self.cases, self.patch = cases, patch

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, Sequence[float]]) -> tuple[torch.Tensor, ...]:
        number, (at_organ, *place) = key
        volumes = self.cases[number]
        organ = volumes[-1][0].nonzero() if at_organ < 0.5 else torch.empty(0, 3)
        shape = volumes[-1].shape[1:]
        centre = [share * side for share, side in zip(place, shape, strict=True)]
        if len(organ):
            centre = organ[int(place[0] * len(organ))].tolist()
        cut: list[slice] = [slice(None)]
        for middle, side, whole in zip(centre, self.patch, shape, strict=True):
            start = min(max(0, int(middle) - side // 2), whole - side)
            cut.append(slice(start, start + side))
        return tuple(volume[tuple(cut)].contiguous() for volume in volumes)


def over_processes(row: dict[str, float], fabric: Any) -> dict[str, float]:
    """A row of the log for the whole batch: means over the processes; norms add up as parts of one gradient."""
    if fabric.world_size == 1:
        return row
    own = torch.tensor([v**2 if k.startswith("norm/") else v for k, v in row.items()], dtype=torch.float64)
    means = fabric.all_reduce(own.float() if fabric.device.type == "mps" else own, reduce_op="mean").tolist()
    # each part's gradient is that of a mean over its samples: the whole's norm is the root of the sum of squares over n
    n = fabric.world_size
    return {k: (v / n) ** 0.5 if k.startswith("norm/") else v for k, v in zip(row, means, strict=True)}


class Point:
    """The point of a training from which a killed run goes on, with everything that its future depends on."""

    def __init__(self, path: Path, fabric: Any, **parts: Any) -> None:
        self.path, self.fabric, self.parts = path, fabric, parts

    def save(self, step: int, log: list[dict[str, float]], best: float) -> None:
        """Write the point; it is there whole or not at all."""
        if not self.fabric.is_global_zero:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_tensors(self.path, state=state, random=torch.get_rng_state(), step=step, log=log, best=best)  # type: ignore[arg-type]

    def load(self) -> tuple[int, list[dict[str, float]], float]:
        """Take the point up: the steps done, their log, and the best score; nothing done where there is none.

        Raises:
            ValueError: the file is damaged, or the point of another training or of another program.
        """
        if not self.path.is_file():
            return 0, [], float("inf")
        saved: dict[str, Any] = load_tensors(self.path)
        try:
            step, log, best = int(saved["step"]), [dict(row) for row in saved["log"]], float(saved["best"])
            for name, part in self.parts.items():
                part.load_state_dict(saved["state"][name])
            torch.set_rng_state(saved["random"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{self.path}: expected the point of this training to go on from, got another's; remove the folder "
                f"{self.path.parent} and start again"
            ) from error
        return step, log, best


class Board:
    """TensorBoard, where it is installed and on the first process; a row of the log in, curves out."""

    def __init__(self, folder: Path, fabric: Any, start: int) -> None:
        self.writer = None
        if fabric.is_global_zero:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def add(self, row: dict[str, float]) -> None:
        """One row of the log."""
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self.writer.close()


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """The log as CSV, one column for each number that any row has."""
    text = io.StringIO()
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
