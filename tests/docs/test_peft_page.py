"""The commands and the code of docs/peft.md run as they stand."""

import runpy
import shlex
from pathlib import Path

import torch
from typer.testing import CliRunner

from segraft.cli import app
from segraft.jobs import load_model

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "peft.md"
commands = runpy.run_path(str(HERE / "pages.py"))["commands"]
tiny = runpy.run_path(str(HERE / "tiny_adapter.py"))


def segraft(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "segraft"
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, (command, result.output)


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny["tiny_adapter"](tmp_path)
    export, *back = commands(PAGE)
    leaving, training = tiny["python_blocks"](PAGE)
    image = torch.rand(1, 1, 16, 16, 8)

    segraft(export)
    names: dict[str, object] = {}
    exec(compile(leaving, "peft.md", "exec"), names)  # noqa: S102  our own page
    with torch.no_grad():
        torch.testing.assert_close(names["net"](image), load_model("run").net(image), rtol=0, atol=1e-5)

    exec(compile(training, "peft.md", "exec"), names)  # noqa: S102
    for command in back:
        segraft(command)
    with torch.no_grad():
        expected = names["net"].eval()(image)
        torch.testing.assert_close(load_model("imported").net(image), expected, rtol=0, atol=1e-5)
        assert not torch.equal(load_model("base").net(image), expected)
    assert Path("mask.nii.gz").is_file()


def test_merging_in_peft_is_as_the_page_says(tmp_path, monkeypatch):
    """PEFT fails to merge a Conv3d of one voxel; a page that still said so after PEFT learned it would be wrong."""
    import peft
    import pytest

    from segraft.networks import load_base

    tiny["tiny_adapter"](tmp_path)
    for name, fails in (("encoder.0.0", False), ("head", True)):
        net = peft.get_peft_model(load_base(tmp_path / "base")[0], peft.LoraConfig(r=2, target_modules=[name]))
        if fails:
            with pytest.raises(RuntimeError):
                net.merge_and_unload()
        else:
            net.merge_and_unload()
