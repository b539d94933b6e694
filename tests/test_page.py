"""The page of gradient maps: complete, exact where the pointer is, and alive in a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import zlib

import pytest
import torch
from torch import nn

from taskloss import Fidelity, InputError, LossSum, TaskOrientedLoss, gradient_maps
from tests.properties import cross_entropy, image, labels, segmenter

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def maps_of(spatial_dims: int = 3):
    loss = LossSum(
        mse=0.5 * Fidelity(nn.MSELoss()), **{"t<ask": TaskOrientedLoss(segmenter(spatial_dims), cross_entropy)}
    )
    x, reference = image(spatial_dims, size=7), image(spatial_dims, size=7)
    y = labels(x)
    return gradient_maps(loss, x, reference=reference, label=y), loss.terms["t<ask"].predict(x), y


def data_of(path) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def values_of(packed: dict, shape: list[int]) -> torch.Tensor:
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return torch.frombuffer(bytearray(raw), dtype=torch.half).double().view(shape) * packed["scale"]


def test_every_voxel_of_every_term_is_in_the_page_to_three_digits(tmp_path) -> None:
    maps, prediction, y = maps_of()
    tiny = type(maps)({**maps.maps, "tiny": 1e-9 * maps.maps["mse"]}, {**maps.weights, "tiny": 1.0}, *fields(maps))
    path = tiny.to_html(tmp_path / "maps.html", prediction=prediction, roi=y, sample=1, axis=2)
    data = data_of(path)
    assert [term["name"] for term in data["terms"]] == ["mse", "t<ask", "tiny", "total"]
    assert [picture["name"] for picture in data["images"]] == ["reference", "restored", "label", "prediction"]
    for term, gradient in zip(data["terms"], [*tiny.maps.values(), tiny.total], strict=True):
        expected = gradient[1, 0].movedim(2, 0).double()
        torch.testing.assert_close(values_of(term["packed"], data["shape"]), expected, rtol=1e-3, atol=0)
    restored = values_of(data["images"][1]["packed"], data["shape"])
    torch.testing.assert_close(restored, maps.x_hat[1, 0].movedim(2, 0).double(), rtol=1e-3, atol=0)
    focus = tiny.focus(y)
    assert data["terms"][1]["share"] == focus["t<ask"].share and data["terms"][1]["norm"] == tiny.norms()["t<ask"]
    assert data["terms"][0]["weight"] == 0.5 and data["terms"][-1]["weight"] is None


def fields(maps):
    return maps.x_hat, maps.reference, maps.label


def test_it_needs_nothing_else_and_no_name_breaks_it(tmp_path) -> None:
    text = maps_of(2)[0].to_html(tmp_path / "maps.html", titles={"mse": "</script><b>"}).read_text()
    assert not re.search(r'(?:src|href)="', text) and "http" not in text
    assert text.count("</script>") == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "maps.html"]


def test_a_map_that_is_not_finite_is_shown_as_such(tmp_path) -> None:
    maps = maps_of(2)[0]
    maps.maps["mse"][:] = torch.nan
    maps.reference[0, 0, 0, 0] = torch.inf
    data = data_of(maps.to_html(tmp_path / "maps.html"))
    assert data["terms"][0]["norm"] is None and values_of(data["terms"][0]["packed"], data["shape"]).isnan().all()
    assert data["images"][0]["high"] <= 1


@pytest.mark.parametrize(
    ("dims", "options", "sentence"),
    [
        (1, {}, r"to_html: shows images and volumes, got x_hat \(2, 1, 7\); plot_gradient_maps draws signals"),
        (2, {"axis": 2}, "to_html: axis must be below 2, got 2"),
        (3, {"sample": 2}, r"to_html: sample 2 is outside the 2 of x_hat \(2, 1, 7, 7, 7\)"),
        (3, {"roi": torch.ones(2, 5, 5, 5)}, "does not fit x_hat"),
    ],
)
def test_bad_input_gets_one_sentence(dims, options, sentence, tmp_path) -> None:
    with pytest.raises(InputError, match=sentence):
        maps_of(dims)[0].to_html(tmp_path / "maps.html", **options)
    assert not list(tmp_path.iterdir())


def opened(path, view: str = "", keys: str = "") -> str:
    """The page's text after the browser has drawn it, with a view in the address and keys pressed."""
    press = "".join(f"dispatchEvent(new KeyboardEvent('keydown',{{key:'{key}'}}));" for key in keys.split())
    script = (
        "<script>addEventListener('error', (e) => document.body.append('FAILED ' + e.message));"
        "(function go() { if (!document.body.dataset.ready) return setTimeout(go, 20);"
        f"{press} }})()</script>"
    )
    copy = path.with_name("opened.html")
    copy.write_text(path.read_text().replace("</body>", script + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'browser'}"]
    command += ["--virtual-time-budget=4000", "--dump-dom", copy.as_uri() + view]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    page = page.replace(script, "")
    assert "FAILED" not in page
    return html.unescape(re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_it_is_drawn_inside_another_page_too(tmp_path) -> None:
    """A notebook and the gallery show it in a frame, which has no address of its own to keep the view in."""
    told = "<script>addEventListener('unhandledrejection', (e) => parent.postMessage('FAILED ' + e.reason, '*'));"
    told += "(function go() { const ready = document.body.dataset.ready;"
    told += "ready ? parent.postMessage('DRAWN', '*') : setTimeout(go, 20) })()</script>"
    inner = maps_of()[0].to_html(tmp_path / "maps.html").read_text().replace("</body>", told + "</body>")
    heard = "<script>addEventListener('message', (e) => document.body.append(e.data));</script>"
    outer = tmp_path / "outer.html"
    outer.write_text(f'<body>{heard}<iframe srcdoc="{html.escape(inner)}"></iframe></body>')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command += ["--virtual-time-budget=4000", "--dump-dom", outer.as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    said = page.rpartition("</iframe>")[2]
    assert "DRAWN" in said and "FAILED" not in said, said


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_shows_the_values_the_address_asks_for_and_obeys_keys(tmp_path) -> None:
    maps, _, y = maps_of()
    path = maps.to_html(tmp_path / "maps.html", roi=y)
    page = opened(path, "#term=t%3Cask&image=reference&slice=2&at=5,3", "ArrowUp s ArrowRight")
    term, value = maps.total[0, 0, 3, 3, 5].item(), maps.reference[0, 0, 3, 3, 5].item()
    shown = re.search(r"pixel 5, 3 of slice 3: reference (\S+), restored", page)
    assert shown and float(shown[1]) == pytest.approx(value, rel=5e-3)
    assert "dL/dx_hat, total, weighted, one scale for all" in page and "3 of 6" in page
    row = re.search(r'<tr aria-selected="true">(.*?)</tr>', page)
    assert row and float(re.findall(r"<td>(.*?)</td>", row[1])[1]) == pytest.approx(term, rel=5e-3)
