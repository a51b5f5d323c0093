"""A network that nnU-Net trained, run by nnU-Net and by Segraft on scans it has not seen: are their masks the same?

    python examples/nnunet_agreement.py --data D/dataset.json

Plans and preprocesses the Decathlon's hippocampus MRI with nnU-Net, as it does by itself, trains its 3D network for
some iterations of small batches, and segments the other cases with `nnUNetPredictor` as it is shipped (its sums are in
half precision) and with `segraft.jobs.predict("nnunet:…")`. Writes docs/results/nnunet_agreement.json.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from segraft.data.cohort import Cohort
from segraft.jobs import predict
from segraft.jobs.run_folder import versions
from segraft.studies.engines import cores
from segraft.studies.run import write_json

NUMBER, NAME = 4, "Dataset004_Hippocampus"
FOLDERS = ("raw", "preprocessed", "results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset.json of the hippocampus MRI")
    parser.add_argument("--training", type=int, default=60, help="cases to train on")
    parser.add_argument("--tests", type=int, default=60, help="other cases, to segment")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in FOLDERS:  # read by nnU-Net when it is imported
            (folder / name).mkdir()
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        os.environ |= {"nnUNet_compile": "false", "nnUNet_n_proc_DA": "1"}
        cohort = Cohort.read(arguments.data)
        cases = cohort.cases[: arguments.training + arguments.tests]
        write_raw(folder / "raw" / NAME, cases[: arguments.training], cohort.labels)
        model = train(folder, arguments.iterations, arguments.batch)
        held_out = cases[arguments.training :]
        scans = [case.images[0] for case in held_out]
        theirs = by_nnunet(model, scans, folder / "theirs")
        ours = [each.mask for each in predict(f"nnunet:{model}", scans, folder / "ours", device="cpu")]
        rows = [
            compared(
                case.id, np.asarray(nib.load(str(case.label)).dataobj), *(read(mask) for mask in pair), cohort.labels
            )
            for case, *pair in zip(held_out, theirs, ours, strict=True)
        ]
    record = {
        "cases": {"training": arguments.training, "tests": len(rows)},
        "training": {"iterations": arguments.iterations, "batch": arguments.batch},
        "together": together(rows, cohort.labels),
        "rows": rows,
        "cores": cores(),
        "versions": versions() | {"nnunetv2": version("nnunetv2")},
    }
    write_json(arguments.results / "nnunet_agreement.json", record)
    print(json.dumps(record["together"], indent=2))


def write_raw(folder: Path, cases: Any, labels: dict[int, str]) -> None:
    """A data set as nnU-Net wants it."""
    for case in cases:
        for kind, source, end in (("images", case.images[0], "_0000.nii.gz"), ("labels", case.label, ".nii.gz")):
            (folder / f"{kind}Tr").mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / f"{kind}Tr" / f"{case.id}{end}")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, **{name: value for value, name in labels.items()}},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def train(folder: Path, iterations: int, batch: int) -> Path:
    """Plan, preprocess and train with nnU-Net; the model's folder."""
    import torch
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiments,
        preprocess_dataset,
    )
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    extract_fingerprint_dataset(NUMBER, DatasetFingerprintExtractor, 1)
    identifier = plan_experiments([NUMBER])
    path = folder / "preprocessed" / NAME / f"{identifier}.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = batch
    path.write_text(json.dumps(plans))
    preprocess_dataset(NUMBER, identifier, ("3d_fullres",), [1])
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # augmentation in this process
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  nnU-Net draws from it
    dataset_json = json.loads((folder / "preprocessed" / NAME / "dataset.json").read_text())
    device = torch.device("cpu")
    trainer = nnUNetTrainer(plans | {"continue_training": False}, "3d_fullres", 0, dataset_json, device=device)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, iterations, 1
    trainer.run_training()
    (model,) = (folder / "results" / NAME).glob("*__3d_fullres")
    return model


def by_nnunet(model: Path, scans: list[Path], out: Path) -> list[Path]:
    """nnU-Net's masks."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    out.mkdir()
    targets = [out / scan.name.removesuffix(".nii.gz") for scan in scans]
    predictor.predict_from_files_sequential([[str(scan)] for scan in scans], [str(target) for target in targets])
    return [target.with_name(f"{target.name}.nii.gz") for target in targets]


def read(path: Path) -> Any:
    """A mask's values."""
    return np.asarray(nib.load(path).dataobj)


def compared(case: str, truth: Any, theirs: Any, ours: Any, labels: dict[int, str]) -> dict[str, Any]:
    """Of one case: voxels that differ, and Dice of each label, of the two masks and of each with the truth."""
    pairs = {"both": (theirs, ours), "nnunet": (theirs, truth), "segraft": (ours, truth)}
    return {
        "case": case,
        "voxels": int(ours.size),
        "differing": int((ours != theirs).sum()),
        **{
            key: {name: dice(one == value, other == value) for value, name in labels.items()}
            for key, (one, other) in pairs.items()
        },
    }


def together(rows: list[dict[str, Any]], labels: dict[int, str]) -> dict[str, Any]:
    """Of all cases."""
    return {
        "voxels": sum(row["voxels"] for row in rows),
        "differing": sum(row["differing"] for row in rows),
        "lowest Dice of the two": {name: min(row["both"][name] for row in rows) for name in labels.values()},
        **{
            f"mean Dice, {key}": {name: float(np.mean([row[key][name] for row in rows])) for name in labels.values()}
            for key in ("both", "nnunet", "segraft")
        },
    }


def dice(one: Any, other: Any) -> float:
    """Of two planes; 1 where both are empty."""
    total = one.sum() + other.sum()
    return 1.0 if total == 0 else float(2 * (one & other).sum() / total)


def version(name: str) -> str:
    """Of a package."""
    from importlib.metadata import version as of

    return of(name)


if __name__ == "__main__":
    main()
