"""One step of the few-shot paper at full size on a CPU: its time and memory, of SwinUNETR with feature size 48.

    python examples/full_size_step.py --image ct.nii.gz --label spleen.nii.gz

Six patches of 96³. Makes a checkpoint of random weights (the cost of a step does not depend on them), adapts it to the
scan for one epoch of one step with `segraft adapt`, each method in a process of its own, and writes what the command
reports to docs/results/full_size_step.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from segraft.jobs.run_folder import versions
from segraft.networks import build
from segraft.studies.engines import cores
from segraft.studies.run import write_json

METHODS = {
    "arena, decoder frozen": ("--method", "arena"),
    "arena, decoder trained": ("--method", "arena", "--train", "decoder"),
    "full": ("--method", "none", "--train", "full"),
}
PROTOCOL = (
    *("--volumes", "1", "--patches", "6", "--patches-at-once", "1", "--patch", "96", "96", "96", "--epochs", "1"),
    *("--spacing", "1.5", "1.5", "1.5", "--window", "-175", "250", "--crop-foreground", "--augmentation", "none"),
    *("--learning-rate", "0.001", "--device", "cpu", "--base-labels", "organ", "--overwrite", "--json"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="a CT")
    parser.add_argument("--label", type=Path, required=True, help="its mask, of 0 and 1")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for file, name in ((arguments.image, "image.nii.gz"), (arguments.label, "label.nii.gz")):
            shutil.copy(file, folder / name)
        listing = {"labels": {"1": "organ"}, "training": [{"image": "image.nii.gz", "label": "label.nii.gz"}]}
        (folder / "dataset.json").write_text(json.dumps(listing))
        torch.manual_seed(0)
        torch.save(build("swin_unetr", in_channels=1, out_channels=1).state_dict(), folder / "foundation.pt")
        rows = {name: step(folder, options) for name, options in METHODS.items()}
    record = {"network": "swin_unetr", "patches": 6, "patch": [96, 96, 96], "cores": cores(), "versions": versions()}
    write_json(arguments.results / "full_size_step.json", record | {"methods": rows})
    for name, row in rows.items():
        print(f"{name}: {row['seconds']:.0f} s, peak memory {row['peak_gib']:.1f} GiB, {row['trained']:,} trained")


def step(folder: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """What the command says of one step with one method."""
    command = [sys.executable, "-c", "from segraft.cli import main; main()", "adapt", "--base", "swin_unetr"]
    paths = ["--weights", folder / "foundation.pt", "--data", folder / "dataset.json", "--out", folder / "run"]
    done = subprocess.run(  # noqa: S603  our own command
        [*command, *map(str, paths), *PROTOCOL, *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    told = json.loads(done.stdout)
    training = told["training"]
    return {
        "seconds": training["seconds"],
        "peak_gib": training["peak_bytes"] / 2**30,
        "trained": told["parameters"]["trainable"],
        "loss": training["losses"][0],
    }


if __name__ == "__main__":
    main()
