"""Tiny models made by nnU-Net itself, in a process of its own: `python nnunet_making.py FOLDER [HIPPOCAMPUS]`.

FOLDER then holds `raw`, `preprocessed` and `results` as nnU-Net lays them out, and the images of two cases that trained
nothing under `raw/<dataset>/imagesTs`.
"""

import json
import multiprocessing
import multiprocessing.dummy
import multiprocessing.pool  # with the real `get_context`, before it is replaced below
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SEED = 0
TRAINING = 5
TESTS = 1
PROCESSES = "nnUNet_n_proc_DA"


def main(folder: Path, hippocampus: Path | None) -> None:
    """Make the data sets, plan, preprocess and train."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ |= {"nnUNet_compile": "false", "nnUNet_def_n_proc": "1"}
    # Threads where nnU-Net starts processes, each of which would import it all again.
    multiprocessing.get_context = lambda *_: multiprocessing.dummy  # type: ignore[assignment]
    raw, preprocessed = folder / "raw", folder / "preprocessed"
    if hippocampus is not None:
        copy_hippocampus(raw / "Dataset291_Hippocampus", hippocampus)
        train(preprocessed / "Dataset291_Hippocampus", 291, {"3d_fullres": [24, 32, 24], "2d": [40, 32]}, iterations=10)
    make_brains(raw / "Dataset292_Brains")
    train(preprocessed / "Dataset292_Brains", 292, {"3d_fullres": [8, 32, 24], "2d": [32, 24]})
    make_abdomens(raw / "Dataset293_Abdomens")
    train(preprocessed / "Dataset293_Abdomens", 293, {"3d_fullres": [16, 16, 16]}, planner="nnUNetPlannerResEncM")


def copy_hippocampus(folder: Path, source: Path) -> None:
    """Labels that exclude each other, one channel, scaled by its mean and deviation."""
    cases = sorted(path.name for path in (source / "labelsTr").glob("*.nii.gz"))[: TRAINING + TESTS]
    for place, name in enumerate(cases):
        where = "Tr" if place < TRAINING else "Ts"
        for kind, end in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            (folder / f"{kind}{where}").mkdir(parents=True, exist_ok=True)
            target = folder / f"{kind}{where}" / name.replace(".nii.gz", end)
            shutil.copy(source / f"{kind}Tr" / name, target)
    describe(folder, {"0": "MRI"}, {"background": 0, "Anterior": 1, "Posterior": 2})


def make_brains(folder: Path) -> None:
    """Two channels that are zero outside the head, thick slices along the file's first axis, regions."""
    rng = np.random.default_rng(SEED)
    turned = np.array([[0, 0.9, 0, -10], [0, 0, -1.1, 20], [5, 0, 0, 3], [0, 0, 0, 1.0]])
    for case in range(TRAINING + TESTS):
        shape = (12 + case % 3, 44, 40)
        head, centre = ball(shape, (5, 14, 12)), rng.uniform(-4, 4, 3)
        whole, core = ball(shape, (3, 7, 7), centre / (4, 1, 1)), ball(shape, (2, 4, 4), centre / (4, 1, 1))
        label = (whole.astype(np.uint8) + core) * head
        channels = [
            head * (100 + 20 * rng.normal(size=shape) + sign * 60 * label).astype(np.float32) for sign in (1, -0.5)
        ]
        write(folder, case, channels, label.astype(np.uint8), turned @ np.diag(stretch(case)))
    describe(
        folder,
        {"0": "T1", "1": "FLAIR"},
        {"background": 0, "whole": [1, 2], "core": [2]},
        regions_class_order=[1, 2],
    )


def make_abdomens(folder: Path) -> None:
    """One CT channel, oblique, and a label that training ignores."""
    rng = np.random.default_rng(SEED + 1)
    turn = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, 1.5, 2])
    for case in range(TRAINING + TESTS):
        shape = (26, 24 + case, 20)
        label = np.zeros(shape, np.uint8)
        for value in (1, 2):
            label[ball(shape, (6, 6, 4), rng.uniform(-6, 6, 3))] = value
        image = (rng.normal(0, 30, shape) + np.array([-20, 120, 300])[label]).round().astype(np.int16)
        label[:2] = 3
        write(folder, case, [image], label, affine @ np.diag(stretch(case)))
    describe(folder, {"0": "CT"}, {"background": 0, "liver": 1, "spleen": 2, "ignore": 3})


def stretch(case: int) -> tuple[float, float, float, float]:
    """Voxels of the cases that trained nothing have other sizes, so that they are resampled."""
    return (1, 1, 1, 1) if case < TRAINING else (1.3, 0.8, 1.2, 1)


def ball(shape: tuple[int, ...], radii: tuple[int, ...], centre: Any = (0, 0, 0)) -> Any:
    """An ellipsoid about the middle, moved by `centre`."""
    axes = np.indices(shape) - (np.array(shape) / 2 + centre)[:, None, None, None]
    return ((axes / np.array(radii)[:, None, None, None]) ** 2).sum(0) <= 1


def write(folder: Path, case: int, channels: list[Any], label: Any, affine: Any) -> None:
    """One case's files."""
    where = "Tr" if case < TRAINING else "Ts"
    for kind in ("images", "labels"):
        (folder / f"{kind}{where}").mkdir(parents=True, exist_ok=True)
    for place, channel in enumerate(channels):
        nib.save(nib.Nifti1Image(channel, affine), folder / f"images{where}" / f"case{case}_{place:04}.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), folder / f"labels{where}" / f"case{case}.nii.gz")


def describe(folder: Path, channels: dict[str, str], labels: dict[str, Any], **more: Any) -> None:
    """Write dataset.json, which here also lists the cases, as the Decathlon's does; nnU-Net goes by the files."""
    training = [
        {"image": f"imagesTr/{path.name.removesuffix('.nii.gz')}_0000.nii.gz", "label": f"labelsTr/{path.name}"}
        for path in sorted((folder / "labelsTr").iterdir())
    ]
    content = {
        "channel_names": channels,
        "labels": labels,
        "numTraining": TRAINING,
        "file_ending": ".nii.gz",
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(content | more))


def train(
    folder: Path, number: int, patches: dict[str, list[int]], planner: str = "ExperimentPlanner", iterations: int = 25
) -> None:
    """Plan, make it small, preprocess, and train for one short epoch."""
    import torch
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments, preprocess_dataset
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    os.environ[PROCESSES] = "1"
    extractor = DatasetFingerprintExtractor(number, 1)
    extractor.num_foreground_voxels_for_intensitystats, extractor.show_progress_bar = 1e4, False
    extractor.run()
    identifier = plan_experiments([number], planner)
    path = folder / f"{identifier}.json"
    plans = json.loads(path.read_text())
    for configuration, patch in patches.items():
        shrink(plans["configurations"][configuration], patch)
    path.write_text(json.dumps(plans))
    preprocess_dataset(number, identifier, tuple(patches), [1], show_progress_bar=False)
    os.environ[PROCESSES] = "0"  # augmentation in this process; the planner needs one at least
    for configuration in patches:
        torch.manual_seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002  nnU-Net draws from it
        dataset_json = json.loads((folder / "dataset.json").read_text())
        arguments = {**json.loads(path.read_text()), "continue_training": False}
        trainer = nnUNetTrainer(arguments, configuration, 0, dataset_json, device=torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, iterations, 1
        trainer.save_every, trainer.oversample_foreground_percent = 1, 1.0
        trainer.logger.plot_progress_png = lambda *_: None
        trainer.run_training()


def shrink(configuration: dict[str, Any], patch: list[int]) -> None:
    """Three stages of few channels."""
    stages = 3
    configuration["patch_size"], configuration["batch_size"] = patch, 2
    arguments = configuration["architecture"]["arch_kwargs"]
    arguments["n_stages"] = stages
    arguments["features_per_stage"] = [8, 16, 16]
    for name in ("kernel_sizes", "strides", "n_blocks_per_stage", "n_conv_per_stage"):
        if name in arguments:
            arguments[name] = arguments[name][:stages]
    arguments["n_conv_per_stage_decoder"] = arguments["n_conv_per_stage_decoder"][: stages - 1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
