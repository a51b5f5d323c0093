"""Who is trained on and tested on in a study of shots, and by what its runs are known."""

import json
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segraft.errors import SegraftError
from segraft.networks import build
from segraft.studies.planning import PLAN, Plan, plan
from segraft.studies.reading import changed, checked
from segraft.studies.run import Run, Runs

SHOTS = {"folds": None, "shots": [2, 4], "test_patients": 3, "seeds": [0, 1, 5]}
TRAINED = {"conv_lora 1 (unet)", "all (unet)"}


@pytest.fixture
def planned(tmp_path):
    """planned(study): its plan, with the runs in a folder of its own."""
    return lambda study: plan(study, Runs(tmp_path / "runs"), device="cpu")


@pytest.fixture
def asked(tmp_path):
    """asked(planned run): what its folder says."""
    return lambda run: Run.read(tmp_path / "runs" / run.key)


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of the tiny network."""
    path = tmp_path / "weights.pt"
    net = build("unet", in_channels=1, out_channels=1, arguments={"widths": [2, 4], "norm": "instance"})
    torch.save(net.state_dict(), path)
    return path


def patients_of(case_ids):
    return {case.partition("-")[0] for case in case_ids}


def test_all_arms_learn_from_the_same_patients(make_study, planned, asked):
    made = planned(make_study(**SHOTS))
    support = {}
    for run in made.runs:
        if run.arm in TRAINED:
            support.setdefault((run.seed, run.shots), {})[run.arm] = asked(run).train
    assert set(support) == {(seed, shots) for seed in (0, 1, 5) for shots in (2, 4)}
    for (_, shots), arms in support.items():
        assert set(arms) == TRAINED
        assert len(set(arms.values())) == 1
        assert len(patients_of(arms["all (unet)"])) == shots
    drawn = {seed: arms["all (unet)"] for (seed, shots), arms in support.items() if shots == 2}
    assert len(set(drawn.values())) > 1, "seeds draw patients of their own"


def test_a_smaller_draw_begins_every_larger_one(make_study, planned, asked):
    made = planned(make_study(**SHOTS | {"shots": [4, 1, 3]}))
    for seed in (0, 1, 5):
        sets = {run.shots: set(asked(run).train) for run in made.runs if (run.arm, run.seed) == ("all (unet)", seed)}
        assert list(sets) == [4, 1, 3]
        for smaller, larger in pairwise(sorted(sets)):
            assert sets[smaller] < sets[larger]


def test_all_are_tested_on_the_same_patients_whom_nobody_learns_from(make_study, planned, asked, cohorts):
    source = str(cohorts / "source" / "dataset.json")
    changes = SHOTS | {"shots": [1, 2], "test_patients": 1, "patients": 3}
    made = planned(make_study(data=source, pretrain_data=source, pretrain_labels=["rim"], **changes))
    tests = {asked(run).test for run in made.runs if run.base is not None}
    (test,) = tests
    assert len(test) == 2, "both scans of one patient"
    for run in made.runs:
        assert not patients_of(asked(run).train) & patients_of(test)
    (base,) = (run for run in made.runs if run.base is None)
    assert len(patients_of(asked(base).train)) == 1
    assert not patients_of(asked(base).train) & patients_of(made.patients)


@pytest.mark.parametrize(("patients", "tested"), [(None, 4), (8, 4), (5, 2)])
def test_half_of_the_patients_are_tested_on_where_nothing_is_said(make_study, planned, asked, patients, tested):
    made = planned(make_study(**SHOTS | {"shots": [2], "test_patients": None, "patients": patients}))
    assert {len(asked(run).test) for run in made.runs if run.base is not None} == {tested}


def test_what_trains_nothing_runs_once(make_study, planned, asked):
    made = planned(make_study(**SHOTS))
    (run,) = (run for run in made.runs if run.arm == "none (unet)")
    assert (run.shots, asked(run).train) == (0, ())
    assert len(made.runs) == 1 + 1 + len(TRAINED) * 3 * 2


def test_more_shots_and_seeds_change_no_run(make_study, planned):
    few = {run.key for run in planned(make_study(**SHOTS)).runs}
    more = {run.key for run in planned(make_study(**SHOTS | {"shots": [1, 2, 4, 6], "seeds": [0, 1, 5, 7]})).runs}
    assert few < more


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shots": [2, 7]}, ["7 shots", "leaves 6"]),
        ({"test_patients": 9}, ["4 shots", "9 are tested on", "leaves 0"]),
        ({"test_patients": 12}, ["4 shots", "12 are tested on", "leaves 0"]),
        ({"shots": [6], "test_patients": None}, ["6 shots", "4 are tested on", "leaves 5"]),
        ({"patients": 5}, ["4 shots", "of 5 patients 3", "leaves 2"]),
    ],
    ids=str,
)
def test_more_shots_than_there_are_patients_are_refused_before_anything_runs(
    make_study, planned, tmp_path, changes, says
):
    with pytest.raises(SegraftError) as refused:
        planned(make_study(**SHOTS | changes))
    assert all(words in str(refused.value) for words in says), refused.value
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"folds": 3}, ["3 folds", "2, 4 shots", "one of them"]),
        ({"shots": [0]}, ["shots", "0 patients", "at least 1"]),
        ({"shots": [5, -1]}, ["shots", "-1 patients"]),
        ({"shots": [5, 5]}, ["shots 5, 5 must differ"]),
        ({"test_patients": 0}, ["test_patients"]),
        ({"folds": 3, "shots": []}, ["test_patients", "study of shots"]),
        ({"reference": "conv_lora (unet)"}, ["is no arm", "conv_lora 1 (unet)"]),
        ({"arms": [{"base": "unet", "strategies": ["head + deeper"]}]}, ["'deeper'"]),
        ({"arms": [{"base": "unet", "strategies": ["head + "]}]}, ["''"]),
    ],
    ids=str,
)
def test_what_does_not_fit_a_study_of_shots_is_one_sentence(make_study, changes, says):
    with pytest.raises(SegraftError) as refused:
        make_study(**SHOTS | changes)
    assert all(words in str(refused.value) for words in says), refused.value
    assert "\n" not in str(refused.value)


def test_a_study_that_says_neither_has_three_folds(make_study):
    assert make_study(folds=None).folds == 3
    assert make_study(**SHOTS).folds is None


def test_a_plan_of_shots_reads_as_it_was_written(make_study, planned, tmp_path):
    made = planned(make_study(**SHOTS))
    made.write(tmp_path / PLAN)
    assert Plan.read(tmp_path / PLAN) == made
    assert made.folds == {}


@pytest.mark.parametrize(
    ("strategy", "name", "train"),
    [
        ("head + DECODER", "head + decoder (unet)", ("head", "decoder")),
        ("bitfit_encoder+decoder", "bitfit_encoder + decoder (unet)", ("bias:encoder", "decoder", "head")),
        ("none + head + head", "head (unet)", ("head",)),
        ("none", "none (unet)", ()),
    ],
)
def test_strategies_may_be_joined(make_study, strategy, name, train):
    from segraft.studies.spec import arms_of

    study = make_study(arms=[{"base": "unet", "strategies": [strategy]}])
    (arm,) = arms_of(study.arms[0])
    assert (arm.name, arm.spec().train, arm.trains_nothing) == (name, train, train == ())
    (beside,) = arms_of(study.arms[0].model_copy(update={"methods": ("lora",), "ranks": (8,)}))
    assert beside.name == ("lora 8 (unet)" if not train else f"lora 8 + {name}")
    assert beside.spec().train == train


def imported(weights, **base):
    return SHOTS | {"pretrain_data": None, "bases": {"unet": {
        "network": "unet", "arguments": {"widths": [2, 4], "norm": "instance"}, "weights": str(weights), **base,
    }}}  # fmt: skip


def test_a_base_of_weights_needs_no_cohort_and_is_known_by_its_bytes(make_study, planned, asked, weights):
    made = planned(make_study(**imported(weights)))
    base = asked(made.runs[0])
    assert (base.kind, base.data, base.train) == ("import", str(weights), ())
    moved = weights.rename(weights.with_name("moved.pt"))
    again = planned(make_study(**imported(moved)))
    assert [run.key for run in again.runs] == [run.key for run in made.runs]
    named = planned(make_study(**imported(moved, labels=["core"])))
    assert not {run.key for run in named.runs} & {run.key for run in made.runs}
    moved.write_bytes(moved.read_bytes() + b"\0")
    assert not {run.key for run in planned(make_study(**imported(moved))).runs} & {run.key for run in made.runs}


def test_weights_that_are_not_there_are_refused(make_study, planned, tmp_path):
    with pytest.raises(SegraftError, match=r"nowhere\.pt cannot be read.*--weights"):
        planned(make_study(**imported(tmp_path / "nowhere.pt")))
    assert not (tmp_path / "runs").exists()


def test_a_base_is_either_imported_or_pretrained(make_study, weights):
    with pytest.raises(SegraftError, match=r"it has weights, so nothing is pre-trained"):
        make_study(**imported(weights, training={"epochs": 2}))


def test_weights_that_are_given_are_those_of_every_base_that_names_none(make_study, weights):
    own, other = {"network": "unet", "weights": "own.pt"}, {"network": "unet", "training": {"epochs": 2}, "patients": 3}
    study = make_study(bases={"unet": other, "own": own})
    given = changed(study, {"seeds": (7,), "labels": None}, weights=weights)
    assert (given.bases["unet"].weights, given.bases["unet"].training, given.bases["unet"].patients) == (
        weights, {}, None,
    )  # fmt: skip
    assert given.bases["own"] == study.bases["own"]
    assert (given.seeds, given.labels) == ((7,), study.labels)


def uncompressed_cohort(folder: Path, names: list[str]) -> Path:
    """Scans whose files have the same bytes with every version of the libraries."""
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for number, name in enumerate(names):
        image = (np.arange(8 * 8 * 2) % (7 + number)).astype(np.float32).reshape(8, 8, 2)
        for kind, data in (("imagesTr", image), ("labelsTr", (image > 3).astype(np.uint8))):
            nib.save(nib.Nifti1Image(data, np.diag([2, 2, 3, 1])), folder / kind / f"{name}.nii")
    training = [{"image": f"./imagesTr/{name}.nii", "label": f"./labelsTr/{name}.nii"} for name in names]
    content = {"name": "x", "labels": {"0": "background", "1": "core"}, "training": training}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


KEYS = [
    "a17772b1455b2f0a", "55ee1782374bc7c8", "22489dcde461ed90", "fccfa329fa3975b8", "52e9b82fb2fcebd7",
    "c8915472c671c989",
]  # fmt: skip


def test_runs_of_cross_validated_studies_keep_their_keys(planned, tmp_path):
    """As they were before there were studies of shots: what was trained then is not trained again."""
    content = {
        "name": "pinned", "title": "Pinned", "folds": 2, "seeds": [3],
        "data": str(uncompressed_cohort(tmp_path / "a", ["a", "b", "c"])),
        "pretrain_data": str(uncompressed_cohort(tmp_path / "b", [f"q{n}" for n in range(6)])),
        "preparation": {"patch": [8, 8, 1]},
        "bases": {"unet": {"network": "unet", "arguments": {"widths": [2, 4]}, "training": {"epochs": 2}}},
        "training": {"epochs": 1, "learning_rate": 0.01},
        "arms": [
            {"base": "unet", "methods": ["dora_c"], "ranks": [2], "strategies": ["head"], "adapter": {"alpha": 3}},
            {"base": "unet", "strategies": ["none", "decoder"], "training": {"volumes": 1}},
        ],
    }  # fmt: skip
    made = planned(checked(content, "pinned"))
    assert [run.key for run in made.runs] == KEYS
