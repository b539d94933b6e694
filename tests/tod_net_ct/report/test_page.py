"""The report: one page that carries everything, its figures, and the case viewer in a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.tod_net_ct.run import PRESETS

for package in ("monai", "skimage", "matplotlib", "jinja2"):
    pytest.importorskip(package)

from examples.tod_net_ct.evaluation import scores as evaluate  # noqa: E402
from examples.tod_net_ct.networks import Denoiser, save_checkpoint  # noqa: E402
from examples.tod_net_ct.report import plots, report  # noqa: E402
from examples.tod_net_ct.report.page import _columns, _embedded, _viewed_cases, warnings_of  # noqa: E402
from examples.tod_net_ct.report.plots import FALSE, HIT, MISSED, Pictures, overlay, read_log  # noqa: E402
from examples.tod_net_ct.report.viewer import viewer_data  # noqa: E402
from examples.tod_net_ct.run import save_tensors, write_text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LOG = """step,g/mse,g/task,norm/mse,norm/task,weight/mse,weight/task,validation/mse
1,0.5,0.9,1,2,3,4,
2,0.4,0.8,1,2,3,4,0.1
"""


class Bright(nn.Module):
    """A task network that finds what is brighter than a level."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, image):
        return torch.cat([torch.full_like(image, self.level), image], dim=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole run of two denoisers and two task networks, made up where it would take long, and its report."""
    run = tmp_path_factory.mktemp("run")
    settings = replace(
        PRESETS["smoke"], n_test=3, shape=(16, 32, 32), voxel_mm=(3.0, 2.0, 2.0), task_networks=("unet", "vnet"),
        denoisers=("mse_wgan", "tod_net"),
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    about = {}
    for i in range(3):
        normal_hu, mask = torch.full((16, 32, 32), -1000), torch.zeros(16, 32, 32, dtype=torch.uint8)
        normal_hu[:, 4:28, 2:30] = 0
        mask[3 : 9 + i, 8:20, 6:18] = 1
        normal_hu[mask > 0] = 100
        low_hu = (normal_hu + 80 * torch.randn(mask.shape, generator=g)).to(torch.int16)
        name = f"test-{i:03d}"
        voxel_mm = torch.tensor(settings.voxel_mm)
        save_tensors(run / f"cases/{name}.pt", normal_hu=normal_hu.to(torch.int16), mask=mask, voxel_mm=voxel_mm)
        save_tensors(run / f"low_dose/{name}.pt", low_hu=low_hu)
        about[name] = {"training_slices": 16, "on_training_grid": True}
    facts = {"shape": settings.shape, "voxel_mm": settings.voxel_mm, "overlap": 0.5, "organ": settings.organ}
    manifest = {"facts": facts, "results": {"cases": about, "warning": "patient <7> served in more than one split"}}
    write_text(run / "cases" / "manifest.json", json.dumps(manifest))
    write_text(run / "low_dose" / "manifest.json", json.dumps({"facts": {}, "results": {}}))
    for seed, name in enumerate(settings.denoisers):
        torch.manual_seed(seed)
        for kind in ("best", "half"):
            path = run / "denoisers" / name / f"{kind}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, Denoiser(2))
        write_text(run / "denoisers" / name / "log.csv", LOG)
    for name in settings.task_networks:
        save_tensors(run / "task" / name / "weights.pt", nothing=torch.zeros(1))
        write_text(run / "task" / name / "log.csv", "step,dice_loss\n1,0.9\n2,0.5\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKLOSS_QUIET", "1")
        for module in (evaluate, plots):
            patch.setattr(module, "load_task", lambda _s, _r, name="unet": Bright(0.6 if name == "unet" else 0.65))
        patch.setattr("examples.tod_net_ct.networks.perceptual_loss", lambda *_: None)
        evaluate.evaluate(settings, run)
        page = report(settings, run)
    return settings, run, page.read_text()


def test_the_page_needs_no_network(made) -> None:
    _, _, page = made
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page) and "import(" not in page and "fetch(" not in page
    assert "url(http" not in page and "@import" not in page


def test_the_first_lines_tell_the_dose(made, monkeypatch) -> None:
    settings, run, page = made
    for module in (evaluate, plots):
        monkeypatch.setattr(module, "load_task", lambda _s, _r, name="unet": Bright(0.6))
    monkeypatch.setattr("examples.tod_net_ct.networks.perceptual_loss", lambda *_: None)
    assert "Low dose at 15,000 photons per ray. Seed 0." in page
    noisy = report(replace(settings, i0_photons=1e5, dose_fraction=0.05), run).read_text()
    assert "Normal dose at 100,000 photons per ray, low dose at 5 % of it. Seed 0." in re.sub(r"\s+", " ", noisy)


def test_the_page_holds_every_table_and_figure(made) -> None:
    _, run, page = made
    for name in ("table1", "table2", "table3", "table2_surface", "table3_surface"):
        for kind in ("md", "tex", "csv"):
            assert (run / "tables" / f"{name}.{kind}").stat().st_size > 100
    for name in ("fig2", "fig3", "dice", "learning", "task_learning"):
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"data:image/(?:png|webp);base64,", page)) == 6
    for words in ("Dice (%) on normal dose", "The paper's own numbers", "rmsprop", "EfficientNet-Lite0", "torch "):
        assert words in page, words
    assert "n = 3" not in page and "With 3 cases the smallest p that Wilcoxon can give is 0.25" in page


def test_every_picture_and_control_is_told_in_words(made) -> None:
    _, _, page = made
    assert all(re.search(r'alt="[^"]{10,}"', image) for image in re.findall(r"<img[^>]*>", page))
    body = page[: page.index('<script type="application/json"')]
    for control in re.findall(r"<(?:input|select)[^>]*>", body):
        name = re.search(r'id="([^"]+)"', control)
        before = body[: body.index(control)]
        inside_a_label = before.rfind("<label") > before.rfind("</label>")
        assert inside_a_label or (name and f'for="{name[1]}"' in body), control


def test_what_a_manifest_warns_of_is_shown_and_escaped(made) -> None:
    _, run, page = made
    assert warnings_of(run) == ["patient <7> served in more than one split"]
    assert "patient &lt;7&gt; served" in page and "<7>" not in page


def test_the_tables_are_printed_with_their_reading(made) -> None:
    _, run, _ = made
    text = (run / "table.md").read_text()
    assert "Dice on low dose, by networks that no training saw: TOD-Net minus MSE-WGAN: V-Net" in text
    assert "TOD-Net minus MSE-WGAN" in (run / "tables" / "comparisons.md").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_the_viewer_works_in_a_browser(made, tmp_path) -> None:
    """Opens the page, scrolls every case by wheel, slider and keys, switches image and overlays: no error."""
    _, run, _ = made
    root = _open(run / "report.html", tmp_path)
    assert 'data-selftest="passed"' in root and 'data-problems=""' in root, root


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_the_browser_test_can_fail(made, tmp_path) -> None:
    """Teeth: a viewer that forgets to draw and a script that throws are both found."""
    _, _, page = made
    broken = page.replace("if (moved) draw();", "if (moved) setTimeout(() => nowhere());")
    assert broken != page
    (tmp_path / "broken.html").write_text(broken)
    root = _open(tmp_path / "broken.html", tmp_path / "profile")
    assert 'data-selftest="failed: test-001: wheel' in root and "nowhere is not defined" in root


def _open(page: Path, profile: Path) -> str:
    """The opening tag of the page after its self-test, as a browser leaves it."""
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
    )
    for attempt in range(3):  # a headless browser on a busy machine hangs now and then
        command = [BROWSER, *quiet.split(), f"--user-data-dir={profile}-{attempt}", f"{page.as_uri()}#selftest"]
        browser = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        with browser:
            try:
                dom = browser.communicate(timeout=90)[0]
            except subprocess.TimeoutExpired:
                os.killpg(browser.pid, signal.SIGKILL)
                continue
        if root := re.search(r"<html[^>]*data-selftest[^>]*>", dom):
            return root[0]
    pytest.fail(f"{BROWSER} did not come to the end of {page.name}#selftest in three attempts")


# the viewer's data


def pictures(depth: int, side: int, names=("normal_dose", "low_dose", "tod_net"), case: str = "test-000") -> Pictures:
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(depth, side, side, dtype=torch.bool)
    mask[depth // 4 : -depth // 4, side // 4 : -side // 4, side // 4 : -side // 4] = True
    images = {name: torch.randn(depth, side, side, generator=g) * 60 for name in names}
    return Pictures(case, (2.0, 1.0, 1.0), mask, images, {name: {"unet": mask.roll(2, 2)} for name in names})


def unpacked(packed: str, shape: tuple[int, ...]) -> np.ndarray:
    change = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8).reshape(shape)
    return np.cumsum(change, axis=-1, dtype=np.uint8)


def test_the_viewer_carries_the_slices_exactly() -> None:
    shown = pictures(8, 24)
    case = viewer_data([shown], ("unet",))["cases"][0]
    shape = (case["depth"], case["height"], case["width"])
    assert shape == (8, 24, 24) and case["slices"] == list(range(8)) and case["tall"] == 1.0
    for image in case["images"]:
        hu = unpacked(image["grey"], shape) / 255 * 400 - 200
        assert np.abs(hu - shown.images[image["name"]].clamp(-200, 200).numpy()).max() <= 400 / 255 / 2 + 1e-3
        bits = unpacked(image["bits"], shape)
        assert (bits & 1 == shown.mask.numpy()).all()
        assert (bits >> 1 & 1 == shown.found[image["name"]]["unet"].numpy()).all()


def test_a_large_case_is_kept_small_around_the_organ() -> None:
    data = viewer_data([pictures(80, 300, case=f"test-{i:03d}") for i in range(3)], ("unet",))
    case = data["cases"][0]
    assert max(case["height"], case["width"]) == 256
    assert len(json.dumps(data)) < 6.5e6, "with the figures the page stays under 8 MB"
    steps = set(np.diff(case["slices"]))
    assert len(steps) == 1 and case["slices"][0] > 0 and len(case["slices"]) >= 12


def test_cases_are_dropped_before_a_case_gets_too_thin() -> None:
    shown = [pictures(40, 64, case=f"test-{i:03d}") for i in range(3)]
    voxels_of_one = 64 * 64 * 3 * 20
    assert len(viewer_data(shown, ("unet",), max_voxels=voxels_of_one)["cases"]) == 1
    assert len(viewer_data(shown, ("unet",), max_voxels=100 * voxels_of_one)["cases"]) == 3


# the figures


def test_the_overlay_tells_hits_misses_and_false_alarms() -> None:
    from matplotlib.colors import to_rgb

    grey = np.zeros((1, 4))
    image = overlay(grey, np.array([[True, False, True, False]]), np.array([[True, True, False, False]]))
    for pixel, colour, weight in zip(image[0], (HIT, MISSED, FALSE), (0.45, 0.75, 0.75), strict=False):
        assert pixel == pytest.approx(weight * np.asarray(to_rgb(colour)))
    assert (image[0, 3] == 0).all()


def test_fig_3_is_in_true_proportion_and_head_up() -> None:
    shown = pictures(10, 24)
    shown.images["normal_dose"][-1] = 200  # the slice nearest to the head
    figure = plots.case_figure(shown, "unet", ["normal_dose", "low_dose", "tod_net"])
    axial, coronal = figure.axes[0], figure.axes[3]
    assert axial.get_aspect() == 1.0 and coronal.get_aspect() == 2.0
    assert (coronal.images[0].get_array()[0] == 1).all(), "the top row of the coronal cut"
    assert [panel.get_title() for panel in figure.axes[:3]] == ["Normal dose", "Low dose", "TOD-Net"]


def test_fig_3_keeps_tod_net_whatever_else_there_is() -> None:
    many = ("nlm", "bm3d", "cnn_mse", "mse_wgan", "vgg_wgan", "sa_wgan", "tod_net")
    columns = _columns(replace(PRESETS["smoke"], denoisers=many))
    assert columns == ["normal_dose", "low_dose", "mse_wgan", "vgg_wgan", "sa_wgan", "tod_net"]


def test_the_typical_case_comes_first_then_the_hardest_and_the_easiest() -> None:
    dice = [80.0, 60.0, float("nan"), 90.0, 85.0, 70.0]
    rows = [{"dose": "low", "denoiser": "none", "unet_dice": d, "whole_rmse_hu": 10.0 + i} for i, d in enumerate(dice)]
    settings = PRESETS["smoke"]
    assert _viewed_cases(rows, settings) == [0, 1, 3]
    unlabelled = [row | {"unet_dice": float("nan")} for row in rows]
    assert _viewed_cases(unlabelled, settings) == [2, 5, 0]
    assert _viewed_cases(rows[:1], settings) == [0]


def test_a_case_without_a_mask_still_has_its_pictures() -> None:
    shown = pictures(10, 24)
    empty = replace(shown, mask=torch.zeros_like(shown.mask))
    plots.case_figure(empty, "unet", ["normal_dose", "low_dose"]).canvas.draw()
    assert viewer_data([empty], ("unet",))["cases"][0]["depth"] == 10


def test_a_heavy_picture_is_embedded_lighter(tmp_path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.fromarray(noise * 0).save(tmp_path / "plain.png")
    assert _embedded(tmp_path / "plain.png").startswith("data:image/png;base64,")
    heavy = _embedded(tmp_path / "noise.png")
    assert heavy.startswith("data:image/webp;base64,") and len(heavy) < (tmp_path / "noise.png").stat().st_size


def test_a_log_is_read_without_its_blanks(tmp_path) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    assert "validation/mse" not in read_log(tmp_path / "log.csv")[0]
    assert read_log(tmp_path / "log.csv")[1]["validation/mse"] == 0.1
    assert read_log(tmp_path / "none.csv") == []


@pytest.mark.parametrize("positive", [True, False], ids=["log axis", "terms below zero"])
def test_learning_curves_draw(positive) -> None:
    sign = 1 if positive else -1
    log = [{"step": float(i), "g/adv": sign * 0.1 * i, "g/mse": 0.1, "norm/mse": 1.0} for i in range(1, 4)]
    figure = plots.learning_figure({"tod_net": log})
    figure.canvas.draw()
    assert figure.axes[0].get_yscale() == ("log" if positive else "symlog")
