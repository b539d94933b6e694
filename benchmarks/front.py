"""The numbers of the README's first screen, read from committed results: ``python -m benchmarks.front``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .page import REASONS, RESULTS, ratio_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FIGURE = ROOT / "docs" / "images" / "fig2.json"
HELD = "bytes held between forward and backward"


def blocks() -> dict[str, str]:
    """What stands between the markers, by name."""
    from . import before_after, effects, evidence

    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")) if path != REASONS]
    cpu = [results["benchmarks"] for results in found if results["machine"]["device"] == "cpu"]
    machine = next(found for found in cpu if "balancing" in found)
    lean = [f"**Memory.** {memory(found)}" for found in cpu if "lean" in found][:1]
    lines = [*lean, f"**Cost.** {cost(machine)}", f"**Gain on unseen networks.** {gain()}"]
    return {
        "numbers": "\n".join(f"- {line}" for line in lines),
        "figure": caption(json.loads(FIGURE.read_text())),
        "before_after": before_after.caption(effects.read(evidence.RESULTS)),
    }


def memory(machine: Mapping[str, Any]) -> str:
    """What a frozen network keeps between forward and backward, and takes, beside autograd's own way."""
    held, time, folded = {}, [], []
    for case in cases(machine, "lean"):
        if ", a batch, " in case["name"]:
            continue  # a network that is there already
        held[case["name"].rpartition(", ")[0]] = case["values"][f"lean / autograd: {HELD}"]
        times = {t["ours"]: ratio_of(case, t)[0] for t in case["targets"] if t["quantity"] == "seconds"}
        time.append(times["lean"])
        folded += [times[side] for side in times if side != "lean"]
    smallest, largest = min(held, key=held.__getitem__), max(held, key=held.__getitem__)
    median = sorted(held.values())[len(held) // 2]
    sentence = (
        f"A frozen network keeps {held[smallest]:.2f} ({smallest}) to {held[largest]:.2f} ({largest}) of the "
        f"activations that autograd would keep, median {median:.2f} of {len(held)} networks, at the same gradient and "
        f"{min(time):.2f} to {max(time):.2f} times the time (median {sorted(time)[len(time) // 2]:.2f})."
    )
    if folded:
        sentence += (
            f" `fold=True` takes {min(folded):.2f} to {max(folded):.2f} of the time of {len(folded)} 3-D networks (one "
            "volume, CPU), equal up to rounding."
        )
    return sentence


def cost(machine: Mapping[str, Any]) -> str:
    """A step beside the lines written by hand, and balancing beside one backward per loss."""
    by_hand = target_of(machine, "step", "generator step", "taskloss", "by hand", "seconds")
    balancing = target_of(machine, "balancing", "5 terms", "taskloss, shares", "one backward per loss", "seconds")
    return (
        f"A generator step takes {by_hand:.2f} times the time of the same step written by hand; balancing five terms "
        f"at x_hat takes {balancing:.2f} times that of one backward pass per loss."
    )


def gain() -> str:
    """What unseen networks gain by the task term in the confirming runs, least and most."""
    from . import effects, evidence

    found = [c for c in effects.comparisons(effects.read(evidence.RESULTS)) if c.stage == "confirming" and c.unseen.n]
    least, most = (pick(found, key=lambda one: one.unseen.mean) for pick in (min, max))
    gained = sum(one.unseen.low > 0 and one.holm < 0.05 for one in found)
    return (
        f"Significant in {gained} of {len(found)} confirming comparisons: from {evidence.shown(least.unseen)} points "
        f"({evidence.title(least.world)}, {evidence.title(least.degradation)}) to {evidence.shown(most.unseen)} "
        f"({evidence.title(most.world)}, {evidence.title(most.degradation)}; the guide: {evidence.shown(most.guide)})."
    )


def caption(focus: Mapping[str, Mapping[str, float]]) -> str:
    """What the picture shows, in numbers."""
    names = {"mse": "MSE", "l1": "L1", "perceptual": "the perceptual loss", "task": "the task loss"}
    told = [f"{names[name]} {found['ratio']:.1f}" for name, found in focus.items()]
    return (
        "*What four losses ask of one restored CT slice, dL/dx_hat (red: darker, blue: brighter; outline: liver). "
        f"Share of the gradient's energy in the liver over the liver's share of the image: {', '.join(told)}.*"
    )


def cases(machine: Mapping[str, Any], benchmark: str) -> Iterator[Mapping[str, Any]]:
    """The cases of a benchmark."""
    yield from machine[benchmark]["cases"]


def target_of(machine: Mapping[str, Any], benchmark: str, case: str, ours: str, theirs: str, quantity: str) -> float:
    """Ours over theirs, whichever way round the benchmark's target has them."""
    for found in cases(machine, benchmark):
        for target in found["targets"] if found["name"].startswith(case) else []:
            if target["quantity"] == quantity and {target["ours"], target["theirs"]} == {ours, theirs}:
                ratio = ratio_of(found, target)[0]
                return ratio if target["ours"] == ours else 1 / ratio
    raise LookupError(f"{benchmark}, {case}: no target on {quantity} of {ours!r} and {theirs!r}; run make bench")


def filled(page: str) -> str:
    """A page with every block between its markers replaced."""
    parts = blocks()
    return re.sub(
        r"(<!-- front:(\w+) -->\n).*?(<!-- /front -->)",
        lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in (README, ROOT / "docs" / "index.md"):
        page.write_text(filled(page.read_text()))
