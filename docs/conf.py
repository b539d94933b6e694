"""The site: pages in Markdown, the API from the docstrings, a gallery that is run. `make docs` builds it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import _site  # noqa: E402 - this folder's own

import taskloss  # noqa: E402

project = "taskloss"
author = "the taskloss contributors"
project_copyright = "2026, the taskloss contributors"
version = release = taskloss.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["gallery", "_build"]
templates_path = ["_templates"]
nitpicky = True
nitpick_ignore_regex = _site.OTHERS  # types of other libraries, whose sites the build does not need

myst_enable_extensions = ["colon_fence", "dollarmath", "attrs_inline"]
myst_heading_anchors = 3
# A page is also read in the repository, where a block of shell or plain text has no lexer to please.
suppress_warnings = ["misc.highlighting_failure", "config.cache", "toc.empty_glob"]

autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Shape", "Units"]
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88

html_math_renderer = "mathml"  # of _site.py
bibtex_bibfiles = ["refs.bib"]
bibtex_default_style = "plain"

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": (_site.figures,),
    "reset_modules": ("matplotlib", _site.same_start),
    "capture_repr": ("_repr_html_",),
    "matplotlib_animations": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 0,
    "write_computation_times": False,  # a page that loads scripts from elsewhere
    "download_all_examples": True,
    "abort_on_example_error": True,
    "doc_module": ("taskloss",),
    "backreferences_dir": "api/used_in",
    "reference_url": {"taskloss": None},
    "remove_config_comments": True,
}
warnings.filterwarnings("ignore", category=UserWarning, message=".*Agg.*")

html_theme = "pydata_sphinx_theme"
html_title = "taskloss"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_sidebars = {"index": [], "start": [], "concepts": []}  # pages without a section of their own
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "icon_links": [{"name": "Repository", "url": _site.HOME, "icon": "fa-brands fa-github"}],
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def setup(app: object) -> None:
    """Links out of this folder lead into the repository; the API page lists every public name."""
    _site.setup(app)
