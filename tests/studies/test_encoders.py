"""A study whose bases start at random, or with the encoder of a masked auto-encoder: from its plan to its report."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from segraft.data.cohort import Cohort
from segraft.errors import SegraftError
from segraft.networks import load_base, read_base
from segraft.studies import executing
from segraft.studies.checking import check_study
from segraft.studies.executing import execute
from segraft.studies.phantoms import SYNTHETIC
from segraft.studies.planning import plan
from segraft.studies.reading import changed, checked, read_study
from segraft.studies.report import results_of, tables_of, write_study_report
from segraft.studies.run import Run, Runs, failure_of
from segraft.studies.running import run_study

SHAPE = (16, 16, 4)
VIT = {"patch_size": 4, "hidden_size": 12, "mlp_dim": 24, "num_layers": 2, "num_heads": 2}
UNETR = {"network": "unetr_channelwise", "arguments": {**VIT, "img_size": list(SHAPE), "feature_size": 4}}
ENCODER = {"network": "vit_small", "arguments": {**VIT, "decoder_layers": 1, "decoder_size": 32}}
MASKED = {"epochs": 2, "volumes": 4, "patches": 1, "learning_rate": 0.002}
ARMS = [
    {"base": "scratch", "strategies": ["full"]},
    {"base": "mae", "strategies": ["full", "decoder"]},
    {
        "base": "mae",
        "methods": ["rs_lora"],
        "ranks": [2, 4],
        "strategies": ["decoder"],
        "adapter": {"targets": r".*\.mlp\.linear1"},
    },
]


def write_scans(folder: Path, patients: list[str], rng: np.random.Generator, *, label: bool) -> Path:
    """Two channels in one file, a block in both and its middle in the second alone; or one channel without labels."""
    folder.mkdir()
    entries = []
    for patient in patients:
        mask = np.zeros(SHAPE, np.uint8)
        x, y = rng.integers(1, 6, 2)
        mask[x : x + 8, y : y + 8], mask[x + 2 : x + 6, y + 2 : y + 6] = 1, 2
        image = rng.normal(0, 1, (*SHAPE, 2)).cumsum(0) + 4 * np.stack([mask > 0, mask > 1], axis=-1)
        image = image if label else image[..., 0]
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([5, 5, 10, 1])), folder / f"{patient}.nii.gz")
        entries.append({"image": f"{patient}.nii.gz", "patient": patient})
        if label:
            nib.save(nib.Nifti1Image(mask, np.diag([5, 5, 10, 1])), folder / f"{patient}-mask.nii.gz")
            entries[-1]["label"] = f"{patient}-mask.nii.gz"
    regions = {"background": 0, "all of it": [1, 2], "middle": [2]}
    content = {
        "modality": {"0": "t1", "1": "t2"},
        "labels": regions,
        "regions_class_order": [1, 2],
        "training": entries,
    }
    (folder / "dataset.json").write_text(json.dumps(content if label else {"unlabelled": entries}))
    return folder / "dataset.json"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    write_scans(tmp_path / "target", [f"p{number}" for number in range(6)], rng, label=True)
    write_scans(tmp_path / "others", [f"u{number}" for number in range(4)], rng, label=False)
    return tmp_path


def study_of(scans: Path, **changes):
    content = {
        "name": "tiny",
        "title": "Tiny",
        "data": str(scans / "target" / "dataset.json"),
        "pretrain_data": str(scans / "others" / "dataset.json"),
        "shots": [2],
        "test_patients": 2,
        "seeds": [0, 1],
        "preparation": {"patch": list(SHAPE)},
        "bases": {
            "scratch": {**UNETR, "random": True},
            "mae": {**UNETR, "encoder": ENCODER, "training": MASKED},
        },
        "arms": ARMS,
        "training": {"epochs": 2, "volumes": 2, "patches": 1, "schedule": "onecycle", "learning_rate": 0.005},
        "reference": "full (scratch)",
        **changes,
    }
    return checked(content, "tiny")


def bases_of(scans: Path, **changes) -> dict[str, Run]:
    """Name of a base -> what the folder of its run says."""
    runs = Runs(scans / "runs")
    made = plan(study_of(scans, **changes), runs, device="cpu")
    return {run.arm: Run.read(runs.folder(run.key)) for run in made.runs if run.base is None}


def test_a_study(scans):
    out = scans / "out"
    result = run_study(study_of(scans), out, device="cpu")
    assert (result.done, result.failures) == (12, {})
    folders = {run.arm: out / "runs" / run.key for run in result.plan.runs if run.base is None}

    encoder, mae = (load_file(path / "base.safetensors") for path in (folders["mae"] / "encoder", folders["mae"]))
    shared = [key for key in encoder if key.startswith("vit.")]
    assert shared
    assert all(torch.equal(encoder[key], mae[key]) for key in shared)
    scratch, info = load_base(folders["scratch"])
    assert info.arguments["in_channels"] == 2
    untrained = scratch.state_dict()
    assert not all(torch.equal(untrained[key], mae[key]) for key in shared)
    others = [key for key in mae if not key.startswith("vit.")]
    assert all(torch.equal(untrained[key], mae[key]) for key in others), "decoder and head begin alike in all arms"

    scores, judgement = results_of(out)
    trained = {name: scores.trained(name) for name in scores.plan.arms}
    everything = sum(value.numel() for value in scratch.parameters())
    inside = sum(value.numel() for value in scratch.vit.parameters())
    assert trained["full (scratch)"] == trained["full (mae)"] == everything
    assert trained["decoder (mae)"] == everything - inside
    per_rank = 2 * 2 * (12 + 24)  # channels × blocks × (in + out)
    assert trained["rs_lora 4 + decoder (mae)"] == everything - inside + 4 * per_rank
    assert set(judgement.standings[2]["full (mae)"].labels) == {"all of it", "middle"}
    assert any("fell from" in note and "4 scans without labels" in note for note in scores.of_bases)
    assert judgement.references == {2: "full (scratch)"}
    assert "middle" in next(frame for caption, frame in tables_of(scores, judgement) if "by label" in caption)

    again = run_study(study_of(scans), out, device="cpu")
    assert (again.done, again.before) == (0, 12)
    assert "masked patches" in write_study_report(out).read_text()


def test_what_an_encoder_is_known_by(scans):
    keys = {name: run.key for name, run in bases_of(scans).items()}
    mae = {**UNETR, "encoder": ENCODER, "training": MASKED}

    def key(**changes):
        return bases_of(scans, bases={"mae": {**mae, **changes}}, arms=ARMS[1:], reference="full (mae)")["mae"].key

    assert key() == keys["mae"]
    changes = (
        {"training": {**MASKED, "mask": 0.5}},
        {"patients": 3},
        {"encoder": {**ENCODER, "arguments": {**ENCODER["arguments"], "decoder_layers": 2}}},
    )
    others = [key(**change) for change in changes]
    assert len({keys["mae"], *others}) == 4
    image = nib.load(scans / "others" / "u1.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata(dtype=np.float32) + 1, image.affine), scans / "others" / "u1.nii.gz")
    assert key() != keys["mae"], "a scan has changed"
    assert bases_of(scans)["scratch"].key == keys["scratch"], "it reads none"


def test_without_other_scans_it_learns_from_patients_that_are_not_in_the_study(scans):
    bases = bases_of(scans, pretrain_data=None, patients=4)
    made = plan(study_of(scans, pretrain_data=None, patients=4), Runs(scans / "runs"), device="cpu")
    assert set(bases["mae"].train) == {f"p{number}" for number in range(6)} - set(made.patients)
    with pytest.raises(SegraftError, match=r"every patient of .* is in the study"):
        bases_of(scans, pretrain_data=None)


def test_an_image_of_the_study_pretrains_nothing_under_another_name(scans):
    image = nib.load(scans / "target" / "p0.nii.gz")
    channel = nib.Nifti1Image(image.get_fdata(dtype=np.float32)[..., 1], image.affine)
    nib.save(channel, scans / "others" / "u2.nii.gz")
    assert bases_of(scans)["mae"].train == ("u0", "u1", "u3")


def test_a_pretraining_that_was_killed_goes_on(scans, monkeypatch):
    """Between its two steps, the encoder and the base, nothing is done twice, and the result is the same."""
    mae = {"mae": {**UNETR, "encoder": ENCODER, "training": MASKED}}
    changes = {"bases": mae, "arms": ARMS[1:], "reference": "full (mae)"}
    folders = []
    for name in ("whole", "killed"):
        runs = Runs(scans / name / "runs")
        (base,) = [r for r in plan(study_of(scans, **changes), runs, device="cpu").runs if r.base is None]
        folders.append(runs.folder(base.key))
    assert execute(folders[0]).failure is None
    with monkeypatch.context() as patched:

        def killed(*_, **__):
            raise KeyboardInterrupt

        patched.setattr(executing, "import_base", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(folders[1])
    made = (folders[1] / "encoder" / "base.safetensors").read_bytes()
    monkeypatch.setattr(executing, "pretrain_masked", killed)
    assert execute(folders[1]).failure is None
    assert (folders[1] / "encoder" / "base.safetensors").read_bytes() == made
    assert read_base(folders[0]).fingerprint == read_base(folders[1]).fingerprint


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ({"encoder": ENCODER, "weights": "w.pt"}, ["weights and an encoder to pre-train", "one of them alone"]),
        ({"encoder": ENCODER, "random": True}, ["an encoder to pre-train and a random start"]),
        ({"random": True, "weights": "w.pt"}, ["weights and a random start"]),
        ({"random": True, "training": {"epochs": 2}}, ["a random start, so nothing is pre-trained"]),
        ({"random": True, "patients": 2}, ["leave its training and patients out"]),
        ({"random": True, "labels": ["a"]}, ["names of the outputs of its weights"]),
        ({"encoder": ENCODER, "labels": ["a"]}, ["names of the outputs of its weights"]),
        ({"encoder": {"networks": "vit_base"}}, ["encoder.networks"]),
        ({"encoder": ENCODER, "training": {"loss": "dice_ce"}}, ["loss", "labels"]),
        ({"encoder": ENCODER, "training": {"mask": 1.5}}, ["mask"]),
        ({"training": {"mask": 0.5}}, ["mask"]),
    ],
    ids=str,
)
def test_bases_that_cannot_be(scans, base, says):
    with pytest.raises(SegraftError) as refused:
        study_of(scans, bases={"scratch": {**UNETR, "random": True}, "mae": {**UNETR, **base}})
    assert all(words in str(refused.value) for words in says)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder": {**ENCODER, "arguments": {**ENCODER["arguments"], "hidden_size": 24}}}, ["vit.", "hidden_size"]),
        ({"encoder": {**ENCODER, "arguments": {**ENCODER["arguments"], "num_layers": 3}}}, ["none of that name"]),
        ({"encoder": {**ENCODER, "arguments": {**ENCODER["arguments"], "img_size": [16, 16, 4]}}}, ["no img_size"]),
        ({"encoder": {"network": "unet3d"}}, ["unet3d", "no masked auto-encoder"]),
        ({"network": "unet3d", "arguments": {}}, ["none of that name"]),
    ],
    ids=str,
)
def test_an_encoder_that_does_not_fit_is_told_before_it_is_trained(scans, changes, says):
    mae = {**UNETR, "encoder": ENCODER, "training": MASKED, **changes}
    made = study_of(scans, bases={"mae": mae}, arms=ARMS[1:2], reference="full (mae)")
    with pytest.raises(SegraftError) as refused:
        run_study(made, scans / "out", device="cpu")
    assert all(words in str(refused.value) for words in ["the base 'mae'", *says[:1]])
    assert not (scans / "out").exists()


def test_the_patch_of_the_study_is_the_image_of_its_encoder(scans):
    with pytest.raises(SegraftError, match="patch of the preparation"):
        check_study(study_of(scans, preparation={}))
    with pytest.raises(SegraftError, match="position_embeddings"):
        check_study(study_of(scans, preparation={"patch": [16, 8, 4]}))


def test_an_encoder_that_is_there_already_takes_the_place_of_its_pretraining(scans):
    made = changed(study_of(scans), {}, weights=scans / "encoder.safetensors")
    assert {name: base.start for name, base in made.bases.items()} == {"scratch": "random", "mae": "weights"}
    assert made.bases["mae"].training == {}


def test_a_frozen_encoder_that_starts_at_random_may_be_asked_for(scans):
    """A control; but a base that was never trained cannot be tested as it is."""
    arms = [{"base": "scratch", "strategies": ["decoder", "none"]}]
    bases = {"scratch": {**UNETR, "random": True}}
    changes = {"arms": arms, "bases": bases, "reference": "decoder (scratch)", "seeds": [0]}
    result = run_study(study_of(scans, **changes), scans / "out", device="cpu")
    assert result.done == 2
    (reason,) = result.failures.values()
    assert "no trained output" in reason


def test_phantoms_are_drawn_where_no_cohort_is_given(scans):
    out = scans / "out"
    size = {"preparation": {"patch": [48, 48, 32]}, "phantoms": {"patients": 4, "unlabelled": 2}, "seeds": [0]}
    arguments = {**VIT, "patch_size": 16, "num_layers": 4}
    mae = {
        "network": "unetr_channelwise",
        "arguments": {**arguments, "img_size": [48, 48, 32], "feature_size": 2},
        "encoder": {"network": "vit_small", "arguments": {**arguments, "decoder_layers": 1, "decoder_size": 32}},
        "training": {**MASKED, "epochs": 1},
    }
    changes = {**size, "bases": {"mae": mae}, "arms": [{"base": "mae", "strategies": ["decoder"]}]}
    short = {"training": {"epochs": 1, "volumes": 2, "patches": 1}, "reference": "decoder (mae)"}
    made = study_of(scans, data=None, pretrain_data=None, **changes, **short)
    result = run_study(made, out, device="cpu")
    assert (result.done, result.failures) == (2, {})
    assert result.plan.study.notes[0] == SYNTHETIC
    scores, _ = results_of(out)
    assert set(scores.table["label"]) == {"WT", "TC", "ET"}
    drawn = {path: path.stat().st_mtime_ns for path in (out / "phantoms").rglob("*.nii.gz")}
    assert len(drawn) == 4 + 4 + 2
    assert run_study(made, out, device="cpu").before == 2
    assert all(path.stat().st_mtime_ns == when for path, when in drawn.items())

    given = made.model_copy(update={"pretrain_data": scans / "others" / "dataset.json"})
    with pytest.raises(SegraftError, match="give --data too, or neither"):
        run_study(given, scans / "other", device="cpu")
    shutil.rmtree(out / "phantoms" / "unlabelled")
    assert run_study(made, out, device="cpu").before == 2, "the same scans are drawn again"


def test_the_papers_settings():
    study = read_study("channelwise")
    names = [arm.name for arm in plan_arms(study)]
    assert names == [
        "full (scratch)",
        "full (mae)",
        "decoder (mae)",
        *(f"rs_lora {rank} + decoder (mae)" for rank in (16, 32, 64)),
    ]
    settings = study.settings({}, seed=0)
    assert (settings.epochs, settings.schedule, settings.learning_rate) == (200, "onecycle", 0.005)
    assert (settings.loss, settings.weight_decay) == ("dice_ce", 0)
    assert len(study.seeds) == 3
    small = read_study("channelwise_small")
    assert [arm.name for arm in plan_arms(small)] == names
    kept = ("schedule", "learning_rate", "loss", "weight_decay")
    assert all(getattr(small.settings({}, seed=0), name) == getattr(settings, name) for name in kept)


def test_the_decathlons_brain_tumours_become_regions(scans):
    listing = scans / "target" / "dataset.json"
    content = json.loads(listing.read_text())
    names = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    listing.write_text(json.dumps({**content, "labels": names, "regions_class_order": None}))
    found = Cohort.read(listing).select_labels(read_study("channelwise").labels)
    assert {name: found.covers(value) for value, name in found.items()} == {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}
    assert list(found) == [1, 2, 3], "in masks that are written, the same values stand for the same tissues"


def plan_arms(study):
    from segraft.studies.spec import arms_of

    return [arm for arms in study.arms for arm in arms_of(arms)]


def test_a_failed_pretraining_says_why(scans):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.float32), np.eye(4)), scans / "others" / "u3.nii.gz")
    result = run_study(study_of(scans), scans / "out", device="cpu")
    (base,) = [run.key for run in result.plan.runs if run.arm == "mae" and run.base is None]
    reason = failure_of(scans / "out" / "runs" / base)
    assert reason is not None
    assert "u3.nii.gz is constant" in reason
    assert (result.done, result.waiting) == (3, 8)
