"""The blocks of docs/trainers.md as programs: each is a diff, a trainer without the library and one with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@dataclass(frozen=True)
class Recipe:
    """One block: its lines with their marks, and the names that all blocks share."""

    name: str
    lines: tuple[str, ...]
    shared: str

    @property
    def added(self) -> int:
        """How many lines one types."""
        return sum(line.startswith("+") and line[1:].strip() != "" for line in self.lines)

    def source(self, mark: str) -> str:
        """The trainer before (mark "-") or after (mark "+")."""
        return "\n".join(line[1:] for line in self.lines if line[:1] in (" ", mark))

    def run(self, mark: str = "+", *, seed: int = 0, **given: Any) -> dict[str, Any]:
        """Run it, or without a mark the shared lines alone; the names it made."""
        torch.manual_seed(seed)
        names: dict[str, Any] = {"__name__": self.name, **given}
        exec(compile(self.shared, f"{PAGE.name}, shared", "exec"), names)
        if mark:
            exec(compile(self.source(mark), f"{PAGE.name}, {self.name} {mark}", "exec"), names)
        return names


def recipes() -> dict[str, Recipe]:
    """Every block of the page by the heading it stands under."""
    text = PAGE.read_text()
    (shared,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    found = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return {name: Recipe(name, tuple(block.splitlines()), shared) for name, block in found}
