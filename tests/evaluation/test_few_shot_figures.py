"""The few-shot figures: points stand where the numbers are, and no name covers anything."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from segraft.errors import SegraftError
from segraft.evaluation import few_shot_figures as module
from segraft.evaluation.few_shot_figures import STYLES, Point, parameters_figure, rank_figure

RANKS = {
    5: {
        "LoRA": {8: [0.60, 0.62, 0.64], 32: [0.61, 0.60, 0.62], 64: [0.58, 0.57, 0.59]},
        "ARENA": {8: [0.7], 64: [0.72]},
    },
    10: {"LoRA": {8: [0.65, 0.66, 0.67]}, "ARENA": {8: [0.75, 0.76, 0.80], 32: []}},
}


@pytest.fixture
def drawn(monkeypatch):
    """The figure as matplotlib holds it, of the call that a test makes."""
    kept: list[Figure] = []
    save = module.png
    monkeypatch.setattr(module, "png", lambda figure: (kept.append(figure), save(figure))[1])
    return kept


def bars(axes):
    """(x, mean, SD) of every point, by drawn line."""
    found = []
    for each in axes.containers:
        assert isinstance(each, ErrorbarContainer)
        line, _, (bar,) = each.lines
        reach = [np.ptp(segment[:, 1]) / 2 for segment in bar.get_segments()]
        found.append([tuple(map(float, point)) for point in zip(*line.get_data(), reach, strict=True)])
    return found


def test_points_and_bars_by_rank_are_mean_and_sd_over_seeds(drawn):
    assert rank_figure(RANKS).startswith(b"\x89PNG")
    five, ten = drawn[0].axes
    assert (five.get_title(loc="left"), ten.get_title(loc="left")) == ("5 shots", "10 shots")
    for axes, panel in ((five, RANKS[5]), (ten, RANKS[10])):
        for points, ranks in zip(bars(axes), panel.values(), strict=True):
            some = {rank: dice for rank, dice in ranks.items() if dice}
            assert [y for _, y, _ in points] == pytest.approx([np.mean(dice) for dice in some.values()])
            sd = [np.std(dice, ddof=1) if len(dice) > 1 else 0 for dice in some.values()]
            assert [reach for _, _, reach in points] == pytest.approx(sd)
            assert [x for x, _, _ in points] == pytest.approx(list(some), rel=0.1), "a little apart"
    first, second = bars(five)
    assert first[0][0] != second[0][0], "so that bars do not cover each other"
    assert [text.get_text() for text in five.get_xticklabels()] == ["8", "32", "64"]
    assert five.get_ylim() == ten.get_ylim()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["LoRA", "ARENA"]


def test_methods_are_told_apart_without_colours():
    assert len({marker for marker, _, _ in STYLES}) == len({str(line) for _, line, _ in STYLES}) == len(STYLES)
    grey = sorted(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in (to_rgb(colour) for _, _, colour in STYLES[:2]))
    assert grey[1] - grey[0] > 0.05


def points(count, *, level=0.6, step=1.35):
    """Arms as close together as those of a study: their parameters grow slowly, their Dice hardly."""
    kinds = ("parts alone", "adapter", "adapter + decoder")
    return [
        Point(
            f"method_{n} 8 + decoder",
            int(5e4 * step**n),
            [level + 0.004 * (n % 5) + d for d in (0, 0.01, -0.004)],
            kinds[n % 3],
        )
        for n in range(count)
    ]


def test_points_against_parameters_are_where_the_numbers_are(drawn):
    arms = points(5)
    assert parameters_figure({5: [*arms, Point("zero-shot", 0, [0.55])]}).startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    for (point,), arm in zip(bars(axes), arms, strict=True):
        assert point == pytest.approx((arm.trained, np.mean(arm.dice), np.std(arm.dice, ddof=1)))
    across = [line for line in axes.get_lines() if len(set(line.get_ydata())) == 1 and line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in across] == [0.55]
    assert {text.get_text() for text in axes.texts} == {arm.name for arm in arms} | {"zero-shot"}


@pytest.mark.parametrize(
    "panels",
    [
        {5: points(3)},
        {5: points(24), 10: points(24, level=0.7)},
        {5: points(24, step=1.0001)},  # all above one another
        {1: [*points(12, step=1.0), Point("zero-shot", 0, [0.6]), Point("of another base", 0, [0.601])]},
    ],
    ids=["few", "as many as the study has", "in one column", "on one point"],
)
def test_no_name_covers_another_or_a_point(drawn, panels):
    parameters_figure(panels)
    for axes, arms in zip(drawn[0].axes, panels.values(), strict=True):
        renderer = drawn[0].canvas.get_renderer()
        assert sorted(text.get_text() for text in axes.texts) == sorted(arm.name for arm in arms)
        boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
        for (one, box), (other, second) in combinations(boxes.items(), 2):
            assert not box.overlaps(second), (one, other)
        places = axes.transData.transform([(arm.trained, np.mean(arm.dice)) for arm in arms if arm.trained])
        for name, box in boxes.items():
            assert not any(box.contains(*place) for place in places), name
            assert axes.bbox.containsx(box.x0), name
            assert axes.bbox.containsx(box.x1), name
            assert axes.bbox.containsy(box.y0), name
            assert axes.bbox.containsy(box.y1), name


def test_what_trains_nothing_alone_is_drawn_too(drawn):
    parameters_figure({5: [Point("zero-shot", 0, [0.55])]})
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["zero-shot"]


@pytest.mark.parametrize("scores", [[np.nan], [0.5, np.inf]], ids=str)
def test_a_score_that_is_no_number_is_refused(scores):
    with pytest.raises(SegraftError, match="not a finite number"):
        rank_figure({5: {"LoRA": {8: scores}}})
    with pytest.raises(SegraftError, match="not a finite number"):
        parameters_figure({5: [Point("LoRA", 10, scores)]})


def test_without_scores_there_is_nothing_to_draw():
    with pytest.raises(SegraftError, match="no scores"):
        rank_figure({5: {"LoRA": {8: []}}, 10: {}})
    with pytest.raises(SegraftError, match="no scores"):
        parameters_figure({5: []})
