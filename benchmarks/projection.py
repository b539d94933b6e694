"""What a step of the paper's settings asks of a GPU, on paper: operations, bytes, memory, and time.

Nothing is timed: the networks run on tensors without data, whose operations and saved activations are counted. The
rates of the hardware and the efficiency are assumptions, listed in `HARDWARE` and `EFFICIENCY`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from examples.tod_net_ct.networks import Denoiser, build
from examples.tod_net_ct.run import PRESETS
from taskloss import WassersteinCritic

from .harness import Case, Options

PAPER = PRESETS["paper"]
# NVIDIA's data sheet of the H100 SXM, dense: TFLOP/s and TB/s.
HARDWARE = {"float32": (67.0, 3.35), "TF32": (494.0, 3.35), "bfloat16": (989.0, 3.35)}
EFFICIENCY = 0.35  # of the peak, that 3-D convolutions of these widths reach; an assumption
BYTES = {"float32": 4, "TF32": 4, "bfloat16": 2}
CARDS_GB = (24, 40, 80)
HEADROOM = 0.9  # of a card's memory; the rest is the context's, the workspaces' and fragmentation


def run(options: Options) -> list[Case]:
    """Operations and bytes of one step, and the plan that makes the paper's batch fit."""
    shape = (PAPER.batch, 1, *((8, 16, 16) if options.quick else PAPER.shape))
    parts = {
        "denoiser": count(lambda x: denoiser()(x), shape, weights=True),
        "denoiser, recomputing": count(lambda x: denoiser(recompute=True)(x), shape, weights=True),
        "task network": count(lambda x: frozen(build("unet", PAPER.task_width))(x), shape),
        "critic, its own step": count(lambda x: critic(shape)(x), (2 * shape[0], *shape[1:]), weights=True),
        "critic, for the denoiser": count(lambda x: frozen(critic(shape))(x), shape),
    }
    case = Case(f"one step, batch {shape[0]} x {'x'.join(map(str, shape[2:]))}, width {PAPER.width}")
    for name, part in parts.items():
        case.values[f"{name}: TFLOP"] = part["flop"] / 1e12
        case.values[f"{name}: activations kept, GB in float32"] = part["saved"] / 1e9
    for name, recompute in (("as it is", False), ("recomputing", True)):
        own = parts["denoiser, recomputing" if recompute else "denoiser"]
        others = [parts[n] for n in parts if not n.startswith("denoiser")]
        flop = own["flop"] + sum(part["flop"] for part in others)
        moved = own["moved"] + sum(part["moved"] for part in others)
        case.values[f"{name}: TFLOP in all"] = flop / 1e12
        for precision, (rate, bandwidth) in HARDWARE.items():
            size = moved * BYTES[precision] / 4
            seconds = max(flop / (rate * 1e12 * EFFICIENCY), size / (bandwidth * 1e12))
            case.values[f"{name}, {precision}: FLOP for each byte moved"] = flop / size
            case.values[f"{name}, {precision}: seconds on an H100 at {EFFICIENCY:.0%} of its peak"] = seconds
    case.notes += list(plan(parts, shape))
    return [case]


def plan(parts: dict[str, dict[str, float]], shape: tuple[int, ...]) -> list[str]:
    """For each size of card the first way to keep what has to be kept at once, by settings of the example."""
    ways = []
    for devices in (1, 2, 4):
        for precision in ("float32", "bfloat16"):
            for recompute in (False, True):
                own = parts["denoiser, recomputing" if recompute else "denoiser"]
                # While the task's gradient is taken, its graph is there beside the denoiser's.
                bytes_ = own["saved"] + parts["task network"]["saved"] + 2 * own["largest"]
                words = ["precision=bf16-mixed"] if precision == "bfloat16" else []
                words += ["recompute=true"] if recompute else []
                words += [f"devices={devices}, each of this size"] if devices > 1 else []
                ways.append((" ".join(words) or "as it is", bytes_ / devices * BYTES[precision] / 4 / 1e9))
    told = [f"{words}: about {gigabytes:.0f} GB on each card" for words, gigabytes in ways[:4]]
    for card in CARDS_GB:
        fitting = [(words, gigabytes) for words, gigabytes in ways if gigabytes <= HEADROOM * card]
        words, gigabytes = fitting[0] if fitting else ways[-1]
        verdict = f"{words}, about {gigabytes:.0f} GB" if fitting else f"nothing here fits; {words} is the least"
        told.append(f"batch {shape[0]} on cards of {card} GB, channels_last_3d throughout: {verdict}")
    return told


def count(network: Callable[[Tensor], Any], shape: tuple[int, ...], *, weights: bool = False) -> dict[str, float]:
    """Operations of both passes, bytes kept for the backward pass and moved by both (float32), without any data.

    With `weights` the backward pass goes to them as well; else to the input alone.
    """
    x = torch.empty(shape, device="meta", requires_grad=True)
    kept: dict[int, Tensor] = {}
    sizes = {"moved": 0.0, "largest": 0.0}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, Traffic(sizes):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = network(x)
        out = out if isinstance(out, Tensor) else out[0]
        out.sum().backward()
    saved = sum(t.untyped_storage().nbytes() for t in kept.values() if not isinstance(t, nn.Parameter))
    return {"flop": float(counter.get_total_flops()), "saved": float(saved), **sizes}


class Traffic(TorchDispatchMode):
    """Counts the bytes that every operation reads and writes, as if nothing stayed in a cache; views are free."""

    def __init__(self, sizes: dict[str, float]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.sizes["moved"] += sum(t.numel() * t.element_size() for t in (*given, *made))
            self.sizes["largest"] = max(self.sizes["largest"], *(t.numel() * t.element_size() for t in made), 0.0)
        return out


def denoiser(*, recompute: bool = False) -> nn.Module:
    """The paper's denoiser."""
    with torch.device("meta"):
        network = Denoiser(PAPER.width)
    network.recompute = recompute
    return network


def critic(shape: tuple[int, ...]) -> nn.Module:
    """The paper's critic, without the laws of the game."""
    with torch.device("meta"):
        return WassersteinCritic(patch_size=shape[2:], channels=PAPER.critic_channels).network


def frozen(network: nn.Module) -> nn.Module:
    """As the library holds a network: in eval mode, and no gradient for its weights."""
    return network.to("meta").eval().requires_grad_(False)
