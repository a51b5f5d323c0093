"""Tables in narrow terminals."""

import sys

import pandas as pd
import pytest
from rich.console import Console

import segraft.cli.app  # noqa: F401  the package has an `app` of its own
from segraft.cli.widths import fitted

FRAME = pd.DataFrame(
    {
        "Arm": ["none (foundation)", "bitfit_encoder + decoder (foundation)"],
        "Trained parameters": ["0", "3,388,465"],
        "Training (s), 10 shots": ["–", "146"],
        "5 shots": ["0.034 (–)", "0.814 (0.010)"],
        "10 shots": ["0.034 (–)", "0.843 (0.006)"],
    }
)
COLUMNS = [[name, *FRAME[name]] for name in FRAME]


@pytest.fixture
def shown(monkeypatch, capsys):
    """shown(width): the table as a terminal of that width has it."""

    def show(width):
        app = sys.modules["segraft.cli.app"]
        monkeypatch.setattr(app, "out", Console(width=width, file=sys.stdout))
        app.show_frame(FRAME, "Arms")
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("width", [64, 72, 80, 100, 120])
def test_no_word_is_broken(shown, width):
    text = shown(width)
    words = {word for texts in COLUMNS for cell in texts for word in cell.split()}
    assert words <= set(text.replace("┃", " ").replace("│", " ").split())
    assert max(map(len, text.splitlines())) <= width


def test_arms_and_titles_are_broken_before_numbers(shown):
    text = shown(80)
    assert "0.814 (0.010) │ 0.843 (0.006)" in text
    assert "bitfit_encoder +" in text


def test_where_words_must_be_broken_it_is_in_the_names(shown):
    text = shown(60)
    assert "parameters" in text
    assert "3,388,465" in text
    assert "bitfit_encoder" not in text
    assert max(map(len, text.splitlines())) <= 60


def test_large_numbers_are_written_out(shown, monkeypatch):
    monkeypatch.setitem(globals(), "FRAME", pd.DataFrame({"mL": [6097.02, 999.4, 0.00123, 3e-9, float("nan")]}))
    assert shown(80).split("│")[1::2] == [" 6097    ", " 999     ", " 0.00123 ", " 3e-09   ", " nan     "]


def test_nothing_to_do_and_nothing_to_be_done():
    assert fitted(COLUMNS, 300) is None
    assert fitted(COLUMNS, 30) is None
    assert fitted([["a", "b"]], 5) is None


def test_what_is_left_is_shared():
    columns = [["name", "x"], ["aa bb cc", "1"], ["aa bb cc", "1"]]
    assert fitted(columns, 4 + 5 + 5 + 10) == [4, 5, 5]
    assert fitted(columns, 4 + 5 + 6 + 10) == [4, 6, 5]
