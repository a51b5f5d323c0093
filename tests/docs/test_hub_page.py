"""The commands of docs/hub.md run as they stand, against a stand-in of the Hub."""

import re
import runpy
import shlex
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from segraft.cli import app

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "hub.md"
commands = runpy.run_path(str(TESTS / "docs" / "pages.py"))["commands"]
CLIENT = runpy.run_path(str(TESTS / "exchange" / "hub_client.py"))
COHORT = runpy.run_path(str(TESTS / "cli" / "conftest.py"))
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # in the client itself


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, (words, result.output)
    return result.output


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder with what the page speaks of, and the stand-in."""
    monkeypatch.chdir(tmp_path)
    COHORT["write_cohort"](tmp_path / "D", [f"p{number}" for number in range(8)])
    (tmp_path / "D" / "imagesTr" / "p7.nii.gz").rename(tmp_path / "scan.nii.gz")
    COHORT["write_listing"](tmp_path / "D", [f"p{number}" for number in range(7)])
    tiny = ["--network-args", '{"widths": [4, 8]}', "--epochs", "1", "--cases", "2"]
    run("pretrain", "--data", "D", "--labels", "1", *tiny, "--out", "base")
    run("adapt", "--base", "base", "--data", "D", "--labels", "2", "--shots", "2", "--epochs", "1", "--out", "run")
    with CLIENT["pointed_at_standin"](monkeypatch, tmp_path / "home") as server:
        yield server.hub


def test_commands(hub, tmp_path):
    shown, *others = (shlex.split(command)[1:] for command in commands(PAGE))
    assert "# hippocampus" in run(*shown)
    assert not hub.repos
    for words in others:
        run(*words)
    assert {"adapter.safetensors", "base.safetensors", "README.md"} <= set(hub.files("ward/hippocampus"))
    assert hub.repos["ward/hippocampus"].private
    assert "base.safetensors" not in hub.files("ward/posterior")
    run("predict", "run", "scan.nii.gz", "-o", "again.nii.gz")
    ours, theirs = (np.asanyarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("again", "mask"))
    np.testing.assert_array_equal(ours, theirs)
    run("pull", "ward/posterior", "-o", "posterior")
    run("predict", "posterior", "scan.nii.gz", "-o", "posterior.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(nib.load("posterior.nii.gz").dataobj), ours)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, PAGE.name, "exec"), {})  # noqa: S102  our own page
    assert (tmp_path / "elsewhere" / "adapter.safetensors").is_file()


def test_what_the_page_says_of_files_is_so():
    from segraft.exchange.model_card import MARK
    from segraft.jobs.pushing import SMALL

    text = PAGE.read_text(encoding="utf-8")
    assert f"{SMALL // 10**6} MB" in text
    assert MARK.replace("`", "").startswith("<!-- segraft push writes")
