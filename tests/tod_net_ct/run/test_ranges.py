"""Every field states its range; a file of settings is answered in one sentence, whatever is in it."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.tod_net_ct.run import PRESETS, Settings, from_yaml
from examples.tod_net_ct.run.ranges import RANGES, check_ranges

DEMO = PRESETS["demo"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_within_its_ranges(preset):
    check_ranges(PRESETS[preset].to_dict(), Settings())


def test_every_number_has_a_range_and_every_range_a_field():
    numbers = {
        f.name
        for f in fields(Settings)
        for value in [getattr(DEMO, f.name)]
        for part in [value[0] if isinstance(value, tuple) and value else value]
        if isinstance(part, (int, float)) and not isinstance(part, bool)
    }
    assert numbers <= RANGES.keys() and RANGES.keys() <= {f.name for f in fields(Settings)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("steps=-5", r"expected a number from 1 to 1e\+09, got -5; for example steps="),
        ("steps=0", "expected a number from 1"),
        ("i0_photons=-1", "expected a number above 0"),
        ("i0_photons=0", "expected a number above 0"),
        ("learning_rate=nan", "expected a finite number above 0, got nan; for example learning_rate="),
        ("learning_rate=inf", "expected a finite number above 0"),
        ("weight_mse=-inf", "expected a number from 0"),
        ("n_test=-1", "expected a number from 0"),
        ("seed=-3", "expected a number from 0"),
        ("dose_fraction=1.5", "expected a number from 0 to 1, got 1.5"),
        ("overlap=1", "expected a number from 0 to 0.95"),
        ("shape=100000,64,64", "expected a number from 1 to 4096"),
        ("shape=4096,4096,4096", "expected at most 268,435,456 voxels"),
        ("voxel_mm=0,1,1", "expected a number from 0.01"),
        ("critic_channels=8,0,8", "expected a number from 1"),
        ("optimizer=sgd", "expected adam or rmsprop, got sgd"),
        ("precision=8", "expected 32-true or bf16-mixed"),
        ("denoisers=" + "+".join(["tod_net"] * 65), "expected at most 64 names"),
    ],
)
def test_a_value_out_of_its_range_is_told_with_the_range(given, words):
    name, text = given.split("=")
    with pytest.raises(ValueError, match=f"^--set {name}: {words}"):
        DEMO.with_overrides({name: text})


def test_a_denoiser_s_own_settings_have_the_same_ranges():
    from examples.tod_net_ct.training import parse

    with pytest.raises(ValueError, match="share_task: expected a number from 0"):
        parse("tod_net@share_task=-1", DEMO)


BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 8)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "b: expected a number, a word or a list of them, got a list of other things"),
        ("1: 2\n", "1: there is no such setting"),
        ("steps: {a: 1}\n", "steps.a: there is no group 'steps'"),
        ("steps: null\n", "steps: expected a number, a word or a list of them, got a NoneType"),
        ("steps: -5\n", "steps: expected a number from 1"),
        ("steps: .nan\n", "steps: expected int, got 'nan'"),
        ("[" * 5000, "expected a YAML file of settings"),
        ("steps: !!python/object/apply:os.system [echo]\n", "expected a YAML file of settings"),
        ("- steps\n", "expected lines like 'steps: 500', got a list"),
        ("# " + "x" * 1_000_001, "expected lines like 'steps: 500', got a int"),
    ],
    ids=["aliases", "integer key", "group", "null", "negative", "nan", "deep", "object", "list", "long"],
)
def test_a_file_of_settings_that_is_none_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: {words}") as caught:
        from_yaml(path, DEMO)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_settings_or_one_sentence(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    told = ""
    try:
        from_yaml(path, DEMO)
    except ValueError as error:
        told = str(error)
    assert "\n" not in told and told.startswith(str(path) if told else "")
