"""A run's folder keeps its word: no file is missing, foreign or changed, and one set of settings works in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.tod_net_ct.run import begin, check_intact, finish, is_done, occupy, read_json, results_of, save_tensors
from examples.tod_net_ct.run import stage as stages

FACTS = {"seed": 0}


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "cases"
    begin(folder, FACTS)
    for i in range(2):
        save_tensors(folder / f"test-{i:03d}.pt", normal_hu=torch.full((64,), i))
    finish(folder, FACTS, n=2)
    forget()
    return folder


def forget():
    """As a new process would come to it."""
    stages._INTACT.clear()


def test_a_whole_stage_is_intact(stage):
    check_intact(stage)
    (stage / ".unfinished-1-test-002.pt").write_bytes(b"a killed write's rest")
    check_intact(stage)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_bit_is_told(stage, at):
    path = stage / "test-001.pt"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"test-001.pt: expected the file as the stage wrote it, got a damaged or"):
        check_intact(stage)


def test_a_missing_and_a_foreign_file_are_told(stage):
    (stage / "test-001.pt").rename(stage / "test-007.pt")
    with pytest.raises(ValueError, match=r"test-001.pt: expected the file that the stage wrote, got none; remove the"):
        check_intact(stage)
    (stage / "test-001.pt").write_bytes((stage / "test-007.pt").read_bytes())
    forget()
    with pytest.raises(ValueError, match=r"test-007.pt: expected the 2 files that the stage wrote, got this one, too"):
        check_intact(stage)


def test_what_was_checked_is_read_once(stage, monkeypatch):
    check_intact(stage)
    monkeypatch.setattr(stages, "checksum", lambda path: pytest.fail("read again"))
    check_intact(stage)


def test_a_run_of_an_earlier_version_has_no_checksums(stage):
    manifest = json.loads((stage / "manifest.json").read_text())
    del manifest["files"]
    (stage / "manifest.json").write_text(json.dumps(manifest))
    check_intact(stage)
    assert is_done(stage, FACTS)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"", b"\xff\xfe\x00", b"{", b'{"facts": 1, "results": []}'])
def test_a_manifest_that_is_none_does_not_vouch_for_anything(stage, content):
    (stage / "manifest.json").write_bytes(content)
    assert not is_done(stage, FACTS)
    for ask in (check_intact, results_of):
        with pytest.raises(ValueError, match="cases.*: expected .*manifest.*, got .*; remove the folder"):
            ask(stage)
    (stage / "begun.json").write_bytes(content)
    assert not begin(stage, FACTS)  # from the start: nothing says what was begun


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["manifest.json", "test-000.pt"]), at=st.integers(0, 5000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_stage_is_one_sentence_or_harmless(stage, name, at, bit):
    path = stage / name
    whole = path.read_bytes()
    content = bytearray(whole)
    content[at % len(whole)] ^= 1 << bit
    path.write_bytes(content)
    forget()
    told = ""
    try:
        check_intact(stage)
    except ValueError as error:
        told = str(error)
    finally:
        path.write_bytes(whole)
    assert "\n" not in told and told.startswith(str(stage) if told else "")
    assert told or name == "manifest.json"  # a digit of a version, say: the stage's files are what they were


@pytest.mark.parametrize(
    ("content", "got"),
    [(None, "no file"), (b"[1]", "a list"), (b"null", "a NoneType"), (b"{", "a damaged file"), (b"\xff", "a damaged")],
)
def test_json_of_another_kind_is_told(tmp_path, content, got):
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"summary.json: expected a JSON object .*, got {got}.*; evaluate again$"):
        read_json(path, "evaluate again")


def other(run: Path, text: str) -> subprocess.CompletedProcess:
    """Another process that wants the folder."""
    code = f"from examples.tod_net_ct.run import occupy; from pathlib import Path; occupy(Path({str(run)!r}), {text!r})"
    root = Path(__file__).parents[3]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)


def test_other_settings_stay_outside_while_a_process_works(tmp_path):
    pytest.importorskip("fcntl")
    run = tmp_path / "run"
    occupy(run, "seed: 0\n")
    assert other(run, "seed: 0\n").returncode == 0  # a shard, a second stage
    refused = other(run, "seed: 1\n")
    assert refused.returncode == 1
    assert f"{run}: expected a folder that is free or used with the same settings, got one where" in refused.stderr
    assert (run / "settings.yaml").read_text() == "seed: 0\n"
    occupy(run, "seed: 2\n")  # this process may change its mind
    assert (run / "settings.yaml").read_text() == "seed: 2\n"
