"""Settings in groups: flat and grouped names, what a stage can read, and what decides its result."""

from __future__ import annotations

import ast
import pickle
from dataclasses import fields, replace
from pathlib import Path

import pytest

from examples.tod_net_ct.run import (
    PRESETS,
    Dose,
    Machine,
    Patches,
    Seed,
    Settings,
    decisive,
    finish,
    from_yaml,
    is_done,
    only,
)
from examples.tod_net_ct.run.settings import GROUPS

EXAMPLE = Path(__file__).parents[3] / "examples" / "tod_net_ct"


def test_every_field_is_in_one_group() -> None:
    names = [f.name for group in GROUPS.values() for f in fields(group)]
    assert sorted(names) == sorted(f.name for f in fields(Settings)) and len(set(names)) == len(names)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_of_settings_gives_them_back(preset, tmp_path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(PRESETS[preset].to_yaml())
    assert from_yaml(path, replace(Settings(), seed=99)) == PRESETS[preset]


def test_flat_and_grouped_names_mean_the_same(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    wanted = replace(Settings(), n_views=7, balance=False, steps=3, shape=(8, 32, 32), tuned=())
    path.write_text("n_views: 7\nbalance: false\nsteps: 3\nshape: [8, 32, 32]\ntuned: []\n")
    assert from_yaml(path, Settings()) == wanted
    path.write_text("dose:\n  n_views: 7\ntraining: {balance: false}\nsteps: 3\npatches: {shape: [8, 32, 32]}\n")
    assert from_yaml(path, Settings()) == wanted
    given = {"dose.n_views": "7", "training.balance": "no", "budget.steps": "3", "shape": "8x32x32"}
    assert Settings().with_overrides(given) == wanted


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("n_veiws", "there is no such setting; did you mean 'n_views'"),
        ("dose.n_veiws", "there is no such setting; did you mean 'n_views'"),
        ("dose.steps", "steps is in the group budget; --set budget.steps"),
        ("dosis.n_views", "there is no group 'dosis'; expected one of seed, data, split"),
    ],
)
def test_a_name_that_is_none_is_answered(name, answer) -> None:
    with pytest.raises(ValueError, match=answer) as error:
        Settings().with_overrides({name: "1"})
    assert "\n" not in str(error.value)


def test_a_stage_reads_its_groups_and_nothing_else() -> None:
    own = only(Settings(), Seed, Dose, Machine)
    assert own.n_views == Settings().n_views
    with pytest.raises(AttributeError, match="voxel_mm"):
        _ = own.voxel_mm
    assert pickle.loads(pickle.dumps(own)) == own, "other processes simulate with it"
    assert replace(own, n_views=3).n_views == 3


def test_all_but_what_is_set_aside_decides() -> None:
    assert set(decisive(only(Settings(), Seed, Patches, Machine))) == {
        "seed", "shape", "overlap", "voxel_mm", "patch", "precision"
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(EXAMPLE.rglob("*.py")), ids=lambda p: str(p.relative_to(EXAMPLE)))
def test_no_stage_types_by_hand_which_settings_decide(path) -> None:
    """Names of settings as strings, several in a row, would be such a list; a forgotten one keeps stale results."""
    known = {f.name for f in fields(Settings)}
    lists = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Tuple | ast.List)]
    for node in lists:
        names = [e.value for e in node.elts if isinstance(e, ast.Constant) and e.value in known]
        assert len(names) < 3 or path.name in ("real.py", "paper.py", "ranges.py"), (
            f"{path.name}:{node.lineno}: {names}"
        )


def test_a_run_of_an_earlier_version_is_taken_up(tmp_path) -> None:
    """Its manifests do not know every setting; what they leave out counts as having had its default."""
    settings = replace(Settings(), seed=3)
    old = decisive(only(settings, Seed, Patches)) | {"network": "unet", "cases": "0123"}
    finish(tmp_path, old)
    now = decisive(only(settings, Seed, Patches, Machine)) | {"network": "unet", "cases": "0123"}
    assert "precision" not in old and is_done(tmp_path, now)
    assert not is_done(tmp_path, now | {"precision": "bf16-mixed"}), "it was not made with that"
    assert not is_done(tmp_path, now | {"seed": 0}) and not is_done(tmp_path, now | {"network": "vnet"})
    assert not is_done(tmp_path, now | {"guide": "0123"}), "what is no setting has no default"
