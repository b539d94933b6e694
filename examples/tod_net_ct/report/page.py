"""Stage 6: tables, figures, and one page that holds them all and needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import REFERENCE, Row, guide_of, heading, read_rows, read_summary, title, values_of
from ..run import Settings, check_intact, read_json, replacing, results_of, write_text
from ..scans import in_words
from . import paper, plots
from .answers import answers, family_note, focus_sentences, number, sentence
from .opening import cautions, opening_columns, opening_figure, opening_sentence, whole_image_sentence
from .tables import label, markdown, tables, write_tables
from .viewer import viewer_data

PERCEPTUAL = {
    "efficientnet": "EfficientNet-Lite0 with the ImageNet weights that a package ships, in place of the paper's VGG-19",
    "vgg19": "torchvision's VGG-19 with its ImageNet weights, as in the paper",
}
MAX_COLUMNS = 6  # images side by side in Fig. 3; the viewer has all
VIEWED_CASES = 3
MAX_PNG_BYTES = 500_000


def report(settings: Settings, run: Path) -> Path:
    """Write ``tables/``, ``figures/``, ``table.md`` (the tables and their reading) and ``report.html``; return it.

    Raises:
        ValueError: the run has not been evaluated.
    """
    if not (run / "evaluation" / "manifest.json").exists():
        raise ValueError(f"{run / 'evaluation'}: expected a finished evaluation, got none; run evaluate first")
    check_intact(run / "evaluation")
    summary = read_summary(run)
    rows = read_rows(run)
    found = tables(summary, settings.task_networks)
    write_tables(found, run / "tables")
    lines = [
        f"{subject}: {title(REFERENCE)} {line[0].lower()}{line[1:]}"
        for subject, read in answers(summary, settings.guides, settings.task_networks).items()
        for line in read
    ]
    reading = "\n".join(f"- {line}" for line in [*lines, *focus_sentences(summary), family_note(summary)])
    write_text(run / "table.md", "\n".join(markdown(table) for table in found) + f"\n{reading}\n")
    write_text(
        run / "tables" / "comparisons.md", "\n".join(f"- {sentence(gap)}" for gap in summary["comparisons"]) + "\n"
    )
    shown = [plots.pictures(settings, run, index) for index in _viewed_cases(rows, settings)]
    figures = _draw(settings, run, rows, shown)
    write_text(run / "report.html", _page(settings, run, summary, found, figures, shown))
    return run / "report.html"


def _draw(settings: Settings, run: Path, rows: Sequence[Row], shown: Sequence[plots.Pictures]) -> list[str]:
    """Save the figures that this run has; return their names."""
    guide = guide_of(settings)
    typical = list(dict.fromkeys(row["case"] for row in rows)).index(shown[0].case)
    logs = {name: plots.read_log(run / "denoisers" / name / "log.csv") for name in settings.denoisers}
    task_logs = {name: plots.read_log(run / "task" / name / "log.csv") for name in settings.task_networks}
    has_dice = any(np.isfinite(values_of(rows, "low", "none", f"{guide}_dice")))
    figures = {
        "opening": opening_figure(shown[0], opening_columns(settings)),
        "fig2": plots.gradient_figure(settings, run, typical),
        "fig3": plots.case_figure(shown[0], guide, _columns(settings)),
        "dice": plots.dice_figure(rows, settings.task_networks, settings.denoisers) if has_dice else None,
        "learning": plots.learning_figure({name: log for name, log in logs.items() if log}),
        "task_learning": plots.task_figure({name: log for name, log in task_logs.items() if log}),
    }
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        with replacing(path) as unfinished:
            figure.savefig(unfinished, format="png")
    return [name for name, figure in figures.items() if figure is not None]


def _columns(settings: Settings) -> list[str]:
    """The images of Fig. 3: both doses, then the paper's denoisers first where not all of them fit."""
    published = [name for name in paper.SETTINGS["denoisers"] if name in settings.denoisers]
    others = [name for name in settings.denoisers if name not in published]
    kept = [*reversed(published), *others][: MAX_COLUMNS - 2]  # TOD-Net is never the one that is dropped
    return ["normal_dose", "low_dose", *(name for name in settings.denoisers if name in kept)]


def _viewed_cases(rows: Sequence[Row], settings: Settings) -> list[int]:
    """The test cases that are shown: the one in the middle by low-dose Dice first, then the hardest and the easiest.

    Without masks the RMSE tells them apart. The middle one is neither the best nor the worst story.
    """
    scores = np.asarray(values_of(rows, "low", "none", f"{guide_of(settings)}_dice"))
    if not np.isfinite(scores).any():
        scores = -np.asarray(values_of(rows, "low", "none", "whole_rmse_hu"))
    order = np.argsort(scores, kind="stable")[: int(np.isfinite(scores).sum())]  # NaN come last
    picked = [order[len(order) // 2], order[0], order[-1]]
    return [int(i) for i in dict.fromkeys(picked)][:VIEWED_CASES]


def _page(
    settings: Settings,
    run: Path,
    summary: dict[str, Any],
    found: Sequence[Any],
    figures: Sequence[str],
    shown: Sequence[plots.Pictures],
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"title": title, "heading": heading, "label": label, "p": number}
    manifest = read_json(run / "evaluation" / "manifest.json")
    return environment.get_template("report.html.jinja").render(
        settings=settings,
        organ=in_words(settings.organ),
        summary=summary,
        counts={split: len(list((run / "cases").glob(f"{split}-*.pt"))) for split in ("train", "validation", "test")},
        reference=REFERENCE,
        guide=guide_of(settings),
        answers=answers(summary, settings.guides, settings.task_networks),
        focus=focus_sentences(summary),
        family_note=family_note(summary),
        tables=found,
        figures={name: _embedded(run / "figures" / f"{name}.png") for name in figures},
        columns=_columns(settings),
        case=shown[0].case,
        viewer=viewer_data(shown, settings.task_networks[:7]),
        balance={name: rows for name in settings.denoisers if (rows := balance_rows(run, name))},
        departures=paper.departures(settings),
        paper_tables=paper.paper_tables(settings.organ),
        paper_source=paper.SOURCE,
        perceptual=PERCEPTUAL.get(settings.perceptual_network, settings.perceptual_network),
        warnings=[*cautions(summary, settings), *warnings_of(run)],
        opening=opening_sentence(summary, settings, guide_of(settings)),
        whole_image=whole_image_sentence(summary),
        packages=manifest["packages"],
        css=Markup((here / "report.css").read_text()),
        script=Markup((here / "viewer.js").read_text()),
    )


def _embedded(picture: Path) -> str:
    """A data URL; of a heavy picture (noise hardly packs) a lighter copy than the file's own."""
    from PIL import Image

    content, kind = picture.read_bytes(), "png"
    if len(content) > MAX_PNG_BYTES:
        lighter = io.BytesIO()
        Image.open(picture).convert("RGB").save(lighter, "WEBP", quality=85)
        content, kind = lighter.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def balance_rows(run: Path, name: str) -> list[list[str]]:
    """Gradient norms at x_hat and effective weights through one training, from its log; empty without a log."""
    log = [
        row for row in plots.read_log(run / "denoisers" / name / "log.csv") if any(k.startswith("norm/") for k in row)
    ]
    if not log:
        return []
    keys = [key for kind in ("norm/", "weight/") for key in log[0] if key.startswith(kind)]
    head = ["step", *(f"{kind}, {title(term)}" for kind, term in (key.split("/") for key in keys))]
    return [head, *([f"{row['step']:.0f}", *(f"{row[key]:.2g}" if key in row else "" for key in keys)] for row in log)]


def warnings_of(run: Path) -> list[str]:
    """What the stages warned of in their manifests, each once: patients in several splits, for example."""
    lines = []
    for path in sorted(run.glob("**/manifest.json")):
        warning = results_of(path.parent).get("warning")
        if warning:
            lines.append(str(warning))
    return list(dict.fromkeys(lines))
