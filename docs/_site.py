"""What the site needs beyond Sphinx: figures of the gallery, formulas, links, the list of public names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import taskloss

HERE = Path(__file__).parent
HOME = "https://github.com/taskloss/taskloss"

# The public names by subject; whatever is public and not named here is listed last, so that none is missing.
SUBJECTS = {
    "The sum": ["LossSum", "LossValue", "Term", "InputError"],
    "Terms": ["TaskOrientedLoss", "TaskConsistencyLoss", "soft_kl", "Fidelity", "AdversarialLoss"],
    "The frozen network": ["Frozen", "audit_task_model", "Finding"],
    "The critic": ["WassersteinCritic", "WeightClipping", "GradientPenalty"],
    "Gradients at x_hat": ["GradientBalancer", "gradient_maps", "GradientMaps", "Focus"],
    "Whom it helps": ["TransferMeter", "Transfer", "Interval"],
    "Pictures": ["plot_gradient_maps", "History"],
}

# Types that belong to other libraries: their pages are elsewhere, and the build needs no network.
OTHERS = [
    ("py:.*", r"(torch|nn|np|numpy|matplotlib|os|pathlib|collections|contextlib|typing)\..*"),
    ("py:.*", r"(Tensor|Module|Figure|Path|Any|Callable|Mapping|Sequence|Iterator|Iterable|Literal|optional)"),
    ("py:.*", r"taskloss\.(constraints\.Constraint|sharing\.Step)"),  # no public names, but in signatures
    ("py:.*", r"(int|float|str|bool|bytes|object|tuple|list|dict|None|ValueError|TypeError|FloatingPointError|array)"),
]


def api_page() -> str:
    """The API page: one table of public names for each subject."""
    public = [name for name in taskloss.__all__ if name != "__version__"]
    told = {name for names in SUBJECTS.values() for name in names}
    subjects = {**SUBJECTS, "More": [name for name in public if name not in told]}
    lines = [
        "# API",
        "",
        "Everything that `from taskloss import ...` offers; only these names are the interface. Modules of the package"
        " may move between versions.",
        "",
    ]
    for subject, names in subjects.items():
        present = [f"   {name}" for name in names if name in public]
        if present:
            table = [
                f"## {subject}",
                "",
                "```{eval-rst}",
                ".. currentmodule:: taskloss",
                "",
                ".. autosummary::",
                "   :toctree: api",
                "   :nosignatures:",
            ]
            lines += [*table, "", *present, "```", ""]
    return "\n".join(lines)


def figures(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any], **_: Any) -> str:
    """Save what a block of the gallery drew: the library returns figures and leaves pyplot's state alone."""
    from matplotlib.figure import Figure
    from sphinx_gallery.scrapers import figure_rst, matplotlib_scraper

    names = block_vars["example_globals"]
    seen = names.setdefault("_seen_figures", [])
    saved = []
    for figure in [value for value in list(names.values()) if isinstance(value, Figure)]:
        if not any(figure is other for other in seen) and figure.canvas.manager is None:
            seen.append(figure)
            path = next(block_vars["image_path_iterator"])
            figure.savefig(path, dpi=120)
            saved.append(path)
    return figure_rst(saved, gallery_conf["src_dir"]) + matplotlib_scraper(block, block_vars, gallery_conf)


def same_start(gallery_conf: dict[str, Any], script: str) -> None:
    """Every script of the gallery starts from the same random state, on one thread."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)


def formula(writer: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw themselves: no script, and nothing is fetched from elsewhere."""
    from docutils import nodes
    from latex2mathml.converter import convert

    if isinstance(node, nodes.math_block):
        writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    else:
        writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def links_into_the_repository(text: str, page: str) -> str:
    """Pages link to files beside them, as one reads them in a clone; on the site, files that are no page are there."""
    folder = (HERE / page).parent

    def absolute(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        path = (folder / target).resolve()
        root = HERE.parent
        if match["picture"] or not path.exists():
            return match[0]
        pages = {root / "CONTRIBUTING.md": HERE / "contributing.md", root / "CHANGELOG.md": HERE / "changes.md"}
        path = pages.get(path, path)
        if path.is_relative_to(HERE) and path.suffix == ".md":
            return f"{match['words']}(/{path.relative_to(HERE)}{anchor})"
        if path.parent == HERE / "gallery":
            return f"{match['words']}(/auto_gallery/{path.stem}.rst)"
        kind = "tree" if path.is_dir() else "blob"
        return f"{match['words']}({HOME}/{kind}/main/{path.relative_to(root)}{anchor})"

    return re.sub(
        r"(?P<picture>!?)(?P<words>\[[^\]]*\])\((?!https?:|#|mailto:)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)",
        absolute,
        text,
    )


def is_left_out(_app: Any, _what: str, _name: str, thing: Any, skip: bool, _options: Any) -> bool | None:
    """Fields of a named tuple: the class tells them, Python's own words for them say nothing."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def without_private(
    _app: Any, _what: str, _name: str, _thing: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """A signature without the fields of a dataclass that are nobody's to give."""
    return (re.sub(r", _\w+: .*? = <factory>", "", signature), returns) if signature else None


def setup(app: Any) -> None:
    """Hook the above into Sphinx."""

    def on_source(_app: Any, page: str, source: list[str]) -> None:
        path = HERE / f"{page}.md"
        if path.exists():
            source[0] = links_into_the_repository(source[0], f"{page}.md")

    def on_include(_app: Any, _path: Any, parent: str, content: list[str]) -> None:
        content[0] = links_into_the_repository(content[0], f"../{Path(str(_path)).name}")

    page = HERE / "api.md"
    if not page.exists() or page.read_text() != api_page():
        page.write_text(api_page())
    app.add_html_math_renderer("mathml", inline_renderers=(formula, None), block_renderers=(formula, None))
    app.connect("autodoc-skip-member", is_left_out)
    app.connect("autodoc-process-signature", without_private)
    app.connect("source-read", on_source)
    app.connect("include-read", on_include)
