"""The paper's three tables from the evaluation's summary, as Markdown, LaTeX and CSV, and what they say in words."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import LOWER_IS_BETTER, ORACLE, QUALITY, REFERENCE, title
from ..run import write_text

LEVEL = 0.05


def label(table: str) -> str:
    """How a table is called: `Table 2`, `Table 2 (surface)`."""
    number, _, part = table.removeprefix("table").partition("_")
    return f"Table {number} ({part})" if part else f"Table {number}"


@dataclass(frozen=True)
class Cell:
    """A mean over cases, how it spreads, and whether it is the best of its column or differs from the reference."""

    mean: float
    sd: float
    n: int
    best: bool = False
    mark: str = ""  # † where the difference that the note names is significant

    def text(self, digits: int) -> str:
        """`93.9 ± 2.1`; nothing where nothing was measured."""
        if not self.n:
            return ""
        return f"{self.mean:.{digits}f}" + ("" if math.isnan(self.sd) else f" ± {self.sd:.{digits}f}")


@dataclass(frozen=True)
class Table:
    """One table of the paper: rows are denoisers, columns are numbers in groups."""

    name: str
    caption: str
    note: str
    groups: tuple[tuple[str, int], ...]  # a heading over that many columns
    columns: tuple[tuple[str, str], ...]  # key, heading
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]  # name of the denoiser, a cell for each column
    digits: int = 1


def tables(summary: dict[str, Any], networks: Sequence[str]) -> list[Table]:
    """Table 1, 2 and 3, and the surface distances that stand beside 2 and 3."""
    n = f"Mean ± standard deviation over {summary['n_cases']} test cases; bold: best. "
    against = f"†: {title(REFERENCE)} differs from it, p < {LEVEL:g} (paired Wilcoxon, Holm over the table)."
    without = f"†: differs from no denoiser, p < {LEVEL:g} (paired Wilcoxon, Holm over the table)."
    quality = tuple((key, title(key.split("_", 1)[1])) for key in QUALITY)
    overlap, distance = (tuple((f"{name}_{what}", title(name)) for name in networks) for what in ("dice", "surface_mm"))
    judges = (("", len(networks)),)
    regions = (("Region of interest", 3), ("Whole image", 3))
    found = [
        _table(summary, "table1", "Image quality on low dose", n + against, "low", quality, regions),
        _table(summary, "table2", "Dice (%) on low dose", n + against, "low", overlap, judges),
        _table(summary, "table3", "Dice (%) on normal dose", n + without, "normal", overlap, judges),
        _table(
            summary, "table2_surface", "Average symmetric surface distance (mm) on low dose", n + against, "low",
            distance, judges, 2,
        ),
        _table(
            summary, "table3_surface", "Average symmetric surface distance (mm) on normal dose", n + without, "normal",
            distance, judges, 2,
        ),
    ]  # fmt: skip
    return [table for table in found if any(cell.n for _, cells in table.rows for cell in cells)]


def _table(
    summary: dict[str, Any],
    name: str,
    caption: str,
    note: str,
    dose: str,
    columns: tuple[tuple[str, str], ...],
    groups: tuple[tuple[str, int], ...],
    digits: int = 1,
) -> Table:
    means = summary["means"][dose]
    marked = {
        (gap["ours"] if dose == "normal" else gap["theirs"], gap["key"])
        for gap in summary["comparisons"]
        if gap["table"] == name and is_significant(gap)
    }
    printed = {
        key: {r: round(means[r][key]["mean"], digits) for r in means if means[r][key]["n"] and r != ORACLE}
        for key, _ in columns
    }
    best = {
        # where all are equal, none is best
        key: (min if key.endswith(LOWER_IS_BETTER) else max)(values.values(), default=None)
        if len(values) == 1 or len(set(values.values())) > 1
        else None
        for key, values in printed.items()
    }
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    ceiling = summary["means"]["normal"]["none"]
    if dose == "low" and any(ceiling[key]["n"] for key, _ in columns):
        rows.append(("normal_dose", tuple(_cell(ceiling[key]) for key, _ in columns)))
    for row in means:
        cells = [
            _cell(means[row][key], printed[key].get(row) == best[key], "†" if (row, key) in marked else "")
            for key, _ in columns
        ]
        if any(cell.n for cell in cells) or (dose == "low" and row != ORACLE):
            rows.append((row, tuple(cells)))
    return Table(name, caption, note, groups, columns, tuple(rows), digits)


def _cell(numbers: dict[str, Any], best: bool = False, mark: str = "") -> Cell:
    mean, sd = (math.nan if numbers[k] is None else numbers[k] for k in ("mean", "sd"))
    return Cell(mean, sd, numbers["n"], best and numbers["n"] > 0, mark)


def is_significant(gap: dict[str, Any]) -> bool:
    """Whether a comparison holds after Holm's correction."""
    return gap["wilcoxon_holm"] is not None and gap["wilcoxon_holm"] < LEVEL


def write_tables(found: Iterable[Table], folder: Path) -> None:
    """Write every table as ``<name>.md``, ``<name>.tex`` (needs the package booktabs) and ``<name>.csv``."""
    for table in found:
        write_text(folder / f"{table.name}.md", markdown(table))
        write_text(folder / f"{table.name}.tex", latex(table))
        write_text(folder / f"{table.name}.csv", as_csv(table))


def markdown(table: Table) -> str:
    """A pipe table under its caption, the note below it."""
    groups = [group for group, span in table.groups for _ in range(span)]
    heads = [
        f"{group}: {column}" if group else column for group, (_, column) in zip(groups, table.columns, strict=True)
    ]
    lines = [["", *heads], ["---", *["---:"] * len(heads)]]
    for row, cells in table.rows:
        texts = [(c.text(table.digits), c) for c in cells]
        lines.append([title(row), *(f"**{t}**{c.mark}" if t and c.best else t + c.mark for t, c in texts)])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{label(table.name)}. {table.caption}**\n\n{body}\n\n{table.note}\n"


def latex(table: Table) -> str:
    r"""A ``table`` environment for ``\usepackage{booktabs}``."""
    alignment = "l" + "r" * len(table.columns)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_tex(table.caption)}. {_tex(table.note)}}}"]
    lines += [rf"\label{{tab:{table.name.replace('_', '-')}}}", rf"\begin{{tabular}}{{{alignment}}}", r"\toprule"]
    if any(group for group, _ in table.groups):
        lines.append(" & " + " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{_tex(g)}}}" for g, n in table.groups) + r" \\")
        start = 2
        for _, span in table.groups:
            lines.append(rf"\cmidrule(lr){{{start}-{start + span - 1}}}")
            start += span
    lines += ["Denoiser & " + " & ".join(_tex(column) for _, column in table.columns) + r" \\", r"\midrule"]
    for row, cells in table.rows:
        texts = []
        for cell in cells:
            text = _tex(cell.text(table.digits))
            texts.append((rf"\textbf{{{text}}}" if cell.best else text) + (r"$^\dagger$" if cell.mark else ""))
        lines.append(f"{_tex(title(row))} & " + " & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    for plain, tex in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$"), ("†", r"$\dagger$"), ("<", "$<$")):
        text = text.replace(plain, tex)
    return text


def as_csv(table: Table) -> str:
    """One line per cell, for a program: row, column, mean, sd, n, best, significant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["denoiser", "column", "mean", "sd", "n", "best", "significant"])
    for row, cells in table.rows:
        for (key, _), cell in zip(table.columns, cells, strict=True):
            numbers = ["" if math.isnan(v) else f"{v:.6g}" for v in (cell.mean, cell.sd)]
            writer.writerow([row, key, *numbers, cell.n, int(cell.best), int(bool(cell.mark))])
    return text.getvalue()
