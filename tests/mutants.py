"""Apply each breakage of mutants.md to a copy of the project and show that its test dies: ``make mutants``.

``python -m tests.mutants WORD ...`` takes the rows alone whose file's name holds one of the words.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def mutants() -> list[tuple[str, str, str, str]]:
    """The rows of the tables: file (in ``taskloss``, or with its path), line, what it becomes, test."""
    rows = []
    for line in (ROOT / "tests" / "mutants.md").read_text().splitlines():
        found = re.fullmatch(r"\| ([\w/]+\.py) \| `(.*?)` \| `(.*?)` \| (\S+) \|", line)
        if found:
            rows.append(found.groups())
    return rows  # type: ignore[return-value]


def passes(copy: Path, *tests: str) -> bool:
    """Whether tests pass in the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{t}" for t in tests)]
    return subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Run the table; the exit code counts the survivors."""
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("taskloss", "examples", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        words = sys.argv[1:] or [""]
        rows = [row for row in mutants() if any(word in row[0] for word in words)]
        for test in sorted({test for *_, test in rows}):
            if not passes(copy, test):
                print(f"{test} fails without any mutant")
                return 1
        for file, line, becomes, test in rows:
            path = copy / file if "/" in file else copy / "taskloss" / file
            original = path.read_text()
            if original.count(line + "\n") != 1:
                print(f"STALE     {file}: {line.strip()}")
                survivors += 1
                continue
            path.write_text(original.replace(line + "\n", becomes + "\n"))
            alive = passes(copy, test)
            path.write_text(original)
            survivors += alive
            print(f"{'SURVIVED ' if alive else 'died     '} {file}: {line.strip()} -> {becomes.strip()}", flush=True)
    print(f"{len(rows) - survivors} of {len(rows)} mutants died")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
