"""The example's rooms: imports point one way between them and run in no circle within them, by their fronts alone."""

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import taskloss

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples.tod_net_ct"
HOUSE = ROOT / "examples" / "tod_net_ct"
FLOORS = [
    {"run"},
    {"dose"},
    {"scans", "networks", "metrics"},
    {"inference"},
    {"training"},
    {"evaluation"},
    {"report", "study"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in sorted(rooms)}
MODULES = sorted(HOUSE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Every import as (module, name), relative ones resolved, those within functions too."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def room_of(module: str) -> str:
    """The room in which a module of the example is; "" for the command line above them."""
    inside = module.removeprefix(EXAMPLE).lstrip(".").split(".")[0]
    return inside if inside in FLOOR else ""


def is_front(module: str, name: str) -> bool:
    """Whether this is a name that a room's front promises, or one of the room's modules as such."""
    return module.count(".") == 2 and (
        name in getattr(importlib.import_module(module), "__all__", ())
        or (HOUSE / room_of(module) / f"{name}.py").exists()
    )


def test_the_rooms_are_those_that_are_there() -> None:
    assert set(FLOOR) == {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    assert len(FLOORS) <= 7
    assert [path.name for path in HOUSE.glob("*.py")] and {path.name for path in HOUSE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
    }


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_says_in_two_sentences_what_it_is_for(room) -> None:
    text = importlib.import_module(f"{EXAMPLE}.{room}").__doc__ or ""
    assert len(re.findall(r"\.(?=\s|$)", text)) == 2, text


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_rooms_import_those_below_them_by_their_fronts(path) -> None:
    own = room_of(name_of(path))
    for module, name in imports_of(path):
        assert not module.startswith(("benchmarks", "tests", "docs")), module
        if not module.startswith(EXAMPLE) or (own and room_of(module) == own):
            continue
        room = room_of(module)
        assert room, f"{path.name} imports {module}, which is in no room"
        assert FLOOR[room] < FLOOR.get(own, len(FLOORS)), f"{own}/{path.name} imports {room}, which is not below it"
        assert is_front(module, name), f"{own}/{path.name} imports {name} of {module}, which its front does not promise"


@pytest.mark.parametrize("room", FLOOR)
def test_within_a_room_imports_run_in_no_circle(room) -> None:
    graph = {
        name_of(path): {
            module if (HOUSE / room / f"{module.rpartition('.')[2]}.py").exists() else f"{module}.{name}"
            for module, name in imports_of(path)
            if room_of(module) == room
        }
        for path in (HOUSE / room).glob("*.py")
        if path.name != "__init__.py"
    }
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_use_public_names_of_the_library_only(path) -> None:
    for module, name in imports_of(path):
        if module.split(".")[0] == "taskloss":
            assert module == "taskloss" and name in taskloss.__all__, f"{path.name} imports {name} of {module}"


@pytest.mark.parametrize(
    "path",
    sorted(
        [
            *(ROOT / "examples").glob("*.py"),
            *(ROOT / "benchmarks").rglob("*.py"),
            *(ROOT / "tests").rglob("*.py"),
        ]
    ),
    ids=lambda p: p.stem,
)
def test_all_others_enter_rooms_by_their_fronts(path) -> None:
    """A room's own tests, in the folder of its name, may look into its modules."""
    for module, name in imports_of(path):
        if module.startswith(EXAMPLE) and module != f"{EXAMPLE}.__main__" and (module, name) != (EXAMPLE, "__main__"):
            own = path.parent == ROOT / "tests" / "tod_net_ct" / room_of(module)
            assert own or is_front(module, name), f"{path.name} imports {name} of {module}"
