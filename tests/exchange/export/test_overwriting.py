"""`--overwrite` replaces an earlier export and nothing else."""

import os
import stat
from pathlib import Path

import pytest

from segraft.adapters import AdapterSpec
from segraft.atomic import replacing_folder
from segraft.errors import SegraftError
from segraft.exchange.formats import FORMATS, require_replaceable
from segraft.jobs import export


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def made(make):
    return make("unet", AdapterSpec("lora", rank=2, targets="encoder"))


@pytest.mark.parametrize("format_", ["peft", "onnx", "monai-bundle"])
def test_an_earlier_export_is_replaced(made, tmp_path, format_):
    out = tmp_path / "out"
    first = export(made.path, out, format=format_)
    written = {path.relative_to(out).as_posix() for path in first.files}
    assert {*FORMATS[format_].marks} <= written <= {*FORMATS[format_].marks, *FORMATS[format_].further}
    again = export(made.path, out, format=format_, overwrite=True)
    assert again.files == first.files
    export(made.path, out, format="peft", overwrite=True)  # also by another format
    assert (out / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("run", "run was not written by segraft export"),
        ("base", "base was not written by segraft export"),
        ("", "was not written by segraft export"),
        ("notes", "notes was not written by segraft export"),
        ("file.txt", "file.txt is a file, and an export is a folder"),
        ("run/adapter.safetensors", "is a file, and an export is a folder"),
        ("link", "link was not written by segraft export"),
        ("more", r"more holds scans/a\.nii beside an export"),
        ("holder", r"holder holds its base .*base_model\.safetensors, which would be gone"),
        ("holds", r"holds/?.* beside an export"),
    ],
)
def test_what_is_no_export_stays(made, tmp_path, out, says):
    for name in ("notes/thesis.txt", "file.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    export(made.path, tmp_path / "more", format="onnx")
    (tmp_path / "more" / "scans").mkdir()
    (tmp_path / "more" / "scans" / "a.nii").touch()
    export(made.path, tmp_path / "holder", format="peft")
    (tmp_path / "holder" / "base_model.safetensors").write_bytes(made.base.read_bytes())
    export(made.path, tmp_path / "holds", format="peft")
    (tmp_path / "holds" / "adapter.safetensors").write_bytes(made.path.read_bytes())
    base = tmp_path / "holder" / "base_model.safetensors" if out == "holder" else made.base
    before = contents(tmp_path)
    with pytest.raises(SegraftError, match=says) as refused:
        export(made.path, tmp_path / out, format="peft", base=base, overwrite=True)
    assert "\n" not in str(refused.value)
    assert contents(tmp_path) == before


def test_a_model_folder_that_nnunet_trained_is_no_export(tmp_path):
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    require_replaceable(tmp_path)
    (tmp_path / "fold_1").mkdir()
    (tmp_path / "fold_1" / "checkpoint_final.pth").touch()
    with pytest.raises(SegraftError, match=r"holds fold_1/checkpoint_final\.pth beside an export"):
        require_replaceable(tmp_path)


@pytest.mark.parametrize("out", [".", "..", "here/.."])
def test_the_folder_one_is_in(made, tmp_path, monkeypatch, out):
    (tmp_path / "x" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x" / "here" if out == ".." else tmp_path / "x")
    if out == ".":
        (tmp_path / "x" / "here").rmdir()
    with pytest.raises(SegraftError, match=r"the folder that the command runs in|was not written by"):
        export(made.path, out, format="peft", overwrite=True)
    assert Path.cwd().is_dir()


def test_nothing_is_left_beside(tmp_path):
    """Neither of a folder nor of a link or a file that stood there."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("real", "link", "file", "new"):
        with replacing_folder(tmp_path / name) as aside:
            (aside / "a").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "new", "real"]
    assert (tmp_path / "link").is_symlink()
    assert all((tmp_path / name / "a").is_file() for name in ("real", "link", "file", "new"))


def test_permissions_are_those_of_any_new_file(made, tmp_path):
    before = os.umask(0o027)
    try:
        files = export(made.path, tmp_path / "out", format="peft").files
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
