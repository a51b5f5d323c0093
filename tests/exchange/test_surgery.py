"""Bases of other tools for other channels and labels, and what leaves again."""

import json
import shutil

import numpy as np
import pytest
import torch
from tests.exchange.bundles import SEGRESNET, write_bundle

from segraft.adapters import AdapterSpec
from segraft.exchange.opening import open_base
from segraft.jobs import adapt, export
from segraft.jobs.base_source import BaseSource
from segraft.jobs.bases import build_from_start
from segraft.jobs.model import load_model
from segraft.networks import load_checkpoint
from segraft.training.settings import TrainingSettings

STILL = TrainingSettings(epochs=1, volumes=1, patches=1, learning_rate=1e-12, device="cpu")
SPEC = AdapterSpec("lora", rank=1)


def with_channel(data, out, name):
    """The same raw data set of nnU-Net's with one channel more, before the others."""
    shutil.copytree(data, out)
    for first in sorted((out / "imagesTr").glob("*_0000.nii.gz")):
        for place in (1, 0):
            file = first.with_name(first.name.replace("_0000", f"_000{place}"))
            file.rename(file.with_name(first.name.replace("_0000", f"_000{place + 1}")))
        shutil.copy(first.with_name(first.name.replace("_0000", "_0002")), first)
    listing = json.loads((out / "dataset.json").read_text())
    names = listing["channel_names"]
    listing["channel_names"] = {"0": name} | {str(int(place) + 1): each for place, each in names.items()}
    (out / "dataset.json").write_text(json.dumps(listing))
    return out


@pytest.mark.parametrize("made", ["Brains 3d_fullres"], indirect=True)
def test_a_channel_more_for_nnunet(made, by_nnunet, tmp_path):
    """All layers that nnU-Net registers under several names change together; the new channel is z-scored."""
    data = with_channel(made.data, tmp_path / "Dataset294_More", "ADC")
    source = BaseSource(made.base, inputs="zero")
    adapted = adapt(source, data, tmp_path / "run", spec=SPEC, settings=STILL)
    model, opened = load_model(adapted.path), open_base(made.base)
    assert model.channels == ("ADC", *opened.channels)
    new, *kept = model.preparation.normalization
    assert new.scheme == "ZScoreNormalization"
    assert tuple(kept) == opened.preparation.normalization
    net = build_from_start(opened.network, {**opened.arguments, "out_channels": len(opened.outputs)})
    load_checkpoint(net, opened.weights, labels=opened.outputs, names=opened.outputs)
    image = torch.randn(1, 3, 8, 32, 24)
    with torch.inference_mode():
        torch.testing.assert_close(model.net(image), net.eval()(image[:, 1:]), rtol=1e-3, atol=1e-4)
    (case, *_) = sorted((data / "imagesTr").glob("*_0000.nii.gz"))
    files = [case.with_name(case.name.replace("_0000", f"_000{place}")) for place in range(3)]
    assert model.segment(model.case("scan", files)).scan.names == model.channels
    written = export(adapted.path, tmp_path / "out", format="nnunet")
    np.testing.assert_array_equal(by_nnunet(written.path, files), model.segment(model.case("scan", files)).mask)


def test_a_bundle_with_another_channel_and_label_leaves_as_one(tmp_path):
    """What MONAI builds from it is the network for the task's channels and labels."""
    bundle = write_bundle(tmp_path / "bundle", SEGRESNET | {"out_channels": 2}, ("background", "core"))
    from tests.docs.test_heads_page import write_cohort

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        write_cohort("two", ("T1", "FLAIR"))
    source = BaseSource(f"monai:{bundle}", inputs="share", channels=("FLAIR",))
    prepared = {"patch": (16, 16, 16), "intensity": {"kind": "window", "low": 0, "high": 400}}
    adapted = adapt(source, tmp_path / "two", tmp_path / "run", spec=SPEC, settings=STILL, preparation=prepared)
    written = export(adapted.path, tmp_path / "out", format="monai-bundle").path
    record = json.loads((written / "configs" / "inference.json").read_text())
    assert (record["network_def"]["in_channels"], record["network_def"]["out_channels"]) == (2, 2)
    ours, theirs = load_model(adapted.path), load_model(f"monai:{tmp_path / 'out'}")
    image = torch.randn(1, 2, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.net(image), ours.net(image), rtol=1e-4, atol=1e-4)
