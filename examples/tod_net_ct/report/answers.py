"""What the numbers say in words, whichever way they fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation import REFERENCE, heading, title
from .tables import LEVEL, is_significant, label

LOSSES = {"task": "task", "perceptual": "perceptual", "mse": "MSE", "l1": "L1"}


def answers(summary: dict[str, Any], guides: Sequence[str], networks: Sequence[str]) -> dict[str, list[str]]:
    """The paper's claims, each with what this run says of it against every other denoiser."""
    unseen = [name for name in networks if name not in guides]
    questions = (
        ("Dice on low dose, by the network that guided the training", "table2", [f"{n}_dice" for n in guides]),
        ("Dice on low dose, by networks that no training saw", "table2", [f"{n}_dice" for n in unseen]),
        ("Image quality on low dose, inside the organ", "table1", ["roi_ssim", "roi_rmse_hu", "roi_psnr_db"]),
        ("Image quality on low dose, whole image", "table1", ["whole_ssim", "whole_rmse_hu", "whole_psnr_db"]),
        ("Dice on normal dose: does denoising hurt a good scan?", "table3", [f"{n}_dice" for n in networks]),
    )  # fmt: skip
    found = {}
    for subject, table, keys in questions:
        gaps = [
            g for g in summary["comparisons"] if g["table"] == table and g["key"] in keys and g["ours"] == REFERENCE
        ]
        opponents: dict[str, list[dict[str, Any]]] = {}
        for gap in gaps:
            if gap["mean"] is not None:
                opponents.setdefault(gap["theirs"], []).append(gap)
        if opponents:
            found[subject] = [f"Minus {_lower(theirs)}: {_verdict(own)}." for theirs, own in opponents.items()]
    return found


def sentence(gap: dict[str, Any]) -> str:
    """One comparison with its interval and tests."""
    text = f"{heading(gap['key'])}: {title(gap['ours'])} minus {_lower(gap['theirs'])}"
    if gap["mean"] is None:
        return text + " could not be measured."
    text += f" {gap['mean']:+.2f}"
    if gap["low"] is None:
        return text + f" (n = {gap['n']}: too few for an interval)."
    return text + (
        f" (95 % interval {gap['low']:+.2f} to {gap['high']:+.2f}, n = {gap['n']}; Wilcoxon p = "
        f"{number(gap['wilcoxon_p'])}, after Holm {number(gap['wilcoxon_holm'])}; paired t p = {number(gap['t_p'])}, "
        f"after Holm {number(gap['t_holm'])})."
    )


def family_note(summary: dict[str, Any]) -> str:
    """What was corrected for what, and whether so few cases could show anything at all."""
    families = {gap["table"]: gap for gap in summary["comparisons"]}
    if not families:
        return f"No paired comparison: {title(REFERENCE)} was not trained in this run."
    note = (
        "Tests are paired, for the same cases went through every denoiser. Holm's correction runs over a family: all "
        "comparisons of one table in all its columns ("
        + ", ".join(f"{label(table)}: {gap['family']}" for table, gap in families.items())
        + "). Intervals are not corrected. They hold for these trained networks and one seed; another training may "
        "differ by more."
    )
    powerless = {label(table): gap["n"] for table, gap in families.items() if _is_powerless(gap)}
    if powerless:
        n = min(powerless.values())
        note += (
            f" With {n} case{'s' * (n != 1)} the smallest p that Wilcoxon can give is {number(2.0 ** (1 - n))}, so "
            f"after Holm no difference can be significant in {', '.join(powerless)}, however large it is."
        )
    return note


def focus_sentences(summary: dict[str, Any]) -> list[str]:
    """Where each loss's gradient goes (Fig. 2)."""
    lines = []
    for name, found in summary["focus"].items():
        line = f"Gradient energy inside the organ, {LOSSES.get(name, name)} loss: {found['share']:.1%}, "
        line += f"{found['ratio']:.1f} times its share of the volume"
        if name != "task" and found["low"] is not None:
            gap, low, high = (100 * found[key] for key in ("task_minus_this", "low", "high"))
            line += f"; the task loss has {gap:+.1f} points more (95 % interval {low:+.1f} to {high:+.1f})"
        lines.append(line + ".")
    return lines


def number(p: float | None) -> str:
    """A p-value: two digits, and never zero."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _verdict(gaps: list[dict[str, Any]]) -> str:
    means = ", ".join(f"{_subject(gap['key'])} {gap['mean']:+.2f}" for gap in gaps)
    if any(_is_powerless(gap) for gap in gaps):
        return f"{means}; {_cases(gaps[0]['n'])} too few to test"
    better = sum(is_significant(gap) and gap["better"] for gap in gaps)
    worse = sum(is_significant(gap) and not gap["better"] for gap in gaps)
    counts = ((better, "significantly better"), (worse, "significantly worse"))
    read = [f"{what} in {n} of {len(gaps)}" for n, what in counts if n] or ["no significant difference"]
    return f"{means}; {', '.join(read)}"


def _cases(n: int) -> str:
    return "1 case is" if n == 1 else f"{n} cases are"


def _is_powerless(gap: dict[str, Any]) -> bool:
    """Whether not even cases that all agree could pass Wilcoxon's test and Holm's correction."""
    return gap["n"] > 0 and gap["family"] * 2.0 ** (1 - gap["n"]) >= LEVEL


def _subject(key: str) -> str:
    """A column without what its heading above already says: `U-Net`, `RMSE (HU)`."""
    return title(key.removesuffix("_dice")) if key.endswith("_dice") else title(key.split("_", 1)[1])


def _lower(name: str) -> str:
    return "no denoiser" if name == "none" else title(name)
