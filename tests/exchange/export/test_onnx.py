"""An exported model computes, in onnxruntime, what Segraft does."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from segraft.adapters import AdapterSpec
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.exchange import onnx_export
from segraft.jobs import export


def run(path, image):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


@pytest.mark.parametrize("network", ["unet", "unet3d", "multi_view_unet", "segresnet", "swin_unetr", "unetr"])
def test_same_logits(make, tmp_path, network):
    made = make(network, AdapterSpec("dora_c", rank=2, bias="low_rank"))
    result = export(made.path, tmp_path / "out", format="onnx")
    assert [path.name for path in result.files] == ["model.json", "model.onnx"]
    expected = made.logits()
    torch.testing.assert_close(run(tmp_path / "out" / "model.onnx", made.image), expected, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert (made.plain()(made.image) - expected).abs().max() > 0.01
    fixed = network in ("swin_unetr", "unetr")
    assert bool(result.notes) == fixed
    sizes = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")).get_inputs()[0].shape
    assert sizes[0] == "batch"
    assert sizes[2:] == (list(made.image.shape[2:]) if fixed else ["x", "y", "z"][: made.image.ndim - 2])


def test_any_number_of_images_of_any_size(make, tmp_path):
    made = make("unet")
    export(made.path, tmp_path / "out", format="onnx")
    net = made.adapted()
    for shape in ((1, 1, 16, 16), (3, 1, 32, 16), (1, 1, 18, 44)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = net(image)
        torch.testing.assert_close(run(tmp_path / "out" / "model.onnx", image), expected, rtol=0, atol=1e-4)


class Placed(torch.nn.Module):
    """Of convolutions alone, but for one size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.places = torch.nn.Parameter(torch.randn(1, 1, 16, 16))

    def forward(self, image):
        return self.layer(image) + self.places


def test_a_network_that_takes_one_size_alone(make, tmp_path):
    made = make(f"{__name__}:Placed", AdapterSpec("lora", rank=2), patch=(16, 16, 1))
    (note,) = export(made.path, tmp_path / "out", format="onnx").notes
    assert note.startswith("the model takes images of 16 × 16 voxels alone, its patch (")
    assert "\n" not in note
    assert "export another format" not in note
    model = tmp_path / "out" / "model.onnx"
    torch.testing.assert_close(run(model, made.image), made.logits(), rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["input"]["sizes"] == [16, 16]


def test_it_says_what_it_segments(make, tmp_path):
    made = make("unet", channels=2, labels=("core", "rim", "halo"))
    export(made.path, tmp_path / "out", format="onnx")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props}
    beside = json.loads((tmp_path / "out" / "model.json").read_text())
    assert json.loads(told["labels"]) == beside["labels"] == {"1": "core", "2": "rim", "3": "halo"}
    assert json.loads(told["channels"]) == beside["channels"] == ["C0", "C1"]
    assert Preparation(**json.loads(told["preparation"])) == made.preparation
    assert told["base_fingerprint"] == beside["base_fingerprint"]
    assert len(told["base_fingerprint"]) == 64
    assert onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx")).get_inputs()[0].shape[1] == 2


class Branching(torch.nn.Module):
    """Which way it goes depends on a value, which no graph can say."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, image):
        return self.layer(image) if image.mean() > 0.5 else -self.layer(image)


class Counting(Branching):
    """Its output depends on a value that torch takes for a constant, which is what it was at the export."""

    def forward(self, image):
        return self.layer(image) * len(str(image.sum().item()))


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Branching, "torch cannot export Branching to ONNX"), (Counting, "computes otherwise than the network")],
)
def test_what_cannot_be_exported_is_refused(make, tmp_path, network, reason):
    made = make(f"{__name__}:{network.__name__}", AdapterSpec("lora", rank=2))
    with pytest.raises(SegraftError, match=reason) as refused:
        export(made.path, tmp_path / "out", format="onnx")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert not (tmp_path / "out").exists()


def test_a_model_that_computes_otherwise_is_not_written(make, tmp_path, monkeypatch):
    made = make("unet")
    write = onnx_export._write

    def spoiled(net, *arguments, **options):
        before = net.head.bias.detach().clone()
        net.head.bias.data += 1e-2
        write(net, *arguments, **options)
        net.head.bias.data = before

    monkeypatch.setattr(onnx_export, "_write", spoiled)
    with pytest.raises(SegraftError, match="computes otherwise than the network on images of 16 × 16 voxels"):
        export(made.path, tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_an_adapter_per_channel_is_refused(make, tmp_path):
    made = make("unet_channelwise", AdapterSpec("lora", rank=2, channels=2), channels=2, widths=[4, 8], spatial_dims=3)
    with pytest.raises(SegraftError, match="factors of its own for each of 2 channels"):
        export(made.path, tmp_path / "out", format="onnx")


def test_a_missing_package_is_named(make, tmp_path, monkeypatch):
    made = make("unet")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else sys)
    with pytest.raises(SegraftError, match=r"ONNX needs onnxscript: pip install 'segraft\[onnx\]'"):
        export(made.path, tmp_path / "out", format="onnx")


def test_masks_come_out_as_from_segraft(make, tmp_path):
    """The rule that model.json gives for a voxel's label, on the model's logits."""
    made = make("unet3d")
    export(made.path, tmp_path / "out", format="onnx")
    logits = run(tmp_path / "out" / "model.onnx", made.image[:1])[0].numpy()
    probability = 1 / (1 + np.exp(-logits))
    values = np.array([1, 2])[probability.argmax(0)]
    mask = np.where(probability.max(0) >= 0.5, values, 0)
    from segraft.inference import label_map

    assert np.array_equal(mask, label_map(torch.sigmoid(made.logits()[0]), (1, 2)).numpy())
    assert set(np.unique(mask)) > {0}


@pytest.mark.parametrize("network", ["unet", "swin_unetr"])
def test_nothing_tells_of_the_makers_disk(make, tmp_path, network):
    """Neither paths of sources, which torch's stack traces hold, nor of files."""
    made = make(network)
    export(made.path, tmp_path / "out", format="onnx")
    for file in ("model.onnx", "model.json"):
        written = (tmp_path / "out" / file).read_bytes()
        for said in (str(tmp_path), sys.prefix, str(Path(onnx_export.__file__).parents[2]), ".py", "stack_trace"):
            assert said.encode() not in written, said


def test_regions_are_painted(make, tmp_path):
    made = make("unet3d", regions={2: (1, 2), 1: (1,)}, labels=("core", "whole"))
    export(made.path, tmp_path / "out", format="onnx")
    told = json.loads((tmp_path / "out" / "model.json").read_text())
    assert told["regions"] == {"2": [1, 2], "1": [1]}
    assert list(told["regions"]) == ["2", "1"]  # the order of painting
    assert "painted" in told["output"]["meaning"]
    assert "else 0" not in told["output"]["meaning"]
