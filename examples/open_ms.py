"""Real scans of four channels, end to end: one patient trains, another is segmented. What it takes, not how well.

    python examples/open_ms.py --data ../shared/data/open_ms

`--data` has two folders, patient07 and patient26, of the public multiple sclerosis set of the University of Ljubljana
(FLAIR, T1, T1 with contrast, T2 and a consensus mask of the lesions, on one grid). With the commands, each a process of
its own, whose wall time and peak memory are taken:

1. `segraft pretrain --mae` trains a ViT-B on the four channels of one patient, one by one, without the mask;
2. `segraft adapt` trains a UNETR with this encoder frozen, a rank-stabilised LoRA per channel, and the decoder;
3. `segraft predict` segments both patients, and the unseen one again without its T1 with contrast.

Then one step with the decoder of the channel-wise paper (64 channels at full size), for its time and memory. Writes
`open_ms.json` to `--results`. `--quick` takes small networks and one step of each, which is for testing the example.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from segraft.evaluation.metrics import dice
from segraft.jobs.run_folder import versions
from segraft.studies.engines import cores
from segraft.studies.run import write_json

CHANNELS = {"FLAIR": "FLAIR", "T1": "T1", "T1c": "T1POST", "T2": "T2"}
"""Name of a channel -> how the names of its files begin."""
LABEL = "GOLD_STANDARD"
TRAINING, UNSEEN, LEFT_OUT = "patient26", "patient07", "T1c"


@dataclass(frozen=True)
class Sizes:
    """Of the networks and trainings.

    Attributes:
        patch: voxels.
        encoder: arguments of the ViT.
        feature_size: of the decoder at full size.
        masked_epochs: of the pre-training, of one step each.
        epochs: of the adaptation, likewise.
        rank: of the adapters.
        paper: feature size of the further step; None leaves it out.
        overlap: of windows.
        crop: voxels of each axis that are kept of a scan, about its lesions; None: all.
    """

    patch: tuple[int, int, int] = (128, 128, 48)
    encoder: dict[str, Any] = field(default_factory=dict)
    feature_size: int = 16
    masked_epochs: int = 10
    epochs: int = 20
    rank: int = 16
    paper: int | None = 64
    overlap: float = 0.25
    crop: int | None = None


QUICK = Sizes(
    patch=(32, 32, 32),
    encoder={"hidden_size": 48, "mlp_dim": 96, "num_layers": 4, "num_heads": 3},
    feature_size=4,
    masked_epochs=1,
    epochs=1,
    rank=2,
    paper=None,
    overlap=0.0,
    crop=48,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of patient07 and patient26")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--epochs", type=int, help=f"of the adaptation [{Sizes.epochs}]")
    parser.add_argument("--quick", action="store_true", help="small networks, one step of each")
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    if arguments.epochs:
        sizes = replace(sizes, epochs=arguments.epochs)
    with tempfile.TemporaryDirectory() as made:
        result = everything(arguments.data, Path(made), sizes)
    write_json(arguments.results / "open_ms.json", result)
    for name, row in result["commands"].items():
        print(f"{name}: {row['seconds']:.0f} s, peak memory {row['peak_gib']:.1f} GiB")
    for name, value in result["dice"].items():
        print(f"Dice, {name}: {value:.3f}")


def everything(data: Path, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """All commands, in a folder; what is written of them."""
    files = {patient: copied(data / patient, folder, sizes.crop) for patient in (TRAINING, UNSEEN)}
    entry = {"image": {name: files[TRAINING][name] for name in CHANNELS}, "label": files[TRAINING][LABEL]}
    modality = {str(number): name for number, name in enumerate(CHANNELS)}
    listing = {"name": "open_ms", "modality": modality, "labels": {"1": "lesion"}, "training": [entry]}
    (folder / "dataset.json").write_text(json.dumps(listing))

    patch = ("--patch", *map(str, sizes.patch))
    common = ("--data", folder / "dataset.json", *patch, "--volumes", 1, "--device", "cpu", "--json")
    encoder_arguments = json.dumps(sizes.encoder)
    commands: dict[str, dict[str, Any]] = {}
    told, commands["pretrain --mae"] = timed(
        *("pretrain", "--mae", "--network", "vit_base", "--network-args", encoder_arguments, *common),
        *("--patches", 4, "--epochs", sizes.masked_epochs, "--learning-rate", 1e-4, "--out", folder / "encoder"),
    )
    masked = told["training"] | {"reconstruction": told["reconstruction"], "parameters": told["parameters"]}

    def adapted(out: str, *options: object, feature_size: int = sizes.feature_size) -> tuple[Any, dict[str, Any]]:
        network = {"img_size": sizes.patch, "feature_size": feature_size, "tap_norm": "instance", **sizes.encoder}
        return timed(
            *("adapt", "--base", "unetr_channelwise", "--weights", folder / "encoder"),
            *("--network-args", json.dumps(network), *common, "--method", "rs_lora", "--rank", sizes.rank),
            *("--train", "decoder", "--patches", 1, "--foreground", 0.8, "--all-epochs", "--overlap", sizes.overlap),
            *("--crop-foreground", "--out", folder / out, *options),
        )

    told, commands["adapt"] = adapted("run", "--epochs", sizes.epochs)
    training = told["training"] | {"parameters": told["parameters"], "file_bytes": told["bytes"]}
    found = {}
    for name, patient, left_out in (
        ("the training patient", TRAINING, ()),
        ("the unseen patient", UNSEEN, ()),
        (f"the unseen patient without {LEFT_OUT}", UNSEEN, (LEFT_OUT,)),
    ):
        mask = folder / f"{len(found)}.nii.gz"
        given = [
            text
            for channel in CHANNELS
            if channel not in left_out
            for text in ("--channel", f"{channel}={folder / files[patient][channel]}")
        ]
        _, commands[f"predict {name}"] = timed(
            "predict", folder / "run", *given, "-o", mask, "--device", "cpu", "--json"
        )
        found[name] = dice(voxels(mask), voxels(folder / files[patient][LABEL]))
    if sizes.paper:
        for name, more in (("", ()), (", --recompute decoder", ("--recompute", "decoder"))):
            _, commands[f"adapt, feature size {sizes.paper}, one step{name}"] = adapted(
                "paper", "--epochs", 1, "--overwrite", *more, feature_size=sizes.paper
            )
    return {
        "what": "Multiple sclerosis lesions from FLAIR, T1, T1 with contrast and T2: one patient trained, another is "
        "unseen. Two patients show that it works on real scans of four channels and what it takes; they say nothing of "
        "how well it segments.",
        "patients": {"training": TRAINING, "unseen": UNSEEN},
        "lesion_voxels": {patient: int(voxels(folder / files[patient][LABEL]).sum()) for patient in files},
        "grid": list(voxels(folder / files[TRAINING][LABEL]).shape),
        "settings": {
            "patch": list(sizes.patch),
            "encoder": "ViT-B" if not sizes.encoder else sizes.encoder,
            "feature_size": sizes.feature_size,
            "method": "rs_lora, one adapter per channel; decoder trained",
            "rank": sizes.rank,
            "overlap": sizes.overlap,
        },
        "dice": found,
        "commands": commands,
        "masked_pretraining": masked,
        "training": training,
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions(),
    }


def copied(patient: Path, folder: Path, crop: int | None) -> dict[str, str]:
    """Copies of a patient's files beside the listing; their names, by channel, and of the mask."""
    names = {name: f"{patient.name}_{name}.nii.gz" for name in (LABEL, *CHANNELS)}
    box: tuple[slice, ...] | None = None
    for name, target in names.items():
        (file,) = patient.glob(f"{CHANNELS.get(name, name)}_N4*.nii.gz")
        if crop is None:
            shutil.copy(file, folder / target)
            continue
        image = nib.load(file)
        if box is None:
            middle = np.median(np.argwhere(voxels(file)), axis=0).astype(int)
            box = tuple(slice(start, start + crop) for start in np.maximum(0, middle - crop // 2).tolist())
        nib.save(image.slicer[box], folder / target)
    return names


def timed(*arguments: object) -> tuple[Any, dict[str, Any]]:
    """A command in a process of its own: what it says as JSON; its wall time and the most memory that it held."""
    command = [sys.executable, "-c", "from segraft.cli import main; main()", *map(str, arguments)]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors)  # noqa: S603  our own command
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        for file in (said, errors):
            file.seek(0)
        if process.returncode:
            sys.exit(errors.read().decode())
        unit = 1 if sys.platform == "darwin" else 1024
        print(arguments[0], f"{seconds:.0f} s", file=sys.stderr, flush=True)
        return json.loads(said.read()), {"seconds": seconds, "peak_gib": usage.ru_maxrss * unit / 2**30}


def voxels(file: Path) -> np.ndarray:
    """Where a mask is not zero."""
    return np.asarray(nib.load(file).dataobj) > 0


if __name__ == "__main__":
    main()
