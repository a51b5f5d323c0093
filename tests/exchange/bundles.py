"""MONAI bundles as its model zoo lays them out, with small networks of random weights; and MONAI running one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from numpy.typing import NDArray
from torch import nn

WINDOW: dict[str, Any] = {"_target_": "ScaleIntensityRanged", "a_min": -57, "a_max": 164, "b_min": 0, "b_max": 1}
CT: list[dict[str, Any]] = [
    {"_target_": "LoadImaged"},
    {"_target_": "EnsureChannelFirstd"},
    {"_target_": "Orientationd", "axcodes": "RAS"},
    {"_target_": "Spacingd", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
    {**WINDOW, "clip": True},
    {"_target_": "EnsureTyped"},
]
"""As of the bundle for the spleen."""

SOFTMAX: list[dict[str, Any]] = [
    {"_target_": "Activationsd", "keys": "pred", "softmax": True},
    {
        "_target_": "Invertd",
        "keys": "pred",
        "transform": "@preprocessing",
        "orig_keys": "image",
        "nearest_interp": False,
        "to_tensor": True,
    },
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
]
SIGMOID: list[dict[str, Any]] = [
    {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
    SOFTMAX[1],
    {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
]
PAINTED = "$lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))"
"""As of the bundle for brain tumours: tumour core 1, whole tumour 2, enhancing tumour 4."""

UNET: dict[str, Any] = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 2,
    "norm": "batch",
}
SEGRESNET: dict[str, Any] = {
    "_target_": "SegResNet",
    "blocks_down": [1, 1],
    "blocks_up": [1],
    "init_filters": 8,
    "in_channels": 1,
    "out_channels": 3,
    "dropout_prob": 0.2,
}


class Own(nn.Conv3d):
    """A network of its maker's own."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)


def network_of(described: Mapping[str, Any]) -> nn.Module:
    """By MONAI, with weights that make outputs of some size, and running statistics that are not the start's."""
    torch.manual_seed(1)
    net: nn.Module = ConfigParser({"net": dict(described)}).get_parsed_content("net")
    generator = torch.Generator().manual_seed(5)
    state = net.state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            state[key] = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.is_floating_point():
            state[key] = value + 0.1 * torch.randn(value.shape, generator=generator)
    net.load_state_dict(state)
    return net.eval()


def write_bundle(
    folder: Path,
    network: Mapping[str, Any],
    outputs: Sequence[str],
    *,
    transforms: Sequence[Mapping[str, Any]] = CT,
    post: Sequence[Mapping[str, Any]] = SOFTMAX,
    inputs: Sequence[str] = ("image",),
    patch: Sequence[int] = (32, 32, 32),
    metadata: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
    weights: bool = True,
) -> Path:
    """A bundle's folder."""
    keyed = [{"_target_": each["_target_"], "keys": "image"} | dict(each) for each in transforms]
    inference = {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "/data",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": dict(network),
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": keyed},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(patch),
            "sw_batch_size": 2,
            "overlap": 0.5,
            "mode": "gaussian",
        },
        "postprocessing": {"_target_": "Compose", "transforms": list(map(dict, post))},
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        **(more or {}),
    }
    channels = {str(place): name for place, name in enumerate(outputs)}
    about = {
        "monai_version": "1.6.1",
        "network_data_format": {
            "inputs": {
                "image": {"num_channels": len(inputs), "channel_def": {str(n): each for n, each in enumerate(inputs)}}
            },
            "outputs": {"pred": {"num_channels": len(outputs), "channel_def": channels}},
        },
        **(metadata or {}),
    }
    for part in ("configs", "models"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(inference))
    (folder / "configs" / "metadata.json").write_text(json.dumps(about))
    if weights:
        torch.save(network_of(network).state_dict(), folder / "models" / "model.pt")
    return folder


def monai_item(bundle: Path, scan: Path | Sequence[Path]) -> tuple[dict[str, Any], ConfigParser]:
    """What MONAI's network makes of a scan: the bundle's own preprocessing and inferer; and its configuration."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser["bundle_root"] = str(bundle)
    parser["device"] = "cpu"
    get = parser.get_parsed_content
    net = get("network")
    net.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    item = get("preprocessing")({"image": str(scan) if isinstance(scan, Path) else [str(each) for each in scan]})
    with torch.no_grad():
        item["pred"] = get("inferer")(item["image"][None], net.eval())[0]
    return item, parser


def monai_mask(bundle: Path, scan: Path | Sequence[Path]) -> NDArray[np.int64]:
    """What MONAI finds: the same with the bundle's own postprocessing, up to the file."""
    item, parser = monai_item(bundle, scan)
    get = parser.get_parsed_content
    return np.asarray(get("postprocessing")(item)["pred"][0].numpy().astype(np.int64))


def write_scan(path: Path, *, seed: int = 0, shape: Sequence[int] = (40, 36, 24), mm: float = 1.3) -> Path:
    """A scan of smooth blobs in HU, whose axes point left, front and down, with voxels of three sizes."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    voxels = gaussian_filter(rng.normal(size=shape), 3.0)
    voxels = (voxels / np.abs(voxels).max() * 300).astype(np.float32)
    affine = np.diag([-mm, mm, -2.2 * mm, 1.0])
    affine[:3, 3] = 20.0, -31.0, 12.0
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def dice(one: NDArray[np.int64], other: NDArray[np.int64], value: int) -> float:
    """Of one label; 1 where neither has it."""
    a, b = one == value, other == value
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum())) if a.any() or b.any() else 1.0
