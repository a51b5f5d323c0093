"""Adapters on networks of nnU-Net's: trained, kept, used, and given back to nnU-Net merged."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from segraft import adapters
from segraft.adapters import AdapterSpec
from segraft.errors import SegraftError
from segraft.exchange.opening import open_base
from segraft.jobs import adapt, export
from segraft.jobs.bases import build_from_start
from segraft.jobs.model import load_model
from segraft.training.settings import TrainingSettings

SHORT = TrainingSettings(epochs=2, volumes=1, patches=1, learning_rate=1e-2)

TASKS = [
    ("Brains 3d_fullres", (), {}),  # its own regions
    ("Brains 2d", ("2", "1"), {"mirror": False}),  # its regions the other way round
    ("Brains 3d_fullres", ("haematoma=2+1",), {"train": ("head",)}),
    pytest.param("Hippocampus 3d_fullres", ("2",), {}, marks=pytest.mark.data),
    pytest.param("Hippocampus 2d", ("Posterior", "Anterior"), {}, marks=pytest.mark.data),
]


@pytest.mark.parametrize("made", ["Brains 2d"], indirect=True)
def test_what_nnunet_prepares_becomes_no_bundle_of_monai(made, tmp_path):
    adapted = adapt(made.base, made.data, tmp_path / "run", spec=AdapterSpec("lora_c", rank=2), settings=SHORT)
    with pytest.raises(SegraftError, match="its scans are prepared by another tool, for which MONAI has no transforms"):
        export(adapted.path, tmp_path / "out", format="monai-bundle")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("made", "labels", "how"), TASKS, indirect=["made"])
def test_nnunet_gives_the_masks_of_the_adapter_that_was_merged_for_it(made, labels, how, by_nnunet, tmp_path):
    spec = AdapterSpec("dora_c", rank=4, train=how.get("train", ()))
    settings = SHORT.model_copy(update={"flip": how.get("mirror", True)})
    adapted = adapt(made.base, made.data, tmp_path / "run", spec=spec, labels=labels, settings=settings)
    written = export(adapted.path, tmp_path / "out", format="nnunet")
    model = load_model(adapted.path)
    values = {
        name: json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"][name]
        for name in model.labels.values()
    }
    (files, *_) = made.scans()
    found, theirs = model.segment(model.case("scan", files)), by_nnunet(written.path, files)
    if model.labels.regions:
        np.testing.assert_array_equal(theirs, found.mask)
    else:
        for value, name in model.labels.items():
            np.testing.assert_array_equal(theirs == values[name], found.mask == value)
    base = load_model(made.base).segment(model.case("scan", files))
    assert (base.mask != found.mask).any()
    assert bool(model.preparation.mirror_axes) == how.get("mirror", True)


@pytest.mark.parametrize("made", ["Abdomens 3d_fullres", "Brains 2d"], indirect=True)
def test_every_layer_is_adapted_once_though_registered_several_times(made):
    opened = open_base(made.base)
    net = build_from_start(opened.network, {**opened.arguments, "out_channels": 2})
    named = [name for name, _ in net.named_modules(remove_duplicate=False)]
    layers = {id(module) for module in net.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)}
    assert len(named) > len(list(net.named_modules())) + len(layers)
    size = tuple(side for side in opened.preparation.patch if side > 1)
    image = torch.randn(1, opened.arguments["in_channels"], *size)
    adapters.graft(net, AdapterSpec("dora_c", rank=2), seed=0)
    net(image).square().mean().backward()
    adapters.require_gradients(net)
    trained = [value for value in net.parameters() if value.requires_grad]
    assert len(trained) >= 3 * len(layers)  # two factors and a magnitude
    with torch.no_grad():
        for value in trained:
            value.add_(torch.randn_like(value), alpha=0.05)
    expected = net(image)
    adapters.merge(net, reversible=False)
    torch.testing.assert_close(net(image), expected)
    tensors = net.state_dict()
    for key in tensors:
        if key.startswith("encoder."):
            assert torch.equal(tensors[key], tensors[f"decoder.{key}"])


@pytest.mark.parametrize("made", ["Brains 3d_fullres"], indirect=True)
def test_regions_of_single_values_stay_regions_in_nnunet(made, tmp_path, by_nnunet):
    spec, settings = AdapterSpec("lora_c", rank=2, train=("head",)), SHORT
    adapted = adapt(made.base, made.data, tmp_path / "run", spec=spec, labels=("core", "rim=1"), settings=settings)
    export(adapted.path, tmp_path / "out", format="nnunet")
    labels = json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "core": [2, 2], "rim": [1, 1]}
    (files, *_) = made.scans()
    model = load_model(adapted.path)
    mask = model.segment(model.case("scan", files)).mask
    np.testing.assert_array_equal(mask, by_nnunet(tmp_path / "out", files))


@pytest.mark.parametrize("made", ["Brains 3d_fullres"], indirect=True)
def test_an_exported_model_has_the_heads_of_deep_supervision(made, tmp_path):
    adapted = adapt(
        made.base, made.data, tmp_path / "run", spec=AdapterSpec("lora_c", rank=2, train=("head",)),
        labels=("core", "rim=1"), settings=SHORT,
    )  # fmt: skip
    export(adapted.path, tmp_path / "out", format="nnunet")
    ours, theirs = (
        torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        for folder in (tmp_path / "out", made.folder)
    )
    assert ours.keys() == theirs.keys()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    (core, rim) = ours["decoder.seg_layers.0.weight"]
    assert torch.equal(core, theirs["decoder.seg_layers.0.weight"][1])
    assert not rim.any()
