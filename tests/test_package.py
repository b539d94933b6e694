"""The package as a whole: its layers, its weight, its front door, and the prose that runs."""

import ast
import os
import re
import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pytest

import taskloss

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"eager"},
    {"checks", "conv3d", "trees", "distributed", "folding", "lean_layers", "page", "randomness", "signals", "_version"},
    {"finite", "precision", "holdings", "lean", "arguments", "calls", "labels", "memory", "ranges", "reach", "weights"},
    {"features", "diagnosis", "sharing", "values"},
    {"pieces"},
    {"frozen", "algebra", "watching"},
    {"blame", "samples"},
    {"audit", "preprocess", "transfer"},
    {"looks"},
    {"task", "consistency", "fidelity", "constraints"},
    {"critic", "gradients"},
    {"adversarial", "balancing", "figures"},
    {"history"},
]
DEPTH = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "taskloss").glob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down_only(path) -> None:
    for name in imports_of(path):
        assert not name.startswith(("examples", "benchmarks", "docs", "tests")), name
        if name.startswith("taskloss.") and path.stem != "__init__":
            assert DEPTH[name.split(".")[1]] < DEPTH[path.stem], f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: p.stem)
def test_examples_use_public_names_only(path) -> None:
    for name in imports_of(path):
        assert name == "taskloss" or not name.startswith("taskloss"), name


@pytest.mark.parametrize("folder", ["taskloss", "examples", "benchmarks", "docs", "tests"])
def test_no_function_is_longer_than_60_lines(folder) -> None:
    """Its docstring not counted; branches are ruff's matter (C901, PLR0912)."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                said = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
                lines = node.end_lineno - node.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0)
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines; tell it in steps"


def test_only_the_front_door_is_the_interface() -> None:
    """The modules behind it may change in any version: CONTRIBUTING says so, and no page imports one."""
    assert "`taskloss.__all__`" in (ROOT / "CONTRIBUTING.md").read_text()
    seen = {name for name in dir(taskloss) if not name.startswith("_") and not ismodule(getattr(taskloss, name))}
    assert seen == set(taskloss.__all__) - {"__version__"}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        assert not re.findall(r"(?:from|import) taskloss\.(?!_)", page.read_text()), page.name


def test_the_core_imports_torch_and_the_standard_library_alone() -> None:
    code = "import sys, taskloss; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    code = "import sys, torch; print(*{m.split('.')[0] for m in sys.modules})"
    base = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    extra = loaded - base - set(sys.stdlib_module_names)
    assert extra <= {"taskloss"} | {m for m in extra if m.startswith("__editable__")}, extra


def loaded_by(code: str) -> set[str]:
    """The library's modules that are there after some lines, in a process of their own."""
    code += "; import sys; print(*(m.removeprefix('taskloss.') for m in sys.modules if m.startswith('taskloss.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    assert loaded_by("import taskloss; dir(taskloss)") == {"_version"}
    training = "from taskloss import AdversarialLoss, Fidelity, LossSum, TaskOrientedLoss, WassersteinCritic"
    assert not loaded_by(training) & {"audit", "figures", "gradients", "history", "page", "signals", "transfer"}


def test_every_name_is_found_where_type_checkers_look_for_it() -> None:
    seen = {
        f"taskloss.{home}": tuple(sorted(names))
        for home, names in taskloss._HOMES.items()
        if all(getattr(taskloss, name).__module__ == f"taskloss.{home}" for name in names)
    }
    typed = {
        node.module: tuple(sorted(alias.name for alias in node.names))
        for node in ast.walk(ast.parse((ROOT / "taskloss" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "importlib", "taskloss._version")
    }
    assert seen == typed
    assert sorted([*taskloss._HOME, "__version__"]) == sorted(taskloss.__all__)
    with pytest.raises(AttributeError, match="module 'taskloss' has no attribute 'TaskLoss'"):
        taskloss.TaskLoss  # noqa: B018


@pytest.mark.parametrize("names", ["", "; from taskloss import *"], ids=["import", "every name"])
def test_import_costs_at_most_50_ms_over_torch(names) -> None:
    # Processor time, and the least of a few: a busy machine must not fail the library. With bytecode, as installed.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    code = f"import time, torch; t = time.process_time(); import taskloss{names}; print(time.process_time() - t)"
    costs = []
    while len(costs) < 4 and not (costs and costs[-1] <= 0.05):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        costs.append(float(done.stdout))
    assert min(costs) <= 0.05, costs


def test_the_front_door() -> None:
    promised = [
        "TaskOrientedLoss",
        "TaskConsistencyLoss",
        "Fidelity",
        "WassersteinCritic",
        "WeightClipping",
        "GradientPenalty",
        "AdversarialLoss",
        "LossSum",
        "Frozen",
        "audit_task_model",
        "GradientBalancer",
        "gradient_maps",
        "plot_gradient_maps",
        "TransferMeter",
    ]
    assert set(promised) <= set(taskloss.__all__)
    assert all(getattr(taskloss, name).__doc__ for name in taskloss.__all__ if name != "__version__")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_blocks_of_a_page_run(page, tmp_path, monkeypatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_links_of_a_page_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_mutant_still_breaks_a_line_that_exists() -> None:
    from tests.mutants import mutants

    rows = mutants()
    assert len(rows) >= 12
    for file, line, becomes, test in rows:
        path = ROOT / file if "/" in file else ROOT / "taskloss" / file
        assert path.read_text().count(line + "\n") == 1, line
        assert becomes != line
        assert (ROOT / "tests" / test.split("::")[0]).exists(), test
