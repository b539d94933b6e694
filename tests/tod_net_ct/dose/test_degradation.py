"""The low-dose stage: the same noise whoever does the work, real pairs left alone, resumption case by case."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.tod_net_ct.dose import case_seed, degrade, simulate_volume
from examples.tod_net_ct.dose import degradation as stage
from examples.tod_net_ct.dose.simulate import low_dose
from examples.tod_net_ct.run import Settings, load_tensors, save_tensors, write_text

pytest.importorskip("joblib")

SETTINGS = Settings(n_views=20, voxel_mm=(6.0, 12.0, 12.0))
# Shapes and voxel sizes differ, as in an archive of whole scans; the third is longer than one batch of slices.
CASES = {
    "test-000": ((3, 20, 20), (5.0, 14.0, 14.0)),
    "test-001": ((4, 20, 20), (1.0, 12.0, 12.0)),
    "train-000": ((stage.SLICES + 3, 16, 24), (3.0, 13.0, 13.0)),
    "train-001": ((2, 20, 20), (6.0, 12.0, 12.0)),
}


def body(shape: tuple[int, int, int]) -> torch.Tensor:
    volume = torch.full(shape, -1000, dtype=torch.int16)
    volume[:, 5:-5, 5:-5] = 40
    return volume


def prepared(run: Path, cases=CASES) -> Path:
    for name, (shape, voxel_mm) in cases.items():
        voxel = {"voxel_mm": torch.tensor(voxel_mm)}
        save_tensors(run / "cases" / f"{name}.pt", normal_hu=body(shape), mask=torch.zeros(shape).byte(), **voxel)
    write_text(run / "cases" / "manifest.json", json.dumps({"facts": {}, "results": {}}))
    return run


def results(run: Path) -> dict[str, str]:
    """Digests of every file but the machine's part of the manifest."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (run / "low_dose").glob("*.pt")}
    manifest = json.loads((run / "low_dose" / "manifest.json").read_text())
    return files | {"facts": manifest["facts"], "results": manifest["results"]}


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, str]:
    run = prepared(tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKLOSS_QUIET", "1")
        degrade(SETTINGS, run)
    return results(run)


def test_a_case_is_simulated_at_its_own_voxel_size_with_the_seed_of_its_number(tmp_path) -> None:
    run = prepared(tmp_path)
    degrade(SETTINGS, run)
    for number, (name, (shape, voxel_mm)) in enumerate(CASES.items()):
        expected = low_dose(
            body(shape).float(), voxel_mm, SETTINGS.i0_photons, kernel=SETTINGS.kernel,
            generator=1_000_003 * (SETTINGS.seed + 1) + number, n_views=20,
        )  # fmt: skip
        made = load_tensors(run / "low_dose" / f"{name}.pt")
        assert made["low_hu"].dtype == torch.int16
        assert torch.equal(made["low_hu"], expected.volume_hu.round().to(torch.int16))
        torch.testing.assert_close(made["noise_std_hu"], expected.noise_std_hu)
        assert made["readings"].tolist() == [expected.n_clamped, expected.n_rays]


def test_what_a_killed_stage_left_is_no_case(tmp_path, alone) -> None:
    run = prepared(tmp_path)
    (run / "cases" / ".unfinished-0123-test-000.pt").write_bytes(b"half")
    degrade(SETTINGS, run)
    assert results(run) == alone


def test_two_processes_make_the_same_files_as_one(tmp_path, alone) -> None:
    degrade(replace(SETTINGS, jobs=2), prepared(tmp_path))
    assert results(tmp_path) == alone


# The cluster's own threads and sockets close late, beyond our reach
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed", "ignore::DeprecationWarning:tornado")
def test_a_dask_cluster_makes_the_same_files(tmp_path, alone) -> None:
    distributed = pytest.importorskip("distributed")
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(protocol="tcp", **options) as cluster:
        degrade(SETTINGS, prepared(tmp_path), dask=cluster.scheduler_address)
    assert results(tmp_path) == alone


def test_shards_do_their_own_cases_and_the_last_writes_the_manifest(tmp_path, alone, capsys) -> None:
    run = prepared(tmp_path)
    degrade(SETTINGS, run, shard="2/2")
    assert {p.stem for p in (run / "low_dose").glob("*.pt")} == {"test-001", "train-001"}
    assert not (run / "low_dose" / "manifest.json").exists()
    assert "2 of 4 cases are left to other shards, such as test-000" in capsys.readouterr().out
    degrade(SETTINGS, run, shard="1/2")
    assert results(run) == alone


def test_a_call_without_a_shard_does_what_the_shards_left(tmp_path, alone) -> None:
    run = prepared(tmp_path)
    degrade(SETTINGS, run, shard="1/3")
    kept = (run / "low_dose" / "test-000.pt").stat().st_mtime_ns
    degrade(SETTINGS, run)
    assert results(run) == alone
    assert (run / "low_dose" / "test-000.pt").stat().st_mtime_ns == kept


def test_a_killed_stage_goes_on_where_it_stopped_and_other_facts_start_anew(tmp_path, alone, monkeypatch) -> None:
    run = prepared(tmp_path)
    with monkeypatch.context() as patch:
        calls = []

        def killed(path, **tensors):
            calls.append(path)
            if len(calls) == 3:
                raise KeyboardInterrupt
            save_tensors(path, **tensors)

        patch.setattr(stage, "save_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            degrade(SETTINGS, run)
    stamps = {path: path.stat().st_mtime_ns for path in (run / "low_dose").glob("*.pt")}
    assert len(stamps) == 2
    degrade(SETTINGS, run)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert results(run) == alone
    degrade(replace(SETTINGS, i0_photons=1e5), run)
    assert all(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items())


def test_the_number_of_processes_is_no_reason_to_simulate_again(tmp_path) -> None:
    run = prepared(tmp_path)
    degrade(SETTINGS, run)
    stamp = (run / "low_dose" / "manifest.json").stat().st_mtime_ns
    degrade(replace(SETTINGS, jobs=2), run)
    assert (run / "low_dose" / "manifest.json").stat().st_mtime_ns == stamp


CHANGES = ({"seed": 1}, {"electronic_noise_photons": 50.0}, {"kernel": "hann"}, {"n_views": 24}, {"bowtie": True},
           {"dose_fraction": 0.5})  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_setting_of_the_simulation_is_a_reason_to(change, tmp_path) -> None:
    run = prepared(tmp_path, {"train-000": ((2, 20, 20), (5.0, 12.0, 12.0))})
    degrade(SETTINGS, run)
    before = load_tensors(run / "low_dose" / "train-000.pt")["low_hu"]
    degrade(replace(SETTINGS, **change), run)
    assert not torch.equal(load_tensors(run / "low_dose" / "train-000.pt")["low_hu"], before)


def test_measured_pairs_are_copied_and_recorded(tmp_path) -> None:
    run = prepared(tmp_path)
    measured = torch.randint(-900, 900, (3, 20, 20), dtype=torch.int16)
    save_tensors(run / "cases" / "test-000.pt", normal_hu=body((3, 20, 20)), mask=measured.byte(), low_hu=measured)
    degrade(SETTINGS, run)
    assert torch.equal(load_tensors(run / "low_dose" / "test-000.pt")["low_hu"], measured)
    found = results(run)["results"]
    assert found["measured"] == ["test-000"]
    assert set(found["noise_std_hu"]) == {"test-001", "train-000", "train-001"}


def test_a_bowtie_takes_photons_from_the_sides() -> None:
    beam = stage.ParallelBeam(20, 20, 16.0)
    volume, fluence = body((2, 20, 20)), stage.bowtie_fluence(beam.bin_mm, 160.0)
    assert fluence.min() < 0.1 * fluence.max()
    made = simulate_volume(volume, (5.0, 16.0, 16.0), replace(SETTINGS, bowtie=True), 7)["low_hu"]
    expected = low_dose(
        volume.float(), (5.0, 16.0, 16.0), SETTINGS.i0_photons, generator=7, kernel="ramp", fluence=fluence, beam=beam
    )
    assert torch.equal(made, expected.volume_hu.round().to(torch.int16))


def test_a_dose_fraction_adds_only_the_difference_between_two_doses() -> None:
    clean = body((80, 20, 20))
    fraction = replace(SETTINGS, i0_photons=8e5, dose_fraction=0.25, electronic_noise_photons=0.0)
    whole, quarter = replace(fraction, dose_fraction=0.0), replace(fraction, i0_photons=2e5, dose_fraction=0.0)

    def variance(settings: Settings) -> float:
        noise = simulate_volume(clean, (5.0, 12.0, 12.0), settings, 0)["low_hu"].float() - clean
        return float(noise.var())

    assert variance(fraction) == pytest.approx(variance(quarter) - variance(whole), rel=0.05)


def test_a_projector_is_built_once_for_all_pixel_sizes(tmp_path, monkeypatch) -> None:
    built = []

    class Counting(stage.ParallelBeam):
        def __init__(self, *arguments) -> None:
            built.append(arguments)
            super().__init__(*arguments)

    stage._matrices.cache_clear()
    monkeypatch.setattr(stage, "ParallelBeam", Counting)
    degrade(SETTINGS, prepared(tmp_path))
    assert built == [((20, 20), 20), ((16, 24), 20)]


def test_volumes_are_in_float_a_few_slices_at_a_time(monkeypatch) -> None:
    lengths = []
    monkeypatch.setattr(stage, "low_dose", lambda v, *a, **k: lengths.append(len(v)) or low_dose(v, *a, **k))
    simulate_volume(body((2 * stage.SLICES + 1, 16, 16)), (5.0, 12.0, 12.0), SETTINGS, 0)
    assert lengths == [stage.SLICES, stage.SLICES, 1]


def test_the_threads_are_left_as_found(tmp_path, monkeypatch) -> None:
    used = []
    monkeypatch.setattr(
        stage, "simulate_volume", lambda *a: used.append(torch.get_num_threads()) or simulate_volume(*a)
    )
    torch.set_num_threads(2)
    try:
        degrade(SETTINGS, prepared(tmp_path))
        assert torch.get_num_threads() == 2 and set(used) == {1}
    finally:
        torch.set_num_threads(1)


def test_the_seed_is_a_cases_own() -> None:
    seeds = {case_seed(replace(SETTINGS, seed=s), number) for s in range(3) for number in range(50)}
    assert len(seeds) == 150


MISTAKES = {
    "shard": ({}, {"shard": "3/2"}, "--shard 3/2: expected i/n with i from 1 to n, for example --shard 1/8"),
    "shard word": ({}, {"shard": "one"}, "--shard one: expected i/n with i from 1 to n, for example --shard 1/8"),
    "route": ({"route": "slow"}, {}, "route: expected fast or catsim, got 'slow'; for example --set route=fast"),
    "kernel": (
        {"kernel": "B30f"}, {},
        "kernel: expected one of ramp, shepp-logan, cosine, hamming, hann, got 'B30f'; try --set kernel=hann",
    ),
    "fraction": (
        {"dose_fraction": 25.0}, {}, "dose_fraction: expected 0 (off) to 1, got 25.0; try dose_fraction=0.25",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "options", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_sentence_and_no_folder(changes, options, sentence, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        degrade(replace(SETTINGS, **changes), prepared(tmp_path), **options)
    assert not (tmp_path / "low_dose").exists()


def test_cases_must_be_prepared_first(tmp_path) -> None:
    with pytest.raises(ValueError, match="cases: holds no prepared cases; run the command prepare first"):
        degrade(SETTINGS, tmp_path)


def test_a_case_that_cannot_be_simulated_is_named(tmp_path) -> None:
    prepared(tmp_path, {"train-000": ((2, 20, 20), (5.0, 1.0, 1.5))})
    with pytest.raises(ValueError, match=r"train-000.pt: low_dose: pixels must be square, got dy = 1.0 and dx = 1.5"):
        degrade(SETTINGS, tmp_path)
    assert not list((tmp_path / "low_dose").glob("*.pt"))


def test_a_scheduler_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(stage, "DASK_TIMEOUT_S", 0.3)
    with pytest.raises(ValueError, match="--dask tcp://127.0.0.1:9: no scheduler answers; start one with"):
        degrade(SETTINGS, prepared(tmp_path), dask="tcp://127.0.0.1:9")


def test_a_killed_process_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="a process was killed, .* run it again with fewer --jobs"):
        list(stage._spread(_die, [(0, Path())] * 2, 2, ""))


def _die(number: int, path: Path) -> None:
    os._exit(1)
