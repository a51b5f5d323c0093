"""Adapters as MONAI bundles: MONAI checks them, runs them, and finds what Segraft finds, voxel for voxel."""

import json
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run, verify_metadata, verify_net_in_out
from monai.bundle.properties import InferProperties
from monai.utils import BundleProperty
from tests.exchange.bundles import CT, SEGRESNET, UNET, write_bundle, write_scan

from segraft.adapters import AdapterSpec
from segraft.data.labels import Labels
from segraft.data.preparation import Percentiles, Preparation, Window, ZScore
from segraft.errors import SegraftError
from segraft.exchange.formats import Finished
from segraft.exchange.monai_export import write_bundle as write_out
from segraft.exchange.opening import open_base
from segraft.jobs import adapt, export, load_model, predict
from segraft.jobs.base_source import BaseSource
from segraft.networks import build
from segraft.training.settings import TrainingSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning"),  # MONAI's, of its default reader
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),  # that configurations are run: ours
]

SETTINGS = TrainingSettings(epochs=2, learning_rate=3e-3, volumes=1, patches=1, device="cpu")
SPEC = AdapterSpec("dora_c", rank=2, train=("decoder", "head"))
ORGANS = ("background", "liver", "spleen")
PATCH = {"patch": (16, 16, 16)}
SEGMENTING = {"blocks_down": [1, 1], "blocks_up": [1], "init_filters": 8}

SCHEMA = {
    "type": "object",
    "required": [
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "required_packages_version",
        "task",
        "description",
        "authors",
        "copyright",
        "network_data_format",
    ],
    "properties": {
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tensor"}},
        },
    },
    "$defs": {
        "tensor": {
            "type": "object",
            "required": [
                *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"),
                "channel_def",
            ],
            "properties": {
                "num_channels": {"type": "integer"},
                "spatial_shape": {"type": "array"},
                "value_range": {"type": "array"},
                "is_patch_data": {"type": "boolean"},
                "channel_def": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        }
    },
}
"""What MONAI's specification of bundles asks for (docs/source/mb_specification.rst, "metadata.json File")."""


def write_cohort(folder: Path, *, channels: int = 1, slices: int = 24) -> Path:
    """Two cases of blobs: liver where they are bright, spleen where they are brighter."""
    folder.mkdir()
    listed = []
    for case in ("a", "b"):
        files = [
            write_scan(folder / f"{case}_000{place}.nii.gz", seed=ord(case) + place, shape=(40, 36, slices))
            for place in range(channels)
        ]
        scan = nib.load(files[0])
        voxels = scan.get_fdata()
        label = (voxels > 40).astype(np.uint8) + (voxels > 120).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, scan.affine), folder / f"{case}_label.nii.gz")
        images = [f"./{file.name}" for file in files]
        listed.append({"image": images if channels > 1 else images[0], "label": f"./{case}_label.nii.gz"})
    names = ("T1", "FLAIR")[:channels] if channels > 1 else ("CT",)
    content = {
        "name": "toy",
        "modality": {str(place): name for place, name in enumerate(names)},
        "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "training": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def base_of(folder: Path, network: str, arguments: dict[str, object], channels: int = 1) -> BaseSource:
    net = build(network, in_channels=channels, out_channels=2, arguments=arguments)
    torch.save(net.state_dict(), folder / "weights.pt")
    return BaseSource(network, folder / "weights.pt", arguments)


def masks_by_monai(bundle: Path, scans: Path, out: Path) -> dict[str, nib.Nifti1Image]:
    """Every mask that MONAI writes, by the name of its scan."""
    run(
        config_file=str(bundle / "configs" / "inference.json"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(scans),
        output_dir=str(out),
        device="cpu",
    )
    return {path.name.removesuffix("_mask.nii.gz"): nib.load(path) for path in sorted(out.iterdir())}


def require_same_masks(adapter: Path, bundle: Path, scans: Path, folder: Path) -> None:
    (folder / "scans").mkdir()
    for path in scans.glob("*_000?.nii.gz"):
        (folder / "scans" / path.name).symlink_to(path)
    theirs = masks_by_monai(bundle, folder / "scans", folder / "theirs")
    found = predict(adapter, [folder / "scans"], folder / "ours", device="cpu")
    assert len(theirs) == len(found) == 2
    for each in found:
        ours = nib.load(each.mask)
        (other,) = (mask for name, mask in theirs.items() if each.scan.name.startswith(name))
        assert len(np.unique(ours.dataobj)) > 1
        assert np.array_equal(np.asarray(ours.dataobj), np.asarray(other.dataobj))
        np.testing.assert_allclose(ours.affine, other.affine, atol=1e-4)
        assert ours.get_data_dtype() == other.get_data_dtype()


def require_valid(bundle: Path, folder: Path) -> None:
    """By MONAI's own checks, the schema being a local one: a file that is there is not downloaded."""
    meta, config = bundle / "configs" / "metadata.json", bundle / "configs" / "inference.json"
    schema = folder / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    digest = sha256(schema.read_bytes()).hexdigest()
    verify_metadata(meta_file=str(meta), filepath=str(schema), hash_val=digest, hash_type="sha256")
    verify_net_in_out("network_def", meta_file=str(meta), config_file=str(config), device="cpu")
    content = json.loads(config.read_text())
    assert {name for name, each in InferProperties.items() if each[BundleProperty.REQUIRED]} <= set(content)


@pytest.mark.parametrize(
    ("network", "arguments", "preparation"),
    [
        (
            "monai.networks.nets:SegResNet",
            SEGMENTING,
            {"spacing": (1.5, 1.5, 2.0), "intensity": Window(low=-50, high=200)},
        ),
        ("unet3d", {"widths": (4, 8)}, {"orientation": "LPI", "intensity": Percentiles(), "crop_foreground": True}),
        ("monai.networks.nets:SegResNet", SEGMENTING, {"orientation": "own", "intensity": ZScore()}),
        ("unet", {"widths": (4, 8)}, {"patch": (16, 24, 1), "intensity": ZScore(nonzero=True)}),
        (
            "monai.networks.nets:UNet",
            {"spatial_dims": 3, "channels": [4, 8, 16], "strides": [2, 2]},
            {"average": "logit", "weights": "constant", "overlap": 0.25},
        ),
    ],
)
def test_monai_finds_what_segraft_finds(network, arguments, preparation, tmp_path):
    data = write_cohort(tmp_path / "data")
    settled = Preparation(**PATCH | preparation)
    source = base_of(tmp_path, network, arguments)
    adapted = adapt(source, data, tmp_path / "run", spec=SPEC, preparation=settled, settings=SETTINGS)
    exported = export(adapted.path, tmp_path / "bundle", format="monai-bundle")
    require_valid(exported.path, tmp_path)
    require_same_masks(adapted.path, exported.path, data, tmp_path)
    ours = network.startswith("unet")
    assert any("needs segraft" in note for note in exported.notes) == ours
    about = json.loads((exported.path / "configs" / "metadata.json").read_text())
    assert ("segraft" in about["required_packages_version"]) == ours
    assert ("pip install segraft" in (exported.path / "docs" / "README.md").read_text()) == ours
    again = load_model(f"monai:{exported.path}")  # and Segraft opens what it wrote
    assert dict(again.labels) == {1: "liver", 2: "spleen"}
    assert again.preparation == settled


def test_several_channels(tmp_path):
    data = write_cohort(tmp_path / "data", channels=2)
    source = base_of(tmp_path, "monai.networks.nets:SegResNet", SEGMENTING, channels=2)
    settled = Preparation(**PATCH, intensity=ZScore(nonzero=True), crop_foreground=True)
    adapted = adapt(source, data, tmp_path / "run", spec=SPEC, preparation=settled, settings=SETTINGS)
    bundle = export(adapted.path, tmp_path / "bundle", format="monai-bundle").path
    require_valid(bundle, tmp_path)
    require_same_masks(adapted.path, bundle, data, tmp_path)
    assert open_base(f"monai:{bundle}").channels == ("T1", "FLAIR")
    together = tmp_path / "together"  # as one file with the channel last, too
    together.mkdir()
    images = [nib.load(data / f"a_000{place}.nii.gz") for place in range(2)]
    voxels = np.stack([image.get_fdata(dtype=np.float32) for image in images], axis=-1)
    nib.save(nib.Nifti1Image(voxels, images[0].affine), together / "a.nii.gz")
    (mask,) = masks_by_monai(bundle, together, tmp_path / "once").values()
    assert np.array_equal(np.asarray(mask.dataobj), np.asarray(nib.load(tmp_path / "ours" / "a.nii.gz").dataobj))


def test_regions(tmp_path):
    """Overlapping outputs, painted one over the other."""
    data = write_cohort(tmp_path / "data")
    source = base_of(tmp_path, "monai.networks.nets:SegResNet", SEGMENTING)
    adapted = adapt(
        source,
        data,
        tmp_path / "run",
        spec=SPEC,
        labels=("all=1+2", "bright=2"),
        preparation=Preparation(**PATCH, intensity=Window(low=-50, high=200)),
        settings=SETTINGS,
    )
    bundle = export(adapted.path, tmp_path / "bundle", format="monai-bundle").path
    require_valid(bundle, tmp_path)
    require_same_masks(adapted.path, bundle, data, tmp_path)
    opened = open_base(f"monai:{bundle}")
    assert opened.labels == {1: "all", 2: "bright"}
    assert opened.labels.regions == {1: (1, 2), 2: (2,)}
    config = bundle / "configs" / "inference.json"
    content = json.loads(config.read_text())
    del content["label_regions"]  # as before they were written: then as masks are painted
    config.write_text(json.dumps(content))
    assert open_base(f"monai:{bundle}").labels.regions == {1: (1, 2), 2: (2,)}


WIDTHS = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "widths": (4, 8)}
ABC = Labels({1: "A", 2: "B", 3: "C"}, {1: (1, 2), 2: (2, 3), 3: (3,)})


def finished_of(network="unet", arguments=WIDTHS, labels=ABC, channels=("",), **preparation):
    """A network with nothing adapted, for the exporter alone."""
    rest = {name: value for name, value in arguments.items() if not name.endswith("_channels")}
    count = {"in_channels": len(channels), "out_channels": len(labels)}
    net = build(network, **count, arguments=rest).eval()
    header = SimpleNamespace(spec=AdapterSpec("none", train=("head",)))
    settled = Preparation(**PATCH | preparation)
    source = Path("a.safetensors")
    return Finished(
        source, header, source, network, {**rest, **count}, labels, settled, channels, lambda: net, lambda: net
    )


@pytest.mark.parametrize("average", ["logit", "probability"])
def test_regions_that_overlap_in_part_come_back(average, tmp_path):
    """Which label values each covers cannot be told from the order in which masks are painted."""
    finished = finished_of(average=average)
    write_out(finished, tmp_path)
    opened = open_base(f"monai:{tmp_path}")
    assert opened.labels == ABC
    assert opened.labels.regions == ABC.regions
    assert list(opened.labels.regions) == list(ABC.regions)
    assert (opened.unlike, opened.preparation) == ((), finished.preparation)


def test_labels_named_like_a_background_come_back(tmp_path):
    """Each output is a sigmoid's, whatever the first is called."""
    labels = Labels({4: "other", 2: "B", 3: "C"})
    write_out(finished_of(labels=labels), tmp_path)
    opened = open_base(f"monai:{tmp_path}")
    assert (opened.labels, opened.background, opened.unlike) == (labels, False, ())


@pytest.mark.parametrize(
    ("network", "arguments", "needed"),
    [
        ("monai.networks.nets:SegResNet", SEGMENTING, set()),
        ("unet", WIDTHS, {"segraft"}),
        ("tests.exchange.bundles:Own", {}, {"tests"}),
    ],
)
def test_packages_that_a_bundle_needs_are_named(network, arguments, needed, tmp_path):
    notes = write_out(finished_of(network, arguments), tmp_path)
    assert len(notes) == len(needed)
    assert all(note.endswith(f"needs {name}.") for note, name in zip(notes, needed, strict=True))
    about = json.loads((tmp_path / "configs" / "metadata.json").read_text())
    assert set(about["required_packages_version"]) == {"nibabel", *needed}
    page = (tmp_path / "docs" / "README.md").read_text()
    assert ("by MONAI and PyTorch alone" in page) == (not needed)
    assert all(name in page for name in needed)


def test_channels_on_several_grids_are_told(tmp_path):
    finished = finished_of("unet", WIDTHS | {"in_channels": 2}, ABC, ("a", "b"), channel_grids="resample")
    assert any("must lie on one grid" in note for note in write_out(finished, tmp_path / "two"))
    one = finished_of(channel_grids="resample")
    assert not any("grid" in note for note in write_out(one, tmp_path / "one"))


@pytest.mark.parametrize("channels", [1, 2])
def test_folders_with_brackets_in_their_names(channels, tmp_path):
    """Which mean a choice of letters to glob."""
    names = ("a", "b")[:channels] if channels > 1 else ("",)
    write_out(finished_of("unet", WIDTHS | {"in_channels": channels}, ABC, names), tmp_path / "bundle")
    folder = tmp_path / "scans [1]"
    folder.mkdir()
    for place in range(channels):
        write_scan(folder / f"c_000{place}.nii.gz")
    parser = ConfigParser()
    parser.read_config(tmp_path / "bundle" / "configs" / "inference.json")
    parser["dataset_dir"] = str(folder)
    assert len(parser.get_parsed_content("datalist")) == 1


@pytest.mark.parametrize("network", [UNET | {"out_channels": 3}, SEGRESNET])
def test_a_bundle_adapted_is_a_bundle_again(network, tmp_path):
    """Also where outputs are on top of a network whose own cannot be exchanged; it needs MONAI alone."""
    base = write_bundle(tmp_path / "base", network, ORGANS, transforms=CT[:3] + CT[4:], patch=(16, 16, 16))
    data = write_cohort(tmp_path / "data")
    adapted = adapt(f"monai:{base}", data, tmp_path / "run", spec=SPEC, labels=("spleen",), settings=SETTINGS)
    exported = export(adapted.path, tmp_path / "bundle", format="monai-bundle")
    assert not exported.notes
    text = (exported.path / "configs" / "inference.json").read_text()
    assert "segraft" not in text
    require_valid(exported.path, tmp_path)
    require_same_masks(adapted.path, exported.path, data, tmp_path)
    opened, scan = load_model(f"monai:{exported.path}"), data / "a_0000.nii.gz"  # and Segraft opens what it wrote
    assert np.array_equal(opened.segment(scan).mask, load_model(adapted.path).segment(scan).mask)
    again = adapt(f"monai:{exported.path}", data, tmp_path / "again", spec=SPEC, labels=("spleen",), settings=SETTINGS)
    assert load_model(again.path).segment(scan).mask.shape == (40, 36, 24)


def test_what_a_bundle_cannot_say_is_refused(tmp_path):
    data = write_cohort(tmp_path / "data", channels=2)
    source = base_of(tmp_path, "monai.networks.nets:SegResNet", SEGMENTING, channels=2)
    apart = Preparation(**PATCH, intensity=(ZScore(), Window(low=-50, high=200)))
    adapted = adapt(source, data, tmp_path / "run", spec=SPEC, preparation=apart, settings=SETTINGS)
    with pytest.raises(SegraftError, match="settings of their own"):
        export(adapted.path, tmp_path / "bundle", format="monai-bundle")
    assert not (tmp_path / "bundle").exists()
