"""Scans of several channels: how their files are listed, what is read, and what becomes of missing channels."""

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segraft.data.case import images_of
from segraft.data.channel_files import grouped, scan_name
from segraft.data.channels import load_channels
from segraft.data.checks import check_cases, check_scan, load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.labels import Labels
from segraft.data.patches import PatchSource
from segraft.data.preparation import Percentiles, Preparation, Window, prepare_case, prepare_scan
from segraft.data.scan_preparation import recorded_preparation
from segraft.errors import SegraftError

SHAPE = (10, 9, 8)
NAMES = ("FLAIR", "T1", "T2")
RNG = np.random.default_rng(0)
VOLUMES = {name: RNG.gamma(2, 10 ** (place + 1), SHAPE).astype(np.float32) for place, name in enumerate(NAMES)}
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[2:7, 2:6, 2:6], LABEL[3:6, 3:5, 3:5] = 1, 2


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def listed(folder: Path, image, **keys) -> Cohort:
    save(folder / "labels" / "a.nii.gz", LABEL)
    content = {
        "modality": {str(place): name for place, name in enumerate(NAMES)},
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "training": [{"image": image, "label": "labels/a.nii.gz"}],
    } | keys
    (folder / "dataset.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )
    return Cohort.read(folder)


def in_files(folder: Path, pattern: str) -> None:
    for place, (name, data) in enumerate(VOLUMES.items()):
        save(folder / pattern.format(name=name, place=place), data)


def decathlon(folder: Path):
    save(folder / "images" / "a.nii.gz", np.stack(list(VOLUMES.values()), axis=-1))
    return listed(folder, "images/a.nii.gz")


def vector_axis(folder: Path):
    """NIfTI's own place for several values per voxel is the fifth axis."""
    save(folder / "images" / "a.nii.gz", np.stack(list(VOLUMES.values()), axis=-1)[:, :, :, None])
    return listed(folder, "images/a.nii.gz")


def nnunet(folder: Path):
    in_files(folder, "images/a_{place:04}.nii.gz")
    channels = {str(place): name for place, name in enumerate(NAMES)}
    return listed(folder, "images/a_0000.nii.gz", modality=None, channel_names=channels)


def nnunet_first_version(folder: Path):
    in_files(folder, "images/a_{place:04}.nii.gz")
    return listed(folder, "images/a.nii.gz")


def in_order(folder: Path):
    in_files(folder, "images/a_{name}.nii.gz")
    return listed(folder, [f"images/a_{name}.nii.gz" for name in NAMES])


def numbered_scans(folder: Path):
    """4D files that are numbered as nnU-Net numbers channels: what they hold tells them apart."""
    four = np.stack(list(VOLUMES.values()), axis=-1)
    save(folder / "a.nii.gz", four)
    save(folder / "images" / "a_0000.nii.gz", four)
    save(folder / "images" / "a_0001.nii.gz", four + 1)
    assert grouped([folder / "images" / "a_0001.nii.gz"], 3) == [(folder / "images" / "a_0001.nii.gz",)]
    return listed(folder, "images/a_0000.nii.gz")


def by_name(folder: Path):
    in_files(folder, "a/{name}.nii.gz")
    return listed(folder, {name.lower(): f"a/{name}.nii.gz" for name in reversed(NAMES)})


LAYOUTS = [decathlon, vector_axis, nnunet, nnunet_first_version, numbered_scans, in_order, by_name]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    """Whatever the layout, it is the same scan: channels in order, one digest, one id."""
    cohort = layout(tmp_path)
    (case,) = cohort.cases
    assert (case.id, case.patient, cohort.modalities, cohort.channels) == ("a", "a", NAMES, NAMES)
    scan = check_scan(case)
    assert scan.names == NAMES
    for channel, volume in zip(scan.channels, VOLUMES.values(), strict=True):
        np.testing.assert_array_equal(channel.get_fdata(), volume)
    each = [hashlib.sha256(repr(SHAPE).encode() + volume.tobytes()).hexdigest()[:16] for volume in VOLUMES.values()]
    assert case.digest() == "-".join(each)
    assert images_of(case.digest()) == set(each)
    check_cases(cohort.cases, cohort, cohort.select_labels([]))


@pytest.mark.parametrize(
    ("files", "channels", "name"),
    [
        (("p3_0000.nii.gz", "p3_0001.nii.gz"), (), "p3"),
        ((None, "p3_0001.nii.gz"), (), "p3"),
        ((None, "s/p3_t1.nii.gz"), ("FLAIR", "T1"), "p3"),
        ((None, "s/p3_t1.nii.gz"), (), "p3_t1"),
        (("a/p3_flair.nii.gz", None, "b/p3_t1.nii.gz"), (), "p3"),
        (("p3/flair.nii.gz", "p3/t1.nii.gz"), (), "p3"),
        (("all.nii.gz",), ("FLAIR", "T1"), "all"),
    ],
)
def test_a_scan_that_lacks_channels_or_their_names(files, channels, name):
    assert scan_name(files, channels) == name


def test_two_files_for_one_channel(tmp_path):
    with pytest.raises(SegraftError, match=r"entry 0 of .* has two files for one channel \(FLAIR, T1, t1\)"):
        listed(tmp_path, {NAMES[0]: "a.nii.gz", "T1": "b.nii.gz", "t1": "c.nii.gz"})


def test_a_channel_by_itself_is_recognised(tmp_path):
    """A base that saw the FLAIR alone saw this patient."""
    several = nnunet(tmp_path).cases[0]
    alone = Case("b", "b", (tmp_path / "images/a_0001.nii.gz",), None)
    assert images_of(alone.digest()) < images_of(several.digest())


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (["x.nii.gz", "y.nii.gz"], "training entry 0 of .* has 2 images where 3 channels are listed"),
        ({"FLAIR": "x.nii.gz", "DWI": "y.nii.gz"}, '"DWI", which is not among those listed'),
        ([None, None, None], "no image in any channel"),
        ({"FLAIR": None}, "no image in any channel"),
        ([], "training.0.image: Value error, give a file, or files by channel"),
        ([""], "give a file, or files by channel"),
        (7, "give a file, or files by channel"),
        (None, "give a file, or files by channel"),
        (["../x.nii.gz", None, None], "leaves its folder"),
    ],
)
def test_what_is_listed_wrongly(tmp_path, image, says):
    with pytest.raises(SegraftError, match=says) as error:
        listed(tmp_path, image)
    assert "\n" not in str(error.value)


def test_channels_that_are_not_named(tmp_path):
    in_files(tmp_path, "images/a_{name}.nii.gz")
    files = [f"images/a_{name}.nii.gz" for name in NAMES]
    cohort = listed(tmp_path, files, modality=None)
    assert cohort.channels == ("channel 0", "channel 1", "channel 2")
    with pytest.raises(SegraftError, match='lists no channels: add "modality"'):
        listed(tmp_path, dict(zip(NAMES, files, strict=True)), modality=None)
    with pytest.raises(SegraftError, match=r"two channels of one name \(T1, t-1\)"):
        listed(tmp_path, files, modality={"0": "T1", "1": "t-1"})


@pytest.mark.parametrize(
    ("files", "channels", "name"),
    [
        (["i/a.nii.gz"], (), "a"),
        (["i/a_0000.nii.gz"], (), "a"),
        (["i/a_0000.nii.gz", "i/a_0001.nii.gz"], ("x", "y"), "a"),
        ([None, "i/a_0001.nii.gz"], ("x", "y"), "a"),
        (["i/p1_flair.nii", "i/p1_t1.nii"], ("FLAIR", "T1"), "p1"),
        ([None, "i/p1_t1.nii"], ("FLAIR", "T1"), "p1"),
        (["p1/T2_x.nii", "p1/T1_x.nii"], ("T2", "T1"), "p1"),
        (["p1/T2.nii", None], ("T2", "T1"), "p1"),
        (["T2.nii", "T1.nii"], ("T2", "T1"), "T2"),
    ],
)
def test_what_a_scan_is_called(files, channels, name):
    assert scan_name(files, channels) == name


@pytest.mark.parametrize("missing", [1, 0])
@pytest.mark.parametrize("layout", ["list", "mapping", "absent", "nnunet", "4D"])
def test_a_channel_that_is_missing(tmp_path, layout, missing):
    name, there = NAMES[missing], [each for each in NAMES if each != NAMES[missing]]
    in_files(tmp_path, "a_{place:04}.nii.gz")
    files = {each: f"a_{place:04}.nii.gz" for place, each in enumerate(NAMES)}
    (tmp_path / files[name]).unlink()
    whole = np.stack(list(VOLUMES.values()), axis=-1)
    whole[..., missing] = np.nan
    save(tmp_path / "four.nii.gz", whole)
    cohort = listed(
        tmp_path,
        {
            "list": [None if each == name else files[each] for each in NAMES],
            "mapping": files | {name: None},
            "absent": {each: files[each] for each in there},
            "nnunet": "a_0000.nii.gz",
            "4D": "four.nii.gz",
        }[layout],
    )
    (case,) = cohort.cases
    assert case.id == ("four" if layout == "4D" else "a")
    scan, label = load_case(case)
    assert scan.missing == (name,)
    np.testing.assert_array_equal(label.get_fdata(), LABEL)
    digests = case.digest().split("-")
    assert digests[missing] == "missing"
    assert len(images_of(case.digest())) == 2
    says = f"the case {case.id} lacks its channel {name}, which the network needs"
    with pytest.raises(SegraftError, match=says):
        check_cases([case], cohort, cohort.select_labels([]))
    check_cases([case], cohort, cohort.select_labels([]), complete=False)


def scan_of(folder: Path, *volumes: np.ndarray | None, affines=None, names=NAMES):
    files = []
    for place, volume in enumerate(volumes):
        affine = None if affines is None else affines[place]
        files.append(None if volume is None else save(folder / f"x_{place:04}.nii.gz", volume, affine))
    return load_channels(files, names[: len(files)], who="the case x")


def test_no_channel_at_all(tmp_path):
    with pytest.raises(SegraftError, match="the case x has none of its channels"):
        scan_of(tmp_path, None, None)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((6, 6, 6), r"\(6, 6, 6\) where the 3 channels FLAIR, T1, T2"), ((6, 6, 6, 4), r"\(6, 6, 6, 4\) where the 3")],
)
def test_one_file_with_other_channels(tmp_path, shape, says):
    path = save(tmp_path / "x.nii.gz", RNG.normal(size=shape).astype(np.float32))
    with pytest.raises(SegraftError, match=says):
        load_channels([path], NAMES, who="the case x")


@pytest.mark.parametrize(("bad", "says"), [(np.nan, "NaN or infinite"), (7.0, "is constant, every voxel is 7")])
def test_a_bad_channel_is_named(tmp_path, bad, says):
    volumes = dict(VOLUMES)
    volumes["T1"] = np.full(SHAPE, bad, np.float32) if bad == 7 else VOLUMES["T1"].copy()
    volumes["T1"][0, 0, 0] = bad
    in_files(tmp_path, "a_{place:04}.nii.gz")
    save(tmp_path / "a_0001.nii.gz", volumes["T1"])
    case = listed(tmp_path, "a_0000.nii.gz").cases[0]
    with pytest.raises(SegraftError, match=rf"the channel T1 of the case a \(.*a_0001\.nii\.gz\).*{says}"):
        check_scan(case)


class TestPreparation:
    def test_each_channel_is_scaled_by_its_own_percentiles(self, tmp_path):
        scan = scan_of(tmp_path, *VOLUMES.values())
        prepared = prepare_scan(scan, Preparation()).numpy()
        assert prepared.shape == (3, *SHAPE)
        for plane, volume in zip(prepared, VOLUMES.values(), strict=True):
            low, high = np.percentile(volume.astype(float), [0.5, 99.5])
            np.testing.assert_allclose(plane, ((volume - low) / (high - low)).clip(0, 1), atol=1e-5)

    def test_as_each_channel_by_itself(self, tmp_path):
        """All that is done to a channel is done to it alone, but for the crop."""
        preparation = Preparation(spacing=(0.7, 1.3, 2), orientation="PSL")
        scan = scan_of(tmp_path, *VOLUMES.values())
        together = prepare_scan(scan, preparation)
        for place, (name, volume) in enumerate(VOLUMES.items()):
            alone = prepare_scan(scan_of(tmp_path / name, volume), preparation)
            assert torch.equal(together[place].as_tensor(), alone[0].as_tensor())
            assert torch.equal(together.affine, alone.affine)

    def test_settings_for_each_channel(self, tmp_path):
        scan = scan_of(tmp_path, *list(VOLUMES.values())[:2])
        each = Preparation(intensity=[{"kind": "window", "low": 0, "high": 50}, {"kind": "percentiles", "lower": 5}])
        assert each.intensity == (Window(low=0, high=50), Percentiles(lower=5))
        prepared = prepare_scan(scan, each).numpy()
        np.testing.assert_allclose(prepared[0], (VOLUMES["FLAIR"] / 50).clip(0, 1), atol=1e-6)
        low, high = np.percentile(VOLUMES["T1"].astype(float), [5, 99.5])
        np.testing.assert_allclose(prepared[1], ((VOLUMES["T1"] - low) / (high - low)).clip(0, 1), atol=1e-5)
        assert recorded_preparation(each.model_dump(mode="json"), "x") == each
        with pytest.raises(SegraftError, match="2 intensity settings were given for 3 channels"):
            prepare_scan(scan_of(tmp_path, *VOLUMES.values()), each)

    def test_the_crop_holds_what_any_channel_has(self, tmp_path):
        one, other = np.zeros((2, 12, 12, 12), np.float32)
        one[2:4, 5:7, 5:7], other[7:9, 5:7, 3:5] = RNG.uniform(1, 2, (2, 2, 2)), RNG.uniform(1, 2, (2, 2, 2))
        preparation = Preparation(crop_foreground=True, intensity=Window(low=0, high=1))
        prepared = prepare_scan(scan_of(tmp_path, one, None, other), preparation)
        assert prepared.shape == (3, 7, 2, 4)
        np.testing.assert_array_equal(prepared.affine[:3, 3], [2, 5, 3])

    @pytest.mark.parametrize("spacing", [None, (0.8, 1.7, 1.0)])
    @pytest.mark.parametrize("crop", [False, True])
    @pytest.mark.parametrize("missing", [0, 1, 2])
    def test_a_missing_channel_is_nan_and_the_others_as_they_would_be(self, tmp_path, spacing, crop, missing):
        preparation = Preparation(spacing=spacing, crop_foreground=crop, orientation="LAS")
        volumes: list[np.ndarray | None] = list(VOLUMES.values())
        whole = prepare_scan(scan_of(tmp_path / "whole", *volumes), preparation).as_tensor()
        volumes[missing] = None
        found = prepare_scan(scan_of(tmp_path / "part", *volumes), preparation).as_tensor()
        assert torch.isnan(found[missing]).all()
        there = [place for place in range(3) if place != missing]
        assert not torch.isnan(found[there]).any()
        if not crop:
            assert torch.equal(found[there], whole[there])

    def test_channels_on_other_grids(self, tmp_path):
        """A linear ramp in mm is the same ramp on any grid; beyond its edge its lowest value holds."""
        coarse = np.diag([2.0, 2, 3, 1])
        coarse[:3, 3] = (1, -2, 0.5)
        fine = np.diag([1.0, 1, 1, 1])
        ramps = []
        for affine, shape in ((fine, (20, 12, 14)), (coarse, (7, 10, 6))):
            place = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
            ramps.append((place @ [1.0, 2, 3] + 100).astype(np.float32))
        scan = scan_of(tmp_path, *ramps, affines=(fine, coarse))
        with pytest.raises(SegraftError) as error:
            prepare_scan(scan, Preparation())
        for word in (
            "FLAIR",
            "T1",
            "x_0000",
            "x_0001",
            "20×12×14",
            "7×10×6 voxels of 2×2×3 mm",
            "--channel-grids resample",
        ):
            assert word in str(error.value)
        window = Preparation(channel_grids="resample", intensity=Window(low=0, high=1000))
        prepared = prepare_scan(scan, window)
        assert prepared.shape == (2, 20, 12, 14)
        inside = prepared[:, 1:14, :, 1:14]  # the coarse one reaches from 1 to 13 along X, -2 to 16, 0.5 to 15.5
        np.testing.assert_allclose(inside[1], inside[0], atol=1e-5)
        np.testing.assert_allclose(prepared[1, 16:], float(ramps[1].min()) / 1000, atol=1e-6)
        # in one interpolation, straight to the spacing asked for
        half = prepare_scan(scan, window.model_copy(update={"spacing": (0.5, 0.5, 0.5)}))
        np.testing.assert_allclose(half[1, 2:26, :, 2:26], half[0, 2:26, :, 2:26], atol=1e-5)

    def test_the_grid_is_the_first_channels_that_is_there(self, tmp_path):
        affines = (np.eye(4), np.diag([1.0, 1, 2, 1]), np.diag([1.0, 1, 2, 1]))
        scan = scan_of(tmp_path, None, *list(VOLUMES.values())[1:], affines=affines)
        prepared = prepare_scan(scan, Preparation())
        assert prepared.affine[2, 2] == 2

    def test_a_head_has_one_channel(self, tmp_path):
        with pytest.raises(SegraftError, match="the case x has several channels, and only a head CT is levelled"):
            prepare_scan(scan_of(tmp_path, *VOLUMES.values()), Preparation(head=True))


class TestPatches:
    PLAIN = Window(low=0, high=1000)

    @pytest.fixture
    def case(self, tmp_path) -> Case:
        """Three channels that say where a voxel was, each in its own scale."""
        place = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.float32)
        files = [save(tmp_path / f"a_{k:04}.nii.gz", place * scale) for k, scale in enumerate((1, 0.5, 0.25))]
        return Case("a", "a", tuple(files), save(tmp_path / "l.nii.gz", LABEL), channels=NAMES)

    @pytest.mark.parametrize("augmentation", ["none", "standard", "elastic"])
    def test_one_geometry_for_all_channels(self, case, augmentation, monkeypatch):
        monkeypatch.setattr("segraft.data.augmentation.Augmentation.recolour", lambda *_, **__: None)
        preparation = Preparation(intensity=self.PLAIN, patch=(6, 5, 4))
        patches = PatchSource([case], preparation, [1], seed=3, patches_per_volume=20, augmentation=augmentation)
        image = patches[0, 0]["image"]
        assert image.shape == (20, 3, 6, 5, 4)
        np.testing.assert_allclose(image[:, 1], image[:, 0] / 2, atol=1e-6)
        np.testing.assert_allclose(image[:, 2], image[:, 0] / 4, atol=1e-6)

    def test_intensities_vary_each_by_itself(self, case):
        preparation = Preparation(intensity=Percentiles(lower=0, upper=100), patch=SHAPE)
        item = PatchSource([case], preparation, [1], seed=3, patches_per_volume=4)[0, 0]["image"]
        assert not np.isclose(item[:, 0].amax((1, 2, 3)), item[:, 1].amax((1, 2, 3))).any()

    def test_a_first_channel_is_cut_as_it_is_alone(self, case):
        """So cohorts of one channel see the patches that they always saw."""
        preparation = Preparation(intensity=self.PLAIN, patch=(6, 5, 4))
        alone = Case("a", "a", case.images[:1], case.label)
        one, several = (PatchSource([each], preparation, [1], seed=3, patches_per_volume=1) for each in (alone, case))
        for epoch in range(5):
            found, other = one[epoch, 0], several[epoch, 0]
            assert torch.equal(found["image"], other["image"][:, :1])
            assert torch.equal(found["label"], other["label"])

    @pytest.mark.parametrize("augmentation", ["none", "standard", "elastic"])
    @pytest.mark.parametrize("patch", [(6, 5, 4), (14, 12, 3), (6, 6, 1)])
    def test_a_missing_channel_is_nan_throughout(self, case, augmentation, patch):
        """Also where the volume is padded, and where a turned patch reaches beyond it."""
        lacking = Case("a", "a", (case.images[0], None, case.images[2]), case.label, channels=NAMES)
        patches = PatchSource(
            [lacking], Preparation(intensity=self.PLAIN, patch=patch), [1, 2], seed=3, patches_per_volume=12,
            augmentation=augmentation,
        )  # fmt: skip
        item = patches[0, 0]
        assert torch.isnan(item["image"][:, 1]).all()
        assert torch.isfinite(item["image"][:, [0, 2]]).all()
        assert torch.isfinite(item["label"]).all()


def test_files_of_one_scan_are_found_together(tmp_path):
    paths = [save(tmp_path / name, np.zeros((2, 2, 2))) for name in ("a_0000.nii.gz", "a_0002.nii.gz", "b.nii.gz")]
    expected = [(paths[0], None, paths[1]), (paths[2],)]
    assert grouped(paths, 3) == expected
    assert grouped([paths[1], paths[2], paths[0]], 3) == expected
    with pytest.raises(SegraftError, match="named as channel 2 of a scan, counted from 0, and the network takes 2"):
        grouped(paths, 2)


@pytest.mark.data
def test_a_real_stroke_with_a_channel_on_another_grid(real_data):
    folder = real_data / "isles22_case"
    files = tuple(next(folder.glob(f"rawdata/*/*/*_{kind}.nii.gz")) for kind in ("dwi", "adc", "flair"))
    label = next(folder.glob("derivatives/*/*/*_msk.nii.gz"))
    case = Case("stroke", "stroke", files, label, channels=("DWI", "ADC", "FLAIR"))
    with pytest.raises(SegraftError, match=r"channel FLAIR .* another grid than the channel DWI"):
        prepare_case(case, Preparation(), Labels({1: "stroke"}))
    prepared = prepare_case(case, Preparation(channel_grids="resample"), Labels({1: "stroke"}))
    image, lesion = prepared["image"], prepared["label"][0] > 0
    assert image.shape == (3, 112, 112, 73)
    # the FLAIR shows the brain where the DWI does, and the lesion is bright in both
    brain = image[0] > 0.1
    assert float(image[2][brain].mean()) > 5 * float(image[2][~brain].mean())
    assert float(image[2][lesion].mean()) > float(image[2][brain].mean())
    assert float(image[0][lesion].mean()) > 1.5 * float(image[0][brain].mean())
