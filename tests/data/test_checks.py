import numpy as np
import pytest

from segraft.data.checks import check_cases, check_image, load_case
from segraft.data.cohort import Case, Cohort
from segraft.data.preparation import Preparation, prepare_case
from segraft.errors import SegraftError

IMAGE = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
LABEL = np.zeros(IMAGE.shape, np.uint8)
LABEL[1:3, 1:3, 1:3] = 1


@pytest.fixture
def cohort(write_listing) -> Cohort:
    return Cohort.read(write_listing())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(write_case, bad):
    image = IMAGE.copy()
    image[2, 3, 4] = bad
    with pytest.raises(SegraftError, match=r"a\.nii\.gz holds NaN or infinite"):
        check_image(write_case("a", image).image)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_constant(write_case, dtype):
    with pytest.raises(SegraftError, match=r"a\.nii\.gz is constant, every voxel is 7"):
        check_image(write_case("a", np.full(IMAGE.shape, 7, dtype)).image)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_whole_labels_of_any_type_pass(write_case, cohort, dtype):
    cases = [write_case("a", IMAGE, LABEL.astype(dtype)), write_case("b", IMAGE, LABEL * 2)]
    check_cases(cases, cohort, {1: "anterior", 2: "Posterior"})


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        (None, "case a .* has no label"),
        (LABEL * np.float32(0.5), "fractions"),
        (LABEL * np.float32(np.nan), "fractions"),
        (LABEL.astype(np.int16) * -1, "negative value -1"),
        (LABEL[:-1], r"different grids \(shapes"),
    ],
)
def test_bad_label(write_case, label, complaint):
    with pytest.raises(SegraftError, match=complaint):
        load_case(write_case("a", IMAGE, label), {1: "anterior"})


def test_a_label_file_is_read_whole_whatever_is_asked(write_case):
    """So that values that nobody listed are seen."""
    case = write_case("a", IMAGE, LABEL * 3)
    for asked in (None, [], {1: "anterior"}):
        assert set(np.unique(load_case(case, asked)[1].get_fdata())) == {0, 3}


def test_shifted_label(write_case):
    image, label = write_case("a", IMAGE, LABEL), write_case("b", IMAGE, LABEL, affine=np.diag([1.0, 1, 2, 1]))
    with pytest.raises(SegraftError, match=r"different grids \(positions"):
        load_case(Case("a", "a", image.images, label.label))


class TestALabelOnAnotherGridThanTheFirstChannel:
    """What the user can do, and that it helps."""

    NAMES = ("FLAIR", "T1")
    THICK = np.diag([1.0, 1, 2, 1])
    RESAMPLED = Preparation(channel_grids="resample", patch=(4, 4, 4))

    def refusal(self, *images, names=NAMES, label):
        with pytest.raises(SegraftError) as error:
            prepare_case(Case("a", "a", images, label, channels=names), self.RESAMPLED, {1: "anterior"})
        return str(error.value)

    @pytest.fixture
    def fine(self, write_case):
        return write_case("fine", IMAGE, LABEL)

    @pytest.fixture
    def thick(self, write_case):
        return write_case("thick", IMAGE[..., :4], LABEL[..., :4], affine=self.THICK)

    def test_of_one_channel(self, fine, thick):
        told = self.refusal(thick.image, names=(), label=fine.label)
        assert f"{fine.label} and its image {thick.image} lie on different grids" in told
        assert told.endswith(
            ": resample the image onto the grid of the label, or the label onto that of the image (labels by nearest "
            "neighbour)."
        )

    def test_where_the_first_is_missing(self, fine, thick):
        told = self.refusal(None, thick.image, label=fine.label)
        assert f"{fine.label} and its image {thick.image} lie on different grids" in told
        assert told.endswith(
            ": the case lacks FLAIR, so T1 is its first channel, and --channel-grids is for channels among themselves: "
            "resample that image onto the grid of the label, or the label onto that of the image (labels by nearest "
            "neighbour)."
        )

    def test_where_all_are_there(self, fine, thick):
        told = self.refusal(thick.image, thick.image, label=fine.label)
        assert "lacks" not in told
        assert "): --channel-grids is for channels among themselves: resample that image" in told

    def test_where_another_has_the_grid_of_the_label(self, fine, thick):
        told = self.refusal(thick.image, fine.image, label=fine.label)
        assert told.endswith(
            ": it has that of the channel T1, and must have that of the first, FLAIR: list T1 first among the "
            "channels, with --channel-grids resample for the others, or resample the label onto FLAIR (labels by "
            "nearest neighbour)."
        )
        turned = Case("a", "a", (fine.image, thick.image), fine.label, channels=self.NAMES[::-1])
        prepared = prepare_case(turned, self.RESAMPLED, {1: "anterior"})
        assert prepared["image"].shape == (2, *IMAGE.shape)
        assert int(prepared["label"].sum()) == LABEL.sum()


def test_unknown_value(write_case, cohort):
    with pytest.raises(SegraftError, match=r"labelsTr/a\.nii\.gz holds the value 3, which .*dataset\.json"):
        check_cases([write_case("a", IMAGE, LABEL * 3)], cohort, {1: "anterior"})


def test_asked_label_absent(write_case, cohort):
    cases = [write_case("a", IMAGE, LABEL), write_case("b", IMAGE, LABEL * 0)]
    check_cases(cases, cohort, {1: "anterior"})
    with pytest.raises(SegraftError, match=r"label 2 \(Posterior\) is in none of the 2 training cases of .*json"):
        check_cases(cases, cohort, {1: "anterior", 2: "Posterior"})


@pytest.mark.data
def test_real_cohort(real_data):
    cohort = Cohort.read(real_data / "hippocampus")
    check_cases(cohort.cases[:20], cohort, cohort.labels)


@pytest.mark.data
def test_real_label_on_another_grid(real_data):
    folder = real_data / "totalsegmentator_examples" / "pulmonary_report" / "models"
    (image,) = folder.glob("ct_cropped*.nii.gz")
    with pytest.raises(SegraftError, match=r"heart\.nii\.gz .* lie on different grids"):
        load_case(Case("ct", "ct", (image,), folder / "heart.nii.gz"))
