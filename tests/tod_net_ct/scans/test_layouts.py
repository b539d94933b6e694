"""Every layout of a data set gives the same list of cases; whole patients go to one split."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from examples.tod_net_ct.run import Settings
from examples.tod_net_ct.scans import find_cases, split_patients
from examples.tod_net_ct.scans.layouts import Case, organ_labels
from examples.tod_net_ct.scans.splits import shared_patients


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


LAYOUTS = {
    # files -> (name, patient, scan, label, low) of the first and of the last case
    "lits": (
        ["volume-10.nii", "segmentation-10.nii.gz", "volume-9.nii.gz", "segmentation-9.nii", "readme.txt"],
        [
            ("volume-9", "volume-9", "volume-9.nii.gz", "segmentation-9.nii", None),
            ("volume-10", "volume-10", "volume-10.nii", "segmentation-10.nii.gz", None),
        ],
    ),
    "kits": (
        [f"case_{n:05d}/{part}.nii.gz" for n in (10, 2) for part in ("imaging", "segmentation", "liver")],
        [
            ("case_00002", "case_00002", "case_00002/imaging.nii.gz", "case_00002/segmentation.nii.gz", None),
            ("case_00010", "case_00010", "case_00010/imaging.nii.gz", "case_00010/segmentation.nii.gz", None),
        ],
    ),
    "decathlon": (
        [f"{part}/{dot}liver_{n}.nii.gz" for n in (10, 2) for part in ("imagesTr", "labelsTr") for dot in ("", "._")]
        + ["imagesTs/liver_3.nii.gz"],
        [
            ("liver_2", "liver_2", "imagesTr/liver_2.nii.gz", "labelsTr/liver_2.nii.gz", None),
            ("liver_10", "liver_10", "imagesTr/liver_10.nii.gz", "labelsTr/liver_10.nii.gz", None),
        ],
    ),
    "nnunet": (
        ["imagesTr/liver_2_0000.nii.gz", "labelsTr/liver_2.nii.gz"],
        [("liver_2", "liver_2", "imagesTr/liver_2_0000.nii.gz", "labelsTr/liver_2.nii.gz", None)] * 2,
    ),
    "pairs": (
        ["anna.nii.gz", "anna_mask.nii.gz", "bert.nii", "bert_label.nii.gz", "carl_2.nii", "carl_2_seg.nii"],
        [
            ("anna", "anna", "anna.nii.gz", "anna_mask.nii.gz", None),
            ("carl_2", "carl_2", "carl_2.nii", "carl_2_seg.nii", None),
        ],
    ),
    "pairs in folders": (
        ["scans/anna.nii.gz", "masks/anna.nii", "scans/bert/1.dcm", "masks/bert.nii.gz"],
        [
            ("anna", "anna", "scans/anna.nii.gz", "masks/anna.nii", None),
            ("bert", "bert", "scans/bert", "masks/bert.nii.gz", None),
        ],
    ),
    "dicom": (
        ["p1/scan/1.dcm", "p1/mask.nii.gz", "p2/1.dcm", "p2/2.dcm", "p2/segmentation.nii.gz"],
        [("p1", "p1", "p1/scan", "p1/mask.nii.gz", None), ("p2", "p2", "p2", "p2/segmentation.nii.gz", None)],
    ),
    "dicom in folders called as KiTS's": (
        ["case_1/scan/1.dcm", "case_1/segmentation.nii.gz"],
        [("case_1", "case_1", "case_1/scan", "case_1/segmentation.nii.gz", None)] * 2,
    ),
    "dose pairs": (
        ["L1_i2_full.nii.gz", "L1_i2_quarter.nii.gz", "L1_i10_full.nii.gz", "L1_i10_quarter.nii.gz"]
        + ["L2_i1_full.nii.gz", "L2_i1_quarter.nii.gz", "L2_i1_mask.nii.gz"],
        [
            ("L1_i2", "L1", "L1_i2_full.nii.gz", None, "L1_i2_quarter.nii.gz"),
            ("L2_i1", "L2", "L2_i1_full.nii.gz", "L2_i1_mask.nii.gz", "L2_i1_quarter.nii.gz"),
        ],
    ),
    "dose pairs in folders": (
        ["normal/L1_a.nii", "low/L1_a.nii", "normal/L2_a/1.IMA", "low/L2_a/1.IMA", "masks/L2_a.nii.gz"],
        [
            ("L1_a", "L1", "normal/L1_a.nii", None, "low/L1_a.nii"),
            ("L2_a", "L2", "normal/L2_a", "masks/L2_a.nii.gz", "low/L2_a"),
        ],
    ),
}


@pytest.mark.filterwarnings("ignore:.*passed over what is no case")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_finds_the_cases_of(layout, tmp_path):
    files, (first, last) = LAYOUTS[layout]
    touch(tmp_path, *files)

    def shown(case):
        return case.name, case.patient, *(p and p.relative_to(tmp_path).as_posix() for p in case[2:5])

    cases = find_cases(tmp_path)
    assert (shown(cases[0]), shown(cases[-1])) == (first, last)
    assert len(cases) == len({case.name for case in cases})


def test_a_series_without_suffixes_is_known_by_its_magic_word(tmp_path):
    touch(tmp_path, "p1/scan/IM0001", "p1/mask.nii.gz")
    (tmp_path / "p1/scan/IM0001").write_bytes(bytes(128) + b"DICM")
    assert find_cases(tmp_path)[0].scan == tmp_path / "p1/scan"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["volume-3.nii"], "^segmentation-3.nii: expected the partner of volume-3.nii, got no such file; add it"),
        (["segmentation-3.nii.gz"], "^volume-3.nii.gz: expected the partner of segmentation-3.nii.gz"),
        (["case_00003/imaging.nii.gz"], "^case_00003/segmentation.nii.gz: expected the partner of case_00003/imaging"),
        (["case_00003/segmentation.nii.gz"], "^case_00003/imaging.nii.gz: expected the partner"),
        (["volume-3.nii", "volume-03.nii.gz"], "expected one file per case, got volume-.* too; remove one"),
        (["imagesTr/liver_1.nii.gz"], "^labelsTr/liver_1.nii.gz: expected the partner of imagesTr/liver_1.nii.gz"),
        (["a.nii.gz"], "^a_mask.nii.gz: expected the partner of a.nii.gz"),
        (["a.nii.gz", "b_mask.nii.gz"], "^a_mask.nii.gz: expected the partner of a.nii.gz"),
        (["masks/a.nii"], "^scans/a.nii: expected the partner of masks/a.nii"),
        (["p1/1.dcm"], "^p1/mask.nii.gz: expected the partner of p1/scan"),
        (["L1_full.nii"], "^L1_quarter.nii: expected the partner of L1_full.nii"),
        (["low/L1.nii"], "^normal/L1.nii: expected the partner of low/L1.nii"),
        ([], "expected volume-N.nii, case_NNNNN/imaging.nii.gz, .*, got none; give the folder"),
    ],
)
def test_incomplete_folder(tmp_path, names, words):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=words):
        find_cases(tmp_path)


def test_a_scan_that_is_of_no_case_is_named(tmp_path):
    touch(tmp_path, *(f"{role}-{i}.nii" for role in ("volume", "segmentation") for i in (1, 2)), "Volume-3.nii.gz")
    with pytest.warns(UserWarning, match="passed over what is no case of the layout LiTS: Volume-3.nii.gz$"):
        assert [case.name for case in find_cases(tmp_path)] == ["volume-1", "volume-2"]


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="^nowhere: expected a folder of cases, got no such folder"):
        find_cases(tmp_path / "nowhere")


def test_a_file_may_say_which_cases_are_of_one_patient(tmp_path):
    touch(tmp_path, *(f"{name}{end}.nii" for name in ("may", "june", "other") for end in ("", "_mask")))
    (tmp_path / "patients.csv").write_text("case,patient\nmay,anna\njune,anna\nother,bert\n")
    assert {case.name: case.patient for case in find_cases(tmp_path)} == {
        "may": "anna",
        "june": "anna",
        "other": "bert",
    }
    (tmp_path / "patients.csv").write_text("may,anna\njune,anna\n")
    with pytest.raises(ValueError, match="^patients.csv: expected a line 'case,patient' for other, got none; add it"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"may,anna\njune,\n", "expected 'case,patient' in line 2, got 'june,'; mend it"),
        (b"may,anna\n,bert\n", "expected 'case,patient' in line 2, got ',bert'; mend it"),
        (b"may;anna\njune;anna\n", "expected 'case,patient' in line 1, got 'may;anna'; mend it"),
        (b"may,anna,left\njune,bert\n", "expected 'case,patient' in line 1, got 'may,anna,left'"),
        (b"may,anna\njune,bert\nmay,carl\n", "expected one patient for may, got anna and in line 3 carl; take one out"),
        ("may,anna\njune,\u00e4nne\n".encode("utf-16"), "expected lines 'case,patient' in UTF-8, got another file"),
        (b"may,anna\njune,\xe4nne\n", "expected lines 'case,patient' in UTF-8, got another file"),
        (b"", "expected a line 'case,patient' for june, got none; add it"),
        (b"\0\0\0", "expected "),
    ],
)
def test_a_patients_file_that_could_part_a_patient_s_cases_is_refused(tmp_path, content, words):
    touch(tmp_path, *(f"{name}{end}.nii" for name in ("may", "june") for end in ("", "_mask")))
    (tmp_path / "patients.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"^patients.csv: {words}") as caught:
        find_cases(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_patients_file_of_a_spreadsheet_is_read(tmp_path):
    touch(tmp_path, *(f"{name}{end}.nii" for name in ("may", "june") for end in ("", "_mask")))
    (tmp_path / "patients.csv").write_bytes('may,"M\u00fcller, Anna"\r\n\r\njune,bert \r\n'.encode("utf-8-sig"))
    assert {case.name: case.patient for case in find_cases(tmp_path)} == {"may": "M\u00fcller, Anna", "june": "bert"}


DATASETS = {
    "decathlon": ('{"labels": {"0": "background", "1": "liver", "2": "cancer"}}', "liver", (1, 2)),
    "the lesion alone": ('{"labels": {"0": "background", "1": "liver", "2": "cancer"}}', "cancer", (2,)),
    "nnU-Net": ('{"labels": {"background": 0, "liver": 1, "tumor": 2}}', "liver", (1, 2)),
    "several organs": ('{"labels": {"0": "background", "3": "kidney", "6": "liver", "7": "cyst"}}', "liver", (6,)),
    "no file": (None, "liver", None),
    "numbers": (None, "2,3", (2, 3)),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_labels_of_the_decathlon(tmp_path, dataset):
    text, organ, expected = DATASETS[dataset]
    touch(tmp_path, "imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz")
    if text:
        (tmp_path / "dataset.json").write_text(text)
    assert organ_labels(find_cases(tmp_path)[0], organ) == expected


def test_a_dataset_file_that_says_nothing_is_an_error(tmp_path):
    touch(tmp_path, "imagesTr/liver_1.nii.gz", "labelsTr/liver_1.nii.gz")
    (tmp_path / "dataset.json").write_text('{"labels": ["liver"]}')
    with pytest.raises(ValueError, match='^dataset.json: expected "labels": {"1": "liver", ...}, got something else'):
        find_cases(tmp_path)


def test_labels_of_lits_and_kits(tmp_path):
    lits, kits = tmp_path / "lits", tmp_path / "kits"
    touch(lits, "volume-1.nii", "segmentation-1.nii")
    touch(kits, "case_1/imaging.nii", "case_1/segmentation.nii")
    assert organ_labels(find_cases(lits)[0], "liver") == (1, 2)
    assert organ_labels(find_cases(kits)[0], "kidney") == (1, 2, 3), "with tumour and, in KiTS21, cyst"
    with pytest.raises(ValueError, match=r"^case_1: this data set labels kidney \(1, 2, 3\).*--set organ=kidney, or"):
        organ_labels(find_cases(kits)[0], "liver")
    assert organ_labels(Case("a", "a", Path()), "liver") is None


@pytest.mark.parametrize(
    ("n", "split", "expected"), [(131, (0.7, 0.1, 0.2), [91, 13, 27]), (210, (0.6, 0.2, 0.2), [126, 42, 42])]
)
def test_the_papers_splits(n, split, expected):
    patients = [f"volume-{i}" for i in range(n)]
    dealt = split_patients(patients, Settings(n_train=0, split=split))
    assert [len(own) for own in dealt.values()] == expected
    assert sorted(sum(dealt.values(), [])) == sorted(patients), "everyone once"
    assert dealt == split_patients(patients, Settings(n_train=0, split=split))
    assert dealt != split_patients(patients, Settings(n_train=0, split=split, seed=1))


def test_numbers_count_patients_not_cases():
    cases = [f"L{i}" for i in range(4) for _ in range(7)]
    dealt = split_patients(cases, Settings(n_train=2, n_validation=1, n_test=1))
    assert [len(own) for own in dealt.values()] == [2, 1, 1] and not shared_patients(dealt)


TINY = Settings(data="here", n_train=1, n_validation=1, n_test=1)


def test_too_few_patients_is_an_error_unless_they_may_serve_twice():
    with pytest.raises(
        ValueError, match="^here: holds 2 patients but the splits need 3; add some, or let .*--set reuse=true"
    ):
        split_patients(["a", "b"], TINY)
    with pytest.raises(
        ValueError, match="^here: holds 4 patients but the splits need 9; split all of them with --set n"
    ):
        split_patients(list("abcd"), replace(TINY, n_train=7))
    with pytest.raises(
        ValueError, match=r"^split: 2 patients at \(0.7, 0.1, 0.2\) leave .*0 for validation.*reuse=true"
    ):
        split_patients(["a", "b"], replace(TINY, n_train=0))
    for settings in (replace(TINY, reuse=True), replace(TINY, reuse=True, n_train=0)):
        dealt = split_patients(["a", "b"], settings)
        assert dealt["train"] != dealt["test"], "the test patient is another as long as there is one"
        assert dealt["validation"] == dealt["train"] == shared_patients(dealt)
        assert split_patients(["a"], settings) == {"train": ["a"], "validation": ["a"], "test": ["a"]}
    assert split_patients(["a", "b", "c"], replace(TINY, reuse=True)) == split_patients(["a", "b", "c"], TINY)


@pytest.mark.parametrize("split", [(0.7, 0.1, 0.1), (1.2, -0.4, 0.2)])
def test_shares_that_are_none(split):
    with pytest.raises(ValueError, match="^split: expected three shares that add up to 1, got"):
        split_patients(["a"] * 9, replace(TINY, n_train=0, split=split))


@pytest.mark.skipif("TASKLOSS_CT_DATA" not in os.environ, reason="TASKLOSS_CT_DATA names no folder of real CT")
def test_real_dose_pairs():
    cases = find_cases(Path(os.environ["TASKLOSS_CT_DATA"]) / "paired")
    assert len(cases) == 22 and {case.patient for case in cases} == {"L143", "L192"}
    assert all(case.low is not None and case.label is None for case in cases)


NAMED = Settings(data="here", n_train=0, test_patients=("a", "c"), validation_patients=("d",))


def test_patients_named_for_test_and_validation_are_nowhere_else():
    dealt = split_patients(["a", "b", "c", "d", "a", "e"], NAMED)
    assert dealt == {"train": ["b", "e"], "validation": ["d"], "test": ["a", "c"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_patients": ("x",)}, "^test_patients: expected some of a, b, c, d, got 'x'; --set test_patients=a$"),
        ({"validation_patients": ("a",)}, "expected no one of validation_patients, got a in both"),
        ({"test_patients": ("a", "b", "c")}, "expected someone for train, got no one left"),
        ({"validation_patients": ()}, "expected someone for validation, got no one left"),
    ],
    ids=["nobody's name", "in both", "none to train", "none to validate"],
)
def test_wrong_names_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        split_patients(["a", "b", "c", "d"], replace(NAMED, **changes))
