"""The pictures: that they are PNGs of the right size and show what they should."""

import io
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import ndimage

from segraft.errors import SegraftError
from segraft.evaluation.figures import COLOURS, DPI, comparison_figure, dice_figure

SHAPE, SPACING = (40, 50, 6), (1.0, 1.0, 4.0)


def opened(png):
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    picture.load()
    return np.asarray(picture.convert("RGB")).astype(int)


def phantom():
    """A grey head with one bright finding on the patient's right."""
    x, y = np.indices(SHAPE[:2])
    head = ((x - 20) / 17) ** 2 + ((y - 25) / 22) ** 2 < 1
    finding = np.hypot(x - 28, y - 20) < 6
    image = np.repeat(np.where(finding, 70.0, np.where(head, 35.0, 0.0))[..., None], SHAPE[2], axis=2)
    truth = np.zeros(SHAPE, dtype=np.uint8)
    truth[..., 2:5] = finding[..., None]
    return image, truth


def compare(predictions=None, *, spacing=SPACING, **options):
    image, truth = phantom()
    predictions = {"DoRA": truth} if predictions is None else predictions
    options = {"window": (0, 80), "title": "A case"} | options
    return opened(comparison_figure(image, truth, predictions, spacing_mm=spacing, **options))


def tinted(pixels, colour, base):
    """Where a panel shows `colour` at its opacity over a grey of `base`."""
    blend = 0.55 * np.array(to_rgb(colour)) * 255 + 0.45 * base / 80 * 255
    return np.abs(pixels - blend).max(axis=-1) < 6


def test_it_grows_by_one_panel_for_each_prediction():
    _, truth = phantom()
    widths = [compare(dict.fromkeys("abc"[:count], truth)).shape[1] for count in (1, 2, 3)]
    assert widths[1] - widths[0] == pytest.approx(widths[2] - widths[1], abs=1)
    assert widths[1] - widths[0] > 1.5 * DPI


def test_panels_keep_the_shape_of_the_body():
    """The head is 44 × 34 mm here; with voxels three times as high it must be drawn three times as high."""

    def ratio(spacing):
        grey = np.abs(compare(spacing=spacing) - 35 / 80 * 255).max(axis=-1) < 3
        first = grey[:, : grey.shape[1] // 3]
        rows, columns = np.flatnonzero(first.sum(axis=1) > 3), np.flatnonzero(first.sum(axis=0) > 3)
        return np.ptp(rows) / np.ptp(columns)

    assert ratio((1, 1, 4)) == pytest.approx(43 / 33, rel=0.08)
    assert ratio((1, 3, 4)) == pytest.approx(3 * ratio((1, 1, 4)), rel=0.08)


def test_the_mask_is_filled_in_truth_and_prediction_and_on_the_viewers_left():
    pixels = compare()
    columns = np.flatnonzero(tinted(pixels, COLOURS[0], 70).any(axis=0))
    third = pixels.shape[1] / 3
    panels = [columns[(columns >= i * third) & (columns < (i + 1) * third)] for i in range(3)]
    assert panels[0].size == 0
    for place, panel in enumerate(panels[1:], start=1):
        assert panel.size > 20
        assert panel.mean() < (place + 0.5) * third  # the patient's right


def test_a_missed_finding_has_an_outline_and_no_fill():
    pixels = compare({"base": np.zeros(SHAPE, dtype=int)})
    third = pixels.shape[1] // 3
    bright = np.abs(pixels - 70 / 80 * 255).max(axis=-1) < 3
    white = []
    for panel in (0, 2):
        parts, _ = ndimage.label(bright & (np.arange(pixels.shape[1]) // third == panel)[None])
        finding = 1 + np.bincount(parts.ravel())[1:].argmax()
        rows, columns = np.nonzero(parts == finding)
        box = pixels[rows.min() - 6 : rows.max() + 7, columns.min() - 6 : columns.max() + 7]
        assert not tinted(box, COLOURS[0], 70).any()
        white.append((box.min(axis=-1) > 250).sum())
    assert white[0] == 0  # the image alone
    assert white[1] > 50  # what should have been found


def test_a_label_keeps_its_colour_where_others_are_missing():
    image, truth = phantom()
    png = comparison_figure(image, truth * 3, {"a": truth * 3}, window=(0, 80), spacing_mm=SPACING, title="t")
    assert tinted(opened(png), COLOURS[2], 70).sum() > 200


@pytest.mark.parametrize("count", [0, 3, 9, 23])
def test_any_number_of_labels(count):
    image = np.tile(np.linspace(0, 80, 48)[:, None, None], (1, 48, 3))
    truth = np.zeros(image.shape, dtype=int)
    for label in range(1, count + 1):
        row, column = divmod(label - 1, 6)
        truth[2 + 8 * column : 7 + 8 * column, 2 + 8 * row : 7 + 8 * row] = label
    png = comparison_figure(image, truth, {"m": truth}, window=None, spacing_mm=(1, 1, 1), title="labels")
    assert opened(png).std() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"title": "$x_$ <b> ^ \\frac{", "labels": {1: "$\\nope$"}, "predictions": {"$_$": phantom()[1]}},
        {"title": "long " * 60, "labels": {1: "x" * 200}, "predictions": {"y" * 200: phantom()[1]}},
        {"title": "", "predictions": {"": phantom()[1]}},
        {"title": "none", "predictions": {}},
        {"title": "grid", "window": None},
    ],
    ids=["mathtext", "long", "empty", "no predictions", "no window"],
)
def test_any_text_can_be_drawn(options):
    assert compare(**options).size


def test_the_same_input_is_the_same_picture():
    assert (compare() == compare()).all()


def test_no_global_state_is_touched():
    compare()
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize(
    ("truth", "prediction", "window"),
    [
        (phantom()[1][:-1], phantom()[1], None),
        (phantom()[1], phantom()[1][..., :-1], None),
        (phantom()[1], phantom()[1], (80, 0)),
        (phantom()[1], phantom()[1], (5, 5)),
    ],
)
def test_bad_input_is_refused(truth, prediction, window):
    with pytest.raises(SegraftError, match=r": (resample|give) "):
        comparison_figure(phantom()[0], truth, {"m": prediction}, window=window, spacing_mm=SPACING, title="bad input")


# ---- box plot ----


def scores(count, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.9, count).tolist()


def test_every_score_is_a_point():
    def blue(values):
        return (np.abs(opened(dice_figure({"LoRA": values})) - [70, 146, 194]).max(axis=-1) < 45).sum()

    assert blue(scores(20)) > 3 * blue(scores(5)) > 0


def test_more_groups_are_wider():
    few, many = (opened(dice_figure({f"m{i}": scores(5) for i in range(n)})) for n in (5, 12))
    assert many.shape[1] == pytest.approx(few.shape[1] + 7 * 1.05 * DPI, abs=2)
    assert many.shape[0] == few.shape[0]


@pytest.mark.parametrize(
    "groups",
    [
        {"one": [0.5]},
        {"none": []},
        {"some": scores(9), "none": []},
        {"HD95 $_$": [0.0, 3.0, 170.0]},
        {"same": [0.7] * 12},
        {"a method with a long name that wraps": [0, 1]},
    ],
    ids=lambda groups: next(iter(groups)),
)
def test_any_scores_can_be_drawn(groups):
    assert opened(dice_figure(groups, ylabel="HD95 (mm) $_$")).size


@pytest.mark.parametrize("groups", [{}, {"LoRA": [0.5, float("nan")]}, {"LoRA": [float("inf")]}])
def test_what_cannot_be_drawn_is_refused(groups):
    with pytest.raises(SegraftError):
        dice_figure(groups)
