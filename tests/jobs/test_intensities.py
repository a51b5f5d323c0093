"""Intensity settings said by the channel."""

import pytest

from segraft.data.preparation import Percentiles, Preparation, Window
from segraft.errors import SegraftError
from segraft.jobs.intensities import by_channel
from segraft.jobs.preparing import checked

WINDOW = {"kind": "window", "low": 0, "high": 3000}
NARROW = {"kind": "percentiles", "lower": 5, "upper": 95}
CHANNELS = ("FLAIR", "T1-Gd", "ADC")
ADC, T1 = Window(low=0, high=3000), Percentiles(lower=5, upper=95)


@pytest.mark.parametrize(
    ("asked", "inherited", "expected"),
    [
        ({"ADC": WINDOW}, None, (Percentiles(), Percentiles(), ADC)),
        ({"2": WINDOW, "t1gd": NARROW}, None, (Percentiles(), T1, ADC)),
        ({"0": WINDOW, "*": NARROW}, None, (ADC, T1, T1)),
        ({"adc": WINDOW}, Preparation(intensity=(T1, ADC, T1)), (T1, ADC, ADC)),
        ({"ADC": WINDOW, "*": NARROW}, Preparation(intensity=ADC), (T1, T1, ADC)),
        (WINDOW, Preparation(intensity=(T1, ADC, T1)), (ADC, ADC, ADC)),
        ([WINDOW, WINDOW, NARROW], None, (ADC, ADC, T1)),
    ],
)
def test_settings_of_three_channels(asked, inherited, expected):
    fields = by_channel({"intensity": asked, "spacing": (1, 1, 1)}, inherited, CHANNELS, "D")
    assert checked(fields).intensities(3) == expected
    assert checked(fields).spacing == (1, 1, 1)


@pytest.mark.parametrize(("name", "channels"), [("CT", ("CT",)), ("0", ("",))])
def test_a_single_channel_is_recorded_as_before(name, channels):
    assert by_channel({"intensity": {name: WINDOW}}, None, channels, "D") == {"intensity": WINDOW}


def test_numbers_are_names_first():
    settled = checked(by_channel({"intensity": {"1": WINDOW}}, None, ("1", "0"), "D"))
    assert settled.intensities(2) == (ADC, Percentiles())


@pytest.mark.parametrize(
    ("names", "channels", "says"),
    [
        (["T2"], CHANNELS, r'D has no channel "T2" .*among 0 \(FLAIR\), 1 \(T1-Gd\), 2 \(ADC\)'),
        (["3"], CHANNELS, 'D has no channel "3"'),
        (["-"], ("",), 'D has no channel "-" .*choose among 0\\.'),
        (["ADC", "2"], CHANNELS, "ADC and 2 are one channel of D"),
    ],
)
def test_names_that_are_wrong(names, channels, says):
    with pytest.raises(SegraftError, match=says):
        by_channel({"intensity": dict.fromkeys(names, WINDOW)}, None, channels, "D")


def test_what_says_nothing_by_channel_is_left():
    for given in (None, {}, {"spacing": (1, 1, 1)}, Preparation()):
        assert by_channel(given, None, CHANNELS, "D") is given
