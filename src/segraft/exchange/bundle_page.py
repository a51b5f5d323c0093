"""What a bundle says of itself to people."""

from collections.abc import Collection, Sequence
from typing import Any

from segraft.exchange.formats import Finished

LICENCE = """The terms of this bundle's weights are not stated.

They come from a base network and from scans that it was adapted on, each under terms of its own. Whoever passes the
bundle on replaces this text by the terms that follow from both.
"""


def _installed(needs: Collection[str]) -> str:
    if list(needs) == ["segraft"]:
        return "`pip install segraft`"
    return f"{' and '.join(f'`{name}`' for name in needs)} must be importable"


def readme(finished: Finished, *, needs: Collection[str], transforms: Sequence[dict[str, Any]]) -> str:
    """The bundle's `docs/README.md`.

    Args:
        finished: the adapter.
        needs: packages beside MONAI and PyTorch that the network is of.
        transforms: that prepare scans.
    """
    spec, patch = finished.header.spec, "×".join(map(str, finished.preparation.patch))
    labels = finished.labels
    values = "\n".join(f"- {value}: {name}" for value, name in labels.items())
    rule = (
        "Regions may overlap: each is where its probability is at least 0.5, and later ones are painted over earlier "
        f"ones ({', '.join(labels[value] for value in labels.regions)})."
        if labels.regions
        else "A voxel gets the label of its largest probability if that is at least 0.5, else 0."
    )
    files = (
        "one NIfTI file per scan"
        if len(finished.channels) == 1
        else "one NIfTI file per channel, `case_0000.nii.gz`, `case_0001.nii.gz`, …: " + ", ".join(finished.channels)
    )
    network = (
        f"The network (`{finished.network}`) is of another package: {_installed(needs)} where the bundle is run."
        if needs
        else "The network is built by MONAI and PyTorch alone."
    )
    steps = ", ".join(str(step["_target_"]) for step in transforms)
    return f"""# Segmentation of {", ".join(labels.values())}

A network adapted with Segraft (method {spec.method}, rank {spec.rank}) to this task, merged into its base. {network}
Research software, not a medical device.

## In and out

Scans: {files}. They are prepared by {steps}, and segmented in patches of {patch} voxels.

Values in masks:

{values}

{rule} Outputs of the network are logits, one per label.

## Running it

With MONAI and nibabel, in the bundle's folder:

```python
from monai.bundle import run

run(
    config_file="configs/inference.json",
    meta_file="configs/metadata.json",
    bundle_root=".",
    dataset_dir="scans",
    output_dir="masks",
)
```

or, with `fire` installed, `python -m monai.bundle run --config_file configs/inference.json --meta_file
configs/metadata.json --dataset_dir scans --output_dir masks`. The entry `evaluator` is for tools that ask for one, and
needs pytorch-ignite; the entry `run` does not use it.
"""
