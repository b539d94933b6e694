"""Where the study's committed results lie: in a clone beside the rooms; installed as a command, where it is run."""

from pathlib import Path

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results" if (HERE / "results").is_dir() else Path("runs/study-results")
