"""What the study found: means over seeds, paired differences with intervals, and the README's table."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation import Row, heading, title
from ..metrics import holm, paired_over_seeds
from ..run import read_json, replacing, write_text
from ..training import FILTERS
from .cost import sentences
from .forest import forest
from .real import FINE_TUNED, FINE_TUNING_STEPS, SCRATCH
from .results import HERE

AGAIN = "remove it and run the study again, which measures what is missing"
BASELINES = ("mse_wgan", "vgg_wgan", "sa_wgan")
UNSEEN = ("vnet", "res_unet", "vox_resnet")
NETWORKS = ("unet", *UNSEEN)
COLUMNS = ("roi_ssim", "roi_rmse_hu", "roi_psnr_db", "whole_ssim", "whole_rmse_hu", "whole_psnr_db")
READMES = (HERE / "README.md",)

DICE = tuple(f"{name}_dice" for name in NETWORKS)
BOTH = (*DICE, "roi_rmse_hu", "whole_rmse_hu")


class Question(NamedTuple):
    """What is asked of which pairs of denoisers (ours, theirs), in which numbers, at which dose."""

    letter: str
    subject: str
    pairs: list[tuple[str, str]]
    keys: tuple[str, ...]
    dose: str = "low"


AGAINST_BASELINES = [("tod_net", name) for name in BASELINES]
FIXED = "@balance=false"  # the paper's weights in place of balancing
QUESTIONS = (
    Question("a", "Dice on low dose by U-Net, which guided the training", AGAINST_BASELINES, DICE[:1]),
    Question("b", "Dice on low dose by networks that TOD-Net never saw", AGAINST_BASELINES, DICE[1:]),
    Question("c", "Image quality inside the organ", AGAINST_BASELINES, COLUMNS[:3]),
    Question("c2", "Image quality of the whole image", AGAINST_BASELINES, COLUMNS[3:]),
    Question("d", "Dice on normal dose, denoised against as it came", [("tod_net", "none")], DICE, "normal"),
    Question("e", "The paper's fixed weights", [(f"tod_net{FIXED}", f"mse_wgan{FIXED}")], BOTH),
    Question("f", "Balancing at x_hat against fixed weights", [(n, n + FIXED) for n in ("mse_wgan", "tod_net")], BOTH),
    Question(
        "g",
        "The task's share of the gradient, 2 by default (MSE-WGAN has none)",
        [("tod_net@share_task=8", "tod_net")],
        BOTH,
    ),
    Question(
        "h",
        "Two guides against one; V-Net and Vox-ResNet are unseen by both",
        [("tod_net@guides=unet+res_unet", "tod_net")],
        BOTH,
    ),
    Question(
        "i",
        "Label-free consistency against labels, and against no task",
        [("label_free", "tod_net"), ("label_free", "mse_wgan")],
        BOTH,
    ),
)


def summarise(results: Path) -> str:
    """Read every measurement, write ``study.json`` and ``study.md``, and refresh the README's table.

    Raises:
        ValueError: nothing was measured yet.
    """
    rows = read(results)
    found: dict[str, Any] = {
        "seeds": {name: sorted({r["seed"] for r in rows if r["denoiser"] == name}) for name in _names(rows)},
        "means": {dose: {n: _means(rows, dose, n) for n in _names(rows)} for dose in ("low", "normal")},
        "answers": answers(rows),
        "pairs": {path.stem: read_json(path, AGAIN) for path in sorted((results / "pairs").glob("*.json"))},
        "tuning": read_json(path, AGAIN) if (path := results / "tuning.json").exists() else {},
    }
    write_text(results / "study.json", json.dumps(found, indent=1) + "\n")
    scans = rows_of(path) if (path := results / "scans.csv").exists() else []
    text = markdown(found, scans)
    write_text(results / "study.md", text)
    (results / "figures").mkdir(exist_ok=True)
    for letter, subject, *_ in QUESTIONS:
        for unit in ("dice", "ssim", "rmse_hu", "psnr_db"):  # one figure for each unit
            gaps = [g for g in found["answers"] if g["question"] == letter and g["key"].endswith(unit)]
            if gaps:
                with replacing(results / "figures" / f"{letter}_{unit}.png") as unfinished:
                    forest(gaps, subject).savefig(unfinished, format="png")
    if results == HERE / "results":
        for path in READMES:
            write_text(path, readme(path.read_text(), found, results))
    return text


def read(results: Path) -> list[Row]:
    """Every row of every measurement, with its seed."""
    rows: list[Row] = []
    for path in sorted((results / "measurements").glob("seed-*/*.csv")):
        number = path.parent.name.removeprefix("seed-")
        if not number.isdecimal():
            raise ValueError(f"{path.parent}: expected a folder seed-N, N a number, got seed-{number}; rename it")
        seed = int(number)
        rows += [{"seed": seed, **row} for row in rows_of(path)]
    if not rows:
        raise ValueError(f"{results}: expected measurements, found none; run the study first")
    return rows


def rows_of(path: Path) -> list[Row]:
    """The rows of one file of measurements.

    Raises:
        ValueError: the file is damaged: a line without its cells, a number that is none, no line at all.
    """
    words = ("case", "dose", "denoiser")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        whole = [None not in (*line, *line.values()) and all(line[word] for word in words) for line in lines]
        if not lines or not all(whole):
            raise ValueError("a line is not whole")
        return [{k: v if k in words else float(v or "nan") for k, v in line.items()} for line in lines]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ValueError(f"{path}: expected rows of measurements, got a damaged file; {AGAIN}") from error


def answers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every question's paired differences, over the seeds that both sides have; Holm over one question's family."""
    found = []
    for question in QUESTIONS:
        family: list[dict[str, Any]] = []
        for ours, theirs in question.pairs:
            for key in question.keys:
                scores = _scores(rows, ours, theirs, question.dose, key)
                if scores:
                    about = {"question": question.letter, "ours": ours, "theirs": theirs, "key": key}
                    family.append(about | paired_over_seeds(scores))
        for gap, p in zip(family, holm([gap["by_seed_p"] for gap in family]), strict=True):
            gap["by_seed_holm"] = p
        found += family
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in gap.items()} for gap in found]


def markdown(found: dict[str, Any], scans: Sequence[Row] = ()) -> str:
    """The means, every answer, what tuning saw, and the real scans, as Markdown."""
    lines = ["# The study", "", *_means_table(found, _all_keys()), ""]
    for letter, subject, *_ in QUESTIONS:
        gaps = [gap for gap in found["answers"] if gap["question"] == letter]
        if gaps:
            lines += [f"## ({letter}) {subject}", "", *_gap_table(gaps), ""]
    for table in (_tuning_table(found["tuning"]), _pairs_table(found["pairs"]), _scans_table(scans)):
        lines += [*table, ""] if table else []
    return "\n".join(lines)


def readme_part(found: dict[str, Any]) -> str:
    """What the README shows of the study: the main table and the four answers."""
    lines = _means_table(found, ("roi_rmse_hu", "roi_ssim", "whole_rmse_hu", *(f"{n}_dice" for n in NETWORKS)))
    for letter, subject, *_ in QUESTIONS[:5]:
        gaps = [gap for gap in found["answers"] if gap["question"] == letter]
        if gaps:
            lines += ["", f"**({letter}) {subject}.**", "", *_gap_table(gaps)]
    return "\n".join([*lines, "", *_pairs_table(found["pairs"])])


def refreshed(text: str, part: str, mark: str = "study") -> str:
    """A README with what stands between a pair of marks replaced."""
    begin, end = (f"<!-- {mark}: {word} -->" for word in ("begin, written by `study --summary-only`", "end"))
    return re.sub(f"(?s)(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", lambda _: f"{part}\n", text)


def readme(text: str, found: dict[str, Any], results: Path) -> str:
    """The README with its study and its cost as they are now."""
    text = refreshed(text, readme_part(found))
    path = results / "cost.json"
    return refreshed(text, "\n".join(_cost_in_words(path)), "cost") if path.exists() else text


def _cost_in_words(path: Path) -> list[str]:
    try:
        return sentences(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, LookupError, ZeroDivisionError) as error:  # damaged, cut short, or another's
        raise ValueError(
            f"{path}: expected what the command cost measured, got a damaged file; run cost again"
        ) from error


def _means_table(found: dict[str, Any], keys: Sequence[str]) -> list[str]:
    head = ["", "seeds", *(heading(key) for key in keys)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    ceiling = found["means"]["normal"]["none"]
    lines.append(_line("Normal dose", len(found["seeds"]["none"]), ceiling, keys))
    for name, means in found["means"]["low"].items():
        lines.append(_line("No denoiser" if name == "none" else title(name), len(found["seeds"][name]), means, keys))
    return lines


def _line(name: str, n_seeds: int, means: dict[str, Any], keys: Sequence[str]) -> str:
    cells = ["" if means[key] is None else f"{means[key]:.2f}" for key in keys]
    return "| " + " | ".join([name, str(n_seeds), *cells]) + " |"


def _gap_table(gaps: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| difference | of | mean | 95 %, over seeds | 95 %, over cases | seeds above 0 | p over seeds (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    for gap in gaps:
        pair = f"{title(gap['ours'])} - {'no denoiser' if gap['theirs'] == 'none' else title(gap['theirs'])}"
        by_seed, by_case = (_interval(gap, f"by_{kind}") for kind in ("seed", "case"))
        p = "" if gap["by_seed_holm"] is None else f"{gap['by_seed_holm']:.2g}"
        above = f"{gap['n_seeds_above']} of {gap['n_seeds']}"
        lines.append(f"| {pair} | {heading(gap['key'])} | {gap['mean']:+.2f} | {by_seed} | {by_case} | {above} | {p} |")
    return lines


def _pairs_table(pairs: dict[str, Any]) -> list[str]:
    """Real pairs of quarter and full dose, by the patient that was tested."""
    if not pairs:
        return []
    lines = [
        "**Real pairs of quarter and full dose.** The networks of the first seed have seen phantoms alone; fine-tuned",
        f"ones then had {FINE_TUNING_STEPS} steps of MSE on the other patient, and the last line nothing but these.",
        "",
        "| patient | slices | image | RMSE (HU) | PSNR (dB) | SSIM (%) | change of RMSE, 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for patient, found in pairs.items():
        for name, numbers in found.items():
            rmse = numbers["whole_rmse_hu"]
            means = [f"{numbers[key]['mean']:.2f}" for key in ("whole_rmse_hu", "whole_psnr_db", "whole_ssim")]
            gap = rmse.get("change")
            change = f"{gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})" if gap else ""
            lines.append(f"| {patient} | {rmse['n']} | {_image(name)} | {' | '.join(means)} | {change} |")
    return lines


def _image(name: str) -> str:
    """What stands in a row of the real pairs."""
    if name in ("none", SCRATCH):
        return "quarter dose as it came" if name == "none" else "TOD-Net's denoiser, the other patient alone"
    kind = name.removesuffix(FINE_TUNED)
    return title(kind) + (", fine-tuned" if kind != name else "" if kind in FILTERS else ", phantoms only")


def _scans_table(rows: Sequence[Row]) -> list[str]:
    """Real scans with masks, low dose simulated: quality, and Dice by networks that know phantoms alone."""
    if not rows:
        return []
    keys = ("roi_rmse_hu", "whole_rmse_hu", *DICE)
    lines = [
        "**Real scans, their low dose simulated, judged by networks that know phantoms alone.**",
        "",
        "| scan | dose | image | " + " | ".join(heading(key) for key in keys) + " |",
        "|---" * (3 + len(keys)) + "|",
    ]
    for row in rows:
        cells = ["" if math.isnan(row[key]) else f"{row[key]:.2f}" for key in keys]
        image = "as it came" if row["denoiser"] == "none" else title(row["denoiser"])
        lines.append(f"| {row['case']} | {row['dose']} | {image} | {' | '.join(cells)} |")
    return lines


def _tuning_table(tuning: dict[str, Any]) -> list[str]:
    """What tuning compared, on the validation cases of one seed."""
    if not tuning:
        return []
    values = list(next(iter(tuning["validation_mse"].values())))
    lines = [
        f"**Tuning of `{tuning['field']}`:** mean squared error on the validation cases of seed {tuning['seed']}, the",
        "same values for every denoiser; the smallest of a row was taken for all seeds.",
        "",
        "| denoiser | " + " | ".join(values) + " |",
        "|---" * (1 + len(values)) + "|",
    ]
    for name, errors in tuning["validation_mse"].items():
        best = min(errors.values())
        cells = [f"**{e:.6f}**" if e == best else f"{e:.6f}" for e in errors.values()]
        lines.append(f"| {title(name)} | {' | '.join(cells)} |")
    return lines


def _interval(gap: dict[str, Any], kind: str) -> str:
    low, high = gap[f"{kind}_low"], gap[f"{kind}_high"]
    return "" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"


def _scores(
    rows: Sequence[Row], ours: str, theirs: str, dose: str, key: str
) -> dict[int, tuple[list[float], list[float]]]:
    sides = [
        {(r["seed"], r["case"]): r[key] for r in rows if (r["denoiser"], r["dose"]) == (n, dose)}
        for n in (ours, theirs)
    ]
    scores: dict[int, tuple[list[float], list[float]]] = {}
    for seed, case in sorted(set(sides[0]) & set(sides[1])):
        for side, values in zip(sides, scores.setdefault(seed, ([], [])), strict=True):
            values.append(side[seed, case])
    return scores


def _means(rows: Sequence[Row], dose: str, name: str) -> dict[str, float | None]:
    """The mean over seeds of the mean over cases; None where nothing was measured."""
    result: dict[str, float | None] = {}
    for key in _all_keys():
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            if (row["dose"], row["denoiser"]) == (dose, name) and math.isfinite(row[key]):
                by_seed.setdefault(row["seed"], []).append(row[key])
        means = [sum(values) / len(values) for values in by_seed.values()]
        result[key] = sum(means) / len(means) if means else None
    return result


def _names(rows: Sequence[Row]) -> list[str]:
    """The denoisers in the order of the paper, then the rest as they come."""
    order = ("none", "nlm", "bm3d", "cnn_mse", "vgg_wgan", "mse_wgan", "sa_wgan", "tod_net")
    names = {row["denoiser"] for row in rows}
    return [n for n in order if n in names] + sorted(names - set(order))


def _all_keys() -> tuple[str, ...]:
    return (*COLUMNS, *(f"{n}_dice" for n in NETWORKS))
