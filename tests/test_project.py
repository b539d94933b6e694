"""What people see of the project before they run it: metadata, citation, links, workflows, archives."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import taskloss

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))  # a source archive has none


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_citation_and_changelog_agree() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    dated = re.search(r"^date-released: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    newest = re.search(r"^## (\d.*) - (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert cited and dated and newest
    assert (cited[1], dated[1]) == newest.groups()
    assert taskloss.__version__ == cited[1]


def test_the_address_is_one_everywhere() -> None:
    home = pyproject()["project"]["urls"]["Homepage"]
    assert f'HOME = "{home}"' in (ROOT / "docs" / "_site.py").read_text()
    assert f'repository-code: "{home}"' in (ROOT / "CITATION.cff").read_text()
    for rule in pyproject()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        assert home.removeprefix("https://github.com") in rule["replacement"]


def test_whatever_the_code_cites_is_among_the_references() -> None:
    listed = {}
    for entry in (ROOT / "docs" / "refs.bib").read_text().split("\n@")[1:]:
        key = re.search(r"{(\w+),", entry)[1]
        told = dict(re.findall(r"^  (\w+) = {(.*)},?$", entry, flags=re.MULTILINE))
        assert {"author", "title", "year"} <= told.keys() and told["year"] in key, key
        assert told.keys() & {"booktitle", "journal"}, key
        first = re.sub(r"{\\'e}", "é", told["author"]).split(",")[0]
        listed.setdefault(first, set()).add(told["year"])
    for folder in ("taskloss", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for name, year in re.findall(r"([A-Z]\w+) et al\b\D*?((?:19|20)\d\d)\b", file.read_text()):
                assert year in listed.get(name, ()), f"{file.name}: {name} et al., {year}"


def test_the_numbers_of_the_page_on_lean_networks_are_those_of_the_code() -> None:
    from taskloss import lean, pieces

    page = (ROOT / "docs" / "lean.md").read_text()
    assert f"fewer than {lean._SMALL:,} values" in page and f"below {pieces._ENOUGH:g} of what T keeps" in page


def test_every_python_version_told_is_tested() -> None:
    told = re.findall(r"Python :: (3\.\d+)", "\n".join(pyproject()["project"]["classifiers"]))
    if not WORKFLOWS:
        pytest.skip("a source archive has no workflows")
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert matrix and re.findall(r"[\d.]+", matrix[1]) == told
    assert pyproject()["project"]["requires-python"] == f">={told[0]}"


def test_the_readmes_links_lead_somewhere_on_pypi_too() -> None:
    text = (ROOT / "README.md").read_text()
    for rule in pyproject()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith(("https://", "#")) for target in targets), targets


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_run_what_a_contributor_runs(workflow) -> None:
    yaml = pytest.importorskip("yaml")
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name, job in yaml.safe_load(workflow.read_text())["jobs"].items():
        if "uses" in job:
            assert (ROOT / job["uses"]).exists(), name
        for step in job.get("steps", []):
            for target in re.findall(r"make ((?:[a-z-]+ ?)+)", step.get("run", "")):
                assert set(target.split()) <= made, f"{name}: make {target}"


@pytest.mark.slow
def test_the_archive_has_its_tests_and_the_wheel_only_the_library(tmp_path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("hatch_fancy_pypi_readme")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"tests/test_package.py", "examples/digits.py", "docs/concepts.md", "Makefile"} <= names
    (wheel,) = tmp_path.glob("*.whl")
    import zipfile

    inside = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert inside == {"taskloss", f"taskloss-{taskloss.__version__}.dist-info"}


def tells_tensors() -> list[tuple[str, object]]:
    """Public functions and methods that take a tensor."""
    found = []
    for name in taskloss.__all__:
        thing = getattr(taskloss, name)
        members = vars(thing).items() if isinstance(thing, type) else [("", thing)]
        for method, function in members:
            if inspect.isfunction(function) and not method.startswith("_"):
                hints = (str(p.annotation) for p in inspect.signature(function).parameters.values())
                if any("Tensor" in hint for hint in hints):
                    found.append((f"{name}.{method}".rstrip("."), function))
    return found


@pytest.mark.parametrize(("name", "function"), tells_tensors(), ids=lambda x: x if isinstance(x, str) else "")
def test_whoever_takes_a_tensor_tells_its_shape(name, function) -> None:
    assert "Shape:" in (inspect.getdoc(function) or ""), name
