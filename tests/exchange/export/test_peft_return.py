"""What left for PEFT comes back: on which base, believed how far, and written where."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segraft import adapters
from segraft.adapters import AdapterSpec, read_header
from segraft.data.labels import Labels
from segraft.errors import SegraftError
from segraft.jobs import export, import_peft, load_model
from segraft.jobs.bases import load_base_of
from segraft.jobs.task import task_record
from segraft.networks import load_base, read_base
from segraft.networks.heads import Outputs

HERE = Path(__file__).parent


def with_other_outputs(made, rows, names, spec=None, *, weights=None):
    """The adapter file of `made`, written anew for a task that takes these outputs of the base, or of plain weights."""
    info = read_base(made.base)
    described = {"network": info.network, "arguments": info.arguments, "path": "../base/base.safetensors"}
    if weights is not None:
        described["path"] = str(weights)
        described["arguments"] = info.arguments | {"out_channels": len(rows)}
    described |= Outputs(rows).record()
    task = task_record(Labels(dict(enumerate(names, start=1))), made.preparation)
    header = read_header(made.path)
    header.record["base"] = described
    net, _ = load_base_of(header, None)
    adapters.graft(net, spec or AdapterSpec("dora", rank=2, train="head"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in adapters.adapter_tensors(net, "default").values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    adapters.save(net, made.path, record=task | {"base": described})
    return made


def as_readme_says(folder, image):
    """Logits of the network that the README's code makes, run in the folder."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    torch.save(image, folder / "image.pt")
    code += "\nimport torch\nwith torch.no_grad():\n    torch.save(net(torch.load('image.pt')), 'logits.pt')\n"
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt")


@pytest.mark.parametrize(
    ("rows", "names"),
    [((1, 0), ("rim", "core")), ((1, None, None), ("rim", "halo", "fat")), ((1,), ("rim",))],
    ids=["turned", "more", "one"],
)
def test_exchanged_outputs(make, tmp_path, rows, names):
    """On the base that was adapted, and on the one that was written beside the adapter: the same, bit for bit."""
    made = with_other_outputs(make("unet"), rows, names)
    expected = made.logits()
    export(made.path, tmp_path / "out", format="peft")
    torch.testing.assert_close(as_readme_says(tmp_path / "out", made.image), expected, rtol=0, atol=1e-5)
    beside = tmp_path / "out" / "base_model.safetensors"
    assert read_base(beside).fingerprint == read_header(made.path).fingerprint
    for place, base in enumerate((made.base, made.base.parent, beside)):
        back = import_peft(tmp_path / "out", tmp_path / f"back{place}", base=base)
        model = load_model(back.path)
        assert tuple(model.labels.values()) == names
        assert model.preparation == made.preparation
        with torch.no_grad():
            torch.testing.assert_close(model.net(made.image), expected, rtol=0, atol=1e-5)
        assert read_header(back.path).fingerprint == read_header(made.path).fingerprint
        again = export(back.path, tmp_path / f"again{place}", format="peft").path
        torch.testing.assert_close(as_readme_says(again, made.image), expected, rtol=0, atol=1e-5)


def test_weights_that_are_no_base_file(make, tmp_path):
    """An adapter on weights from elsewhere: the record says which network they are of."""
    made = make("unet")
    weights = tmp_path / "theirs.safetensors"
    save_file(made.plain().state_dict(), weights)
    with_other_outputs(made, (1, None), ("rim", "halo"), weights=weights)
    export(made.path, tmp_path / "out", format="peft")
    back = import_peft(tmp_path / "out", tmp_path / "back", base=weights)
    with torch.no_grad():
        torch.testing.assert_close(load_model(back.path).net(made.image), made.logits(), rtol=0, atol=1e-5)


def test_the_base_beside_is_one_like_others(make, tmp_path):
    made = with_other_outputs(make("unet"), (None, 0), ("halo", "core"))
    export(made.path, tmp_path / "out", format="peft")
    net, info = load_base(tmp_path / "out" / "base_model.safetensors")
    assert info.record["labels"] == {"1": "halo", "2": "core"}
    assert info.record["untrained"] == {"outputs": [0], "parts": []}
    header = read_header(made.path)
    assert adapters.fingerprint(net) == header.fingerprint


class Loose(torch.nn.Module):
    """Names few of its arguments."""

    parts = {"head": ("last",)}  # noqa: RUF012
    size_multiple = 1

    def __init__(self, in_channels: int, out_channels: int, **further: float) -> None:
        super().__init__()
        self.slope = further.get("slope", 0.01)
        self.first = torch.nn.Conv2d(in_channels, int(further.get("width", 4)), 3, padding=1)
        self.last = torch.nn.Conv2d(self.first.out_channels, out_channels, 1)

    def forward(self, image):
        return self.last(torch.nn.functional.leaky_relu(self.first(image), self.slope))


@pytest.mark.parametrize("network", ["test_peft_return:Loose", "unet", "monai.networks.nets:BasicUNet"])
def test_the_readme_gives_all_arguments(make, tmp_path, network, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("SEGRAFT_TRUST", "test_peft_return")
    arguments = {
        "test_peft_return:Loose": {"width": 6, "slope": 0.7},
        "unet": {"norm": "instance"},
        "monai.networks.nets:BasicUNet": {"spatial_dims": 2, "features": [4] * 6, "dropout": 0.1},
    }[network]
    made = make(network, AdapterSpec("lora", rank=2), patch=(32, 32, 1), **arguments)
    export(made.path, tmp_path / "out", format="peft")
    torch.testing.assert_close(as_readme_says(tmp_path / "out", made.image), made.logits(), rtol=0, atol=1e-5)


def test_what_has_no_factors_is_not_said_to_be_multiplied_out(make, tmp_path):
    made = make("unet", AdapterSpec("none", train="head"))
    notes = export(made.path, tmp_path / "out", format="peft").notes
    assert not any("multiplied out" in note or "None" in note for note in notes)


def test_the_network_is_built_twice(make, tmp_path, monkeypatch):
    """Merged and not: large ones take time, and memory."""
    from segraft.jobs import exporting

    made, calls = make("unet", AdapterSpec("dora", rank=2)), []

    def counted(*arguments):
        calls.append(arguments)
        return load_base_of(*arguments)

    monkeypatch.setattr(exporting, "load_base_of", counted)
    export(made.path, tmp_path / "out", format="peft")
    assert len(calls) == 2


@pytest.fixture
def left(make, tmp_path):
    """An adapter, and the folder that it left in."""
    made = make("unet", AdapterSpec("lora", rank=2, targets="encoder"))
    export(made.path, tmp_path / "out", format="peft")
    return made, tmp_path / "out"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"base": "x"}, "base is 'x', and should be a valid dictionary:"),
        ({"base": {"fingerprint": 5}}, "base.network is missing"),
        ({"labels": ["a"]}, "labels is"),
        ({"labels": {"x": "a"}}, "labels.x"),
        ({"labels": {"-1": "a", "2": "b"}}, "should be greater than 0"),
        ({"labels": {"1": {"a": 1}}}, "labels.1 is {'a': 1}"),
        ({"labels": {"1": "a", "2": "a"}}, "two labels have one name"),
        ({"labels": {"1": "a"}}, "names 1 labels, and .* has 2 outputs"),
        ({"labels": {}}, "labels is {}"),
        ({"preparation": {"patch": "x"}}, "does not say how its scans were prepared"),
        ({"preparation": [1]}, "preparation is"),
        ({"channels": 5}, "channels is 5"),
        ({"channels": ["a", "b", "c"]}, r"names 3 channels \(a, b, c\), and .* takes 1"),
        ({"regions": {"7": [1]}}, "regions are not of the labels"),
        ({"regions": "junk"}, "regions is 'junk'"),
    ],
)
def test_a_spoilt_record_is_refused(left, tmp_path, values, says):
    made, folder = left
    change(folder / "segraft.json", **values)
    with pytest.raises(SegraftError, match=says) as refused:
        import_peft(folder, tmp_path / "a.safetensors", base=made.base)
    assert "segraft.json" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_spoilt_base_in_the_record_is_refused(left, tmp_path):
    made, folder = left
    base = json.loads((folder / "segraft.json").read_text())["base"]
    spoilt = (
        {"outputs": [99, 1]},
        {"outputs": []},
        {"outputs": ["x"]},
        {"background": 77, "outputs": [0, 1]},
        {"inputs": "x"},
        {"network": "os:system"},
        {"network": "nothing"},
        {"arguments": {"in_channels": "x", "out_channels": 2}},
        {"arguments": {"in_channels": 1, "out_channels": 2, "widths": [8, 16]}},
    )
    for values in spoilt:
        change(folder / "segraft.json", base=base | {"fingerprint": "0" * 64} | values)
        with pytest.raises(SegraftError) as refused:
            import_peft(folder, tmp_path / "a.safetensors", base=made.base)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "a.safetensors").exists()


def test_what_else_stands_in_the_record_is_not_taken_over(left, tmp_path):
    made, folder = left
    change(folder / "segraft.json", patients={"secret": "x"}, cases={"a": "b"}, spec="junk")
    record = read_header(import_peft(folder, tmp_path / "a.safetensors", base=made.base).path).record
    assert not {"patients", "cases", "spec"} & set(record)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alpha_pattern": {".*": "x"}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"alpha_pattern": {"a": math.nan}}, "alpha_pattern"),
        ({"rank_pattern": ["a"]}, "rank_pattern is"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern.a is 0"),
        ({"modules_to_save": 5}, "modules_to_save is 5"),
        ({"modules_to_save": [5]}, "modules_to_save.0 is 5"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ({"lora_dropout": "x"}, "lora_dropout is 'x'"),
        ({"use_dora": "no"}, "use_dora is 'no'"),
        ({"bias": "junk"}, "bias is 'junk'"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"r": None}, "r is missing"),
        ({"r": True}, "r is True"),
    ],
)
def test_a_spoilt_setting_is_refused(left, tmp_path, values, says):
    made, folder = left
    change(folder / "adapter_config.json", **values)
    with pytest.raises(SegraftError, match=says) as refused:
        import_peft(folder, tmp_path / "a.safetensors", base=made.base)
    assert "adapter_config.json" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1j])
def test_values_that_are_no_numbers_are_refused(left, tmp_path, value):
    made, folder = left
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key] = torch.full_like(tensors[key], value, dtype=torch.complex64 if value == 1j else None)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(SegraftError, match="are not all finite numbers"):
        import_peft(folder, tmp_path / "a.safetensors", base=made.base)
    assert not (tmp_path / "a.safetensors").exists()


def test_neither_the_base_nor_what_is_imported_is_written_over(left, tmp_path):
    made, folder = left
    (tmp_path / "link.safetensors").symlink_to(made.base)
    shutil.copy(made.base, tmp_path / "other.safetensors")
    targets = (
        made.base,
        tmp_path / "link.safetensors",
        tmp_path / "other.safetensors",
        folder / "adapter_model.safetensors",
    )
    for out in targets:
        before = out.read_bytes()
        with pytest.raises(SegraftError, match="would be gone: choose another --out"):
            import_peft(folder, out, base=made.base, overwrite=True)
        assert out.read_bytes() == before


def test_regions_of_the_base_are_not_those_of_other_labels(make, tmp_path):
    """A record of plain labels on a base of regions: labels, which exclude each other."""
    made = make("unet", AdapterSpec("lora", rank=2), regions={1: (1, 2), 2: (2,)})
    export(made.path, tmp_path / "out", format="peft")
    told = json.loads((tmp_path / "out" / "segraft.json").read_text())
    assert told.pop("regions") == {"1": [1, 2], "2": [2]}
    (tmp_path / "out" / "segraft.json").write_text(json.dumps(told))
    assert not load_model(import_peft(tmp_path / "out", tmp_path / "back", base=made.base).path).labels.regions
