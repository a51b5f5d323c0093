"""What a document quotes of a study is what the study found."""

import json
import shutil

import pandas as pd

from segraft.studies.publishing import as_markdown, publish
from segraft.studies.report import write_study_report


def test_published_numbers_are_those_of_the_study(undisturbed, tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    shutil.copytree(undisturbed, out)
    write_study_report(out)
    (results / "figures").mkdir(parents=True)
    (results / "figures" / "old.png").write_bytes(b"")
    publish(out, results, workers=3)
    made, found = (json.loads((folder / "results.json").read_text()) for folder in (out, results))
    assert found["machine"]["workers"] == 3
    assert {name: value for name, value in found.items() if name not in ("machine", "versions")} == made
    assert (results / "scores.csv").read_bytes() == (out / "scores.csv").read_bytes()
    names = {path.name for path in (results / "figures").iterdir()}
    assert names == {path.name for path in (out / "figures").iterdir()}
    text = (results / "tables.md").read_text()
    assert text.startswith("# ")
    assert "## Arms" in text


def test_a_table_as_markdown():
    assert as_markdown(pd.DataFrame({"a": [1], "b": ["x"]})) == "| a | b |\n| --- | --- |\n| 1 | x |"
