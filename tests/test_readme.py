"""The README's code runs as it stands, and its tables name what there is."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import segraft
from segraft.adapters import PRESETS
from segraft.cli import app
from segraft.training.strategies import STRATEGIES

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102  our own README
    assert type(names["net"]) is segraft.networks.UNet
    assert (tmp_path / "task.safetensors").is_file()


@pytest.mark.data
def test_tour(real_data, tmp_path, monkeypatch):
    """Every command of the tour, with one epoch and few cases."""
    monkeypatch.chdir(tmp_path)
    (tour,) = (block for block in blocks("") if "segraft evaluate" in block)
    shorter = {r"--epochs \d+": "--epochs 1", "--cases 60": "--cases 4", "--cases 40": "--cases 2"}
    text = tour.replace("\\\n", " ").replace("D/", f"{real_data / 'hippocampus'}/")
    for pattern, instead in shorter.items():
        text, found = re.subn(pattern, instead, text)
        assert found
    commands = [shlex.split(line)[1:] for line in text.splitlines()]
    assert [command[0] for command in commands] == ["pretrain", "adapt", "evaluate", "predict", "inspect"]
    for command in commands:
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
    assert (tmp_path / "mask.nii.gz").is_file()
    assert (tmp_path / "run" / "evaluation.csv").is_file()


def test_tables():
    for method in PRESETS:
        if method != "none":
            assert f"| `{method}` |" in README
    named = re.search(r"--train ([a-z_|]+)`", README)
    assert named
    assert set(named[1].split("|")) == set(STRATEGIES) - {"none"}
