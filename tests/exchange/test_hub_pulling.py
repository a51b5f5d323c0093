"""What a repository of others may hold, and what is left of it in the folder that it is pulled into."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import segraft
from segraft.errors import SegraftError
from segraft.jobs import load_model, pull, push
from segraft.networks import save_base

CLIENT = runpy.run_path(str(Path(__file__).with_name("hub_client.py")))
served, hub, run = CLIENT["served"], CLIENT["hub"], CLIENT["run"]  # fixtures
says, ARGUMENTS, TASK = CLIENT["says"], CLIENT["ARGUMENTS"], CLIENT["TASK"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # in the client itself


@pytest.fixture
def other(tmp_path):
    """A base of the same network with other weights."""
    torch.manual_seed(9)
    net = segraft.networks.build("unet", in_channels=1, out_channels=1, arguments={"widths": [4, 8], "spatial_dims": 3})
    return save_base(net, tmp_path / "other", network="unet", arguments=ARGUMENTS, record=TASK).path


def changed(path: Path, change) -> bytes:
    """The bytes of a file whose header was changed."""
    with safe_open(path, framework="pt") as file:
        ((key, text),) = file.metadata().items()
    header = json.loads(text)
    change(header)
    aside = path.with_name("changed.safetensors")
    save_file(load_file(path), aside, metadata={key: json.dumps(header)})
    content = aside.read_bytes()
    aside.unlink()
    return content


def holds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_base_that_is_not_the_adapters(hub, run, other, tmp_path):
    push(run, "ward/rim")
    hub.repos["ward/rim"].commit("main", hub.files("ward/rim") | {"base.safetensors": other.read_bytes()})
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "base.safetensors of ward/rim is not the adapter's base", "fingerprint", "--without-base")
    assert not (tmp_path / "pulled").exists()
    pull("ward/rim", tmp_path / "pulled", with_base=False)


def test_a_base_of_another_repository_that_is_not_the_adapters(hub, run, other, tmp_path):
    push(run.parent / "base", "ward/base")
    push(run, "ward/rim", base="ward/base")
    hub.repos["ward/base"].commit("main", {"base.safetensors": other.read_bytes()})
    with pytest.raises(SegraftError, match=r"base\.safetensors of ward/base is not the adapter's base"):
        pull("ward/rim", tmp_path / "pulled")


def test_a_base_whose_outputs_were_exchanged(hub, run, other, tmp_path):
    """The fingerprint is that of the network with the task's outputs, which the base's header does not show."""
    info = segraft.networks.read_base(run.parent / "base")
    described = {
        "network": "unet",
        "arguments": info.arguments,
        "path": "../base/base.safetensors",
        "outputs": [0, None],
    }
    header = segraft.adapters.read_header(run / "adapter.safetensors")
    net, base = segraft.networks.load_base(info.path)
    outputs = segraft.networks.heads.Outputs.of(described)
    net = segraft.jobs.bases.with_outputs(net, base, outputs)
    segraft.graft(net, header.spec)
    record = header.record | {"base": described, "labels": {"1": "rim", "2": "core"}}
    segraft.save(net, run / "adapter.safetensors", record=record)
    push(run, "ward/rim", with_base=True)
    pull("ward/rim", tmp_path / "pulled")
    load_model(tmp_path / "pulled")
    hub.repos["ward/rim"].commit("main", hub.files("ward/rim") | {"base.safetensors": other.read_bytes()})
    with pytest.raises(SegraftError, match="is not the adapter's base"):
        pull("ward/rim", tmp_path / "again")


def test_a_network_of_others_is_pulled_and_told_but_not_imported(hub, run, tmp_path):
    push(run, "ward/rim")

    def name(header):
        described = header["record"]["base"] if "spec" in header else header
        described |= {"network": "this:Zen", "arguments": {"in_channels": 1, "out_channels": 1}}

    files = {
        "adapter.safetensors": changed(run / "adapter.safetensors", name),
        "base.safetensors": changed(run.parent / "base" / "base.safetensors", name),
    }
    hub.repos["ward/rim"].commit("main", files)
    (note,) = pull("ward/rim", tmp_path / "pulled").notes[-1:]
    assert "'this:Zen'" in note
    assert "--trust this" in note
    with pytest.raises(SegraftError, match="--trust this"):
        load_model(tmp_path / "pulled", base=tmp_path / "pulled")


def test_overwriting_leaves_nothing_of_another_pull(hub, run, tmp_path):
    push(run, "ward/rim")
    pull("ward/rim", tmp_path / "pulled")
    hub.repos["ward/rim"].commit("main", {"adapter.safetensors": hub.files("ward/rim")["adapter.safetensors"]})
    with pytest.raises(SegraftError, match="exists: choose another --out"):
        pull("ward/rim", tmp_path / "pulled")
    notes = pull("ward/rim", tmp_path / "pulled", overwrite=True).notes
    assert holds(tmp_path / "pulled") == ["adapter.safetensors"]
    assert sum("was removed" in note for note in notes) == 2


def test_files_that_are_there_are_not_joined_by_others(hub, run, tmp_path):
    push(run.parent / "base", "ward/base")
    push(run, "ward/rim", with_base=False)
    pull("ward/base", tmp_path / "pulled")
    with pytest.raises(SegraftError, match="exists: choose another --out"):
        pull("ward/rim", tmp_path / "pulled", with_base=False)
    assert "adapter.safetensors" not in holds(tmp_path / "pulled")


def test_a_base_beside_an_adapter(hub, run, other, tmp_path):
    push(run, "ward/rim", with_base=False)
    push(run.parent / "base", "ward/base")
    push(other, "ward/other")
    pull("ward/rim", tmp_path / "pulled")
    before = holds(tmp_path / "pulled")
    for overwrite in (False, True):
        with pytest.raises(SegraftError, match="choose another --out"):
            pull("ward/other", tmp_path / "pulled", overwrite=overwrite)
    assert holds(tmp_path / "pulled") == before
    pull("ward/base", tmp_path / "pulled", overwrite=True)
    load_model(tmp_path / "pulled")


@pytest.mark.parametrize("name", ["adapter.safetensors", "base.safetensors", "README.md"])
def test_nothing_is_written_where_one_file_cannot_be(hub, run, tmp_path, name):
    push(run, "ward/rim")
    (tmp_path / "pulled" / name).mkdir(parents=True)
    with pytest.raises(SegraftError, match="is a folder, where a file"):
        pull("ward/rim", tmp_path / "pulled", overwrite=True)
    assert holds(tmp_path / "pulled") == [name]
