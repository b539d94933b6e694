"""The pipeline as an installed command, and what it says where the extra's packages are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]
HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"monai", "nibabel", "rich", "yaml", "joblib", "pydicom", "scipy", "skimage",
                                      "jinja2", "matplotlib", "lightning_fabric", "tensorboard", "timm"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from tod_net_ct.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The example's folder as `pip install ./examples/tod_net_ct` leaves it, away from the clone."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, ROOT / "examples/tod_net_ct"], check=True)
    return target


def said(command: list[str], installed: Path, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "TASKLOSS_QUIET": "1"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_command_knows_its_name_and_needs_no_clone(installed, tmp_path) -> None:
    done = said([str(installed / "bin" / "tod-net-ct"), "--help"], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: tod-net-ct ") and "train-denoiser" in done.stdout
    for file in ("report.html.jinja", "report.css", "viewer.js"):
        assert (installed / "tod_net_ct" / "report" / file).exists(), "what is no Python comes along"


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["prepare", "smoke"], "yaml"),
        (["denoise", "--checkpoint", "x.pt", "--input", "x.nii", "--output", "y.nii"], ""),
    ],
    ids=["prepare", "denoise"],
)
def test_without_the_extra_help_works_and_a_missing_package_is_named(installed, tmp_path, arguments, package) -> None:
    assert said(["-c", HIDE, "--help"], installed, tmp_path).returncode == 0
    done = said(["-c", HIDE, *arguments], installed, tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    if package:
        assert done.stderr == f"{package}: expected this package, got none; pip install 'taskloss[ct]'\n"


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given, found) -> None:
    """Set before torch is there, for OpenMP reads it once."""
    code = "import examples.tod_net_ct, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | given, capture_output=True, text=True)
    assert done.stdout.split() == [found, "False"], done.stderr
