"""The HTML report: complete in itself, escaped, aligned."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from segraft.errors import SegraftError
from segraft.evaluation.figures import DPI, dice_figure
from segraft.evaluation.report import write_report
from segraft.evaluation.results import CaseResult, readable, summary, table

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects elements with their attributes and text; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def texts(self, tag):
        return [element["text"].strip(" \n") for element in self.all(tag)]


@pytest.fixture
def report(tmp_path):
    def write(**content):
        defaults = {"title": "T", "lead": "L", "notes": [], "tables": [], "figures": [], "details": {}}
        path = write_report(tmp_path / "out" / "report.html", **(defaults | content))
        assert path == tmp_path / "out" / "report.html"
        text = path.read_text("utf-8")
        return text, Page(text)

    return write


def test_everything_is_escaped(report):
    rows = [CaseResult(EVIL, 1, EVIL, 0.5, 1.0, 2.0, 3.0)]
    text, page = report(
        title=EVIL,
        lead=EVIL,
        notes=[EVIL],
        tables=[(EVIL, readable(table(rows))), ("t", pd.DataFrame({EVIL: [EVIL]}))],
        figures=[(EVIL, dice_figure({"a": [0.5]}))],
        details={EVIL: {EVIL: [EVIL]}},
    )
    assert "<script" not in text
    assert page.texts("title") == page.texts("h1") == [EVIL]
    assert page.texts("caption")[0] == EVIL
    assert page.all("img")[0]["alt"] == EVIL
    assert EVIL in page.texts("th")
    assert page.texts("dt") == [EVIL]


def test_nothing_is_loaded_from_elsewhere(report):
    text, page = report(figures=[("f", dice_figure({"a": [0.5]}))], tables=[("t", summary(RESULTS))])
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert {element["tag"] for element in page.elements}.isdisjoint({"link", "script", "iframe", "object"})
    assert any("default-src 'none'" in element.get("content", "") for element in page.all("meta"))


RESULTS = [
    CaseResult(case, label, name, dice, distance, 10.0, 12.0)
    for case, label, name, dice, distance in [
        ("a", 1, "anterior", 0.5, 4.5),
        ("a", 2, "posterior", 0.25, 120.0),
        ("b", 1, "anterior", 0.7, 0.0),
    ]
]


def test_the_pictures_are_inside_at_the_size_they_were_drawn_for(report):
    pictures = [dice_figure({"a": [0.5, 0.6]}), dice_figure({f"m{i}": [0.1 * i] for i in range(6)})]
    _, page = report(figures=[("first", pictures[0]), ("second", pictures[1])])
    images = page.all("img")
    heads = [image["src"].partition(",")[0] for image in images]
    assert heads == ["data:image/png;base64"] * 2
    assert [base64.b64decode(image["src"].partition(",")[2]) for image in images] == pictures
    assert page.texts("figcaption") == ["first", "second"]
    pixels = int.from_bytes(pictures[0][16:20], "big")
    assert int(images[0]["width"]) == pytest.approx(pixels * 96 / DPI, abs=1)


def test_a_png_that_does_not_say_its_resolution_is_shown_pixel_by_pixel(report):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (30, 20)).save(buffer, format="png")
    _, page = report(figures=[("f", buffer.getvalue())])
    assert (page.all("img")[0]["width"], page.all("img")[0]["height"]) == ("30", "20")


def test_only_pngs_are_figures(report):
    with pytest.raises(TypeError, match="not a PNG"):
        report(figures=[("f", b"<svg/>")])


def test_numbers_are_aligned_and_text_is_not(report):
    _, page = report(tables=[("Dice by structure", readable(summary(RESULTS)))])
    heads = {element["text"]: element.get("class") for element in page.all("th") if element.get("scope") == "col"}
    assert heads == {"Label": None, "n": "number", "Dice, mean (SD)": "number", "HD95 (mm), mean (SD)": "number"}
    assert [element["text"] for element in page.all("th") if element.get("scope") == "row"] == [
        "anterior",
        "posterior",
        "all",
    ]
    assert [element.get("class") for element in page.all("tr")] == [None, None, None, "total"]
    distances = [element["text"] for element in page.all("td")][2::3]
    assert distances == ["2.25 (3.2)\u2007", "120.00 (–)\u2008\u2007\u2007", "41.50 (68.0)"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5, 1.0, np.nan], ["0.500", "1.000", "–"]),
        ([0.0, 33.333], ["0.00", "33.33"]),
        ([2.0, 12345.678], ["2.0", "12\u202f345.7"]),
        ([1, 2], ["1", "2"]),
        ([np.float32(0.25)], ["0.250"]),
        ([True, False], ["yes", "no"]),
        (["x", None], ["x", "–"]),
        ([None, None], ["–", "–"]),
        ([np.inf, 0.5], ["inf", "0.500"]),
    ],
)
def test_one_column_has_one_format(report, values, shown):
    _, page = report(tables=[("t", pd.DataFrame({"name": ["a"] * len(values), "v": pd.Series(values)}))])
    assert page.texts("td") == shown


@pytest.mark.parametrize(
    ("text", "is_number"),
    [
        ("0.572 (0.17)", True),
        ("0.500 (–)", True),
        ("312 kB", True),
        ("-1.5e-05", True),
        ("12\u202f345.7", True),
        ("85%", True),
        ("–", True),
        ("017-left", False),
        ("2024-05-01", False),
        ("(0, 25]", False),
        ("4 of 5 cases", False),
    ],
)
def test_what_counts_as_a_number(report, text, is_number):
    _, page = report(tables=[("t", pd.DataFrame({"name": ["a"], "v": [text]}))])
    assert page.all("td")[0].get("class") == ("number" if is_number else None)


def test_a_named_index_is_a_column_and_a_counter_is_not(report):
    frame = pd.DataFrame({"v": [1]})
    _, page = report(tables=[("t", frame), ("u", frame.rename_axis("who"))])
    assert [element["text"] for element in page.all("th") if element.get("scope") == "col"] == ["v", "who", "v"]


def test_details_are_a_definition_list(report):
    details = {
        "Adapter": {"preset": "dora_c", "rank": 64},
        "Learning rate": np.float64(1e-3),
        "Seeds": [1, 2],
        "Amp": True,
        "Data": Path("a/b.json"),
        "Commit": None,
        "Nothing": [],
        "Loss": float("nan"),
    }
    _, page = report(details=details)
    assert page.texts("dt") == list(details)
    assert page.texts("dd") == ["preset: dora_c; rank: 64", "0.001", "1, 2", "yes", "a/b.json", "–", "–", "–"]


def test_empty_sections_have_no_heading(report):
    _, page = report()
    assert page.texts("h2") == []
    _, page = report(details={"a": 1})
    assert page.texts("h2") == ["Details"]


def test_one_note_is_a_paragraph_and_more_are_a_list(report):
    assert report(notes=["only"])[1].texts("li") == []
    assert report(notes=["one", "two"])[1].texts("li") == ["one", "two"]


def test_it_adapts_to_screens_darkness_and_paper(report):
    text, page = report()
    assert page.all("html")[0]["lang"] == "en"
    assert {"viewport", "color-scheme"} <= {element.get("name") for element in page.all("meta")}
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_a_folder_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(SegraftError, match=r"report\.html"):
        write_report(tmp_path / "report.html", title="", lead="", notes=[], tables=[], figures=[], details={})
