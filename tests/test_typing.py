"""A user's script passes mypy and pyright in strict mode, and runs."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from taskloss import Fidelity, InputError, LossSum, TaskOrientedLoss
from tests.properties import cross_entropy, segmenter

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "typed_script.py"


def test_the_script_runs() -> None:
    names = runpy.run_path(str(SCRIPT))
    assert names["loss"]["task"] is names["task"] and names["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_the_script_is_clean_to_a_type_checker(checker, tmp_path) -> None:
    pytest.importorskip(checker)
    shutil.copy(SCRIPT, tmp_path / "script.py")
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"typeCheckingMode": "strict", "extraPaths": ["{ROOT}"], "reportMissingTypeStubs": false}}'
    )
    command = {
        "mypy": ["mypy", "--strict", "--config-file=", "script.py"],
        "pyright": ["pyright", "--pythonpath", sys.executable, "script.py"],
    }[checker]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_term_is_found_by_its_name_and_kind() -> None:
    task = TaskOrientedLoss(segmenter(), cross_entropy)
    loss = LossSum(task=2 * task, mse=Fidelity(nn.MSELoss()))
    assert loss["task"] is task and loss["task", TaskOrientedLoss] is task
    with pytest.raises(InputError, match=r"loss_sum: there is no term 'tsk'; did you mean 'task'\?"):
        loss["tsk"]
    with pytest.raises(TypeError, match="the term 'mse' is a Fidelity, not a TaskOrientedLoss"):
        loss["mse", TaskOrientedLoss]


def test_terms_without_a_name_are_refused_in_one_sentence() -> None:
    with pytest.raises(TypeError, match=r"its terms have names; write LossSum\(fidelity=Fidelity\(...\)\)"):
        LossSum(Fidelity(nn.MSELoss()))
