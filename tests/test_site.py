"""The built site: every public name has its page, every link leads somewhere, the pages open without complaint."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

import taskloss

SITE = Path(__file__).parent.parent / "site"
pytestmark = [
    pytest.mark.docs,
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="build the site first: make docs"),
]


def pages() -> list[Path]:
    return [page for page in sorted(SITE.rglob("*.html")) if "_static" not in page.parts]


def test_every_public_name_has_a_page_in_the_table_of_names() -> None:
    table = (SITE / "api.html").read_text()
    for name in taskloss.__all__:
        if name != "__version__":
            assert f'href="api/taskloss.{name}.html' in table, name
            assert f'id="taskloss.{name}"' in (SITE / "api" / f"taskloss.{name}.html").read_text(), name


def test_every_public_method_is_told() -> None:
    for name in taskloss.__all__:
        thing = getattr(taskloss, name)
        if isinstance(thing, type):
            page = (SITE / "api" / f"taskloss.{name}.html").read_text()
            for method, what in vars(thing).items():
                if not method.startswith("_") and getattr(what, "__doc__", None) and callable(what):
                    assert f'id="taskloss.{name}.{method}"' in page, f"{name}.{method}"


def test_every_link_within_the_site_leads_somewhere() -> None:
    anchors: dict[Path, set[str]] = {}
    broken = []
    for page in pages():
        for link in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            target, _, anchor = unquote(html.unescape(link)).partition("#")
            if re.match(r"[a-z]+:|//", target) or not (target or anchor):
                continue
            path = (page.parent / target.split("?")[0]).resolve() if target else page
            if not path.exists():
                broken.append(f"{page.relative_to(SITE)}: {link}")
            elif anchor and path.suffix == ".html":
                if path not in anchors:
                    anchors[path] = set(re.findall(r'\b(?:id|name)="([^"]+)"', path.read_text()))
                if anchor not in anchors[path]:
                    broken.append(f"{page.relative_to(SITE)}: {link}")
    assert not broken, broken


def test_no_page_needs_anything_from_elsewhere() -> None:
    for page in pages():
        loads = re.findall(
            r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)"', page.read_text()
        )
        assert not loads, f"{page.relative_to(SITE)}: {loads}"
    assert "<math" in (SITE / "api" / "taskloss.GradientBalancer.html").read_text()


def test_the_gallery_is_there_as_scripts_and_notebooks() -> None:
    scripts = sorted((SITE.parent / "docs" / "gallery").glob("*.py"))
    assert len(scripts) >= 8
    for script in scripts:
        page = (SITE / "auto_gallery" / f"{script.stem}.html").read_text()
        assert f"{script.stem}.ipynb" in page and f"{script.stem}.py" in page


@pytest.mark.parametrize("page", ["index", "start", "lean", "api", "auto_gallery/plot_07_volumes", "benchmarks"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_opens_in_a_browser_without_complaint(page, width, tmp_path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", (SITE / f"{page}.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "Uncaught" in line]
    assert not complaints, complaints
    assert "</html>" in done.stdout
