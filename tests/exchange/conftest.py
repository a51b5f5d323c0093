"""nnU-Net as the peer: its models, and what it makes of scans."""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch


@dataclass(frozen=True)
class Made:
    """A model folder of nnU-Net's, and the data set that it was trained on."""

    folder: Path
    data: Path

    @property
    def base(self) -> str:
        return f"nnunet:{self.folder}"

    def scans(self) -> list[list[Path]]:
        """The files of each case that trained nothing."""
        firsts = sorted((self.data / "imagesTs").glob("*_0000.nii.gz"))
        return [sorted(first.parent.glob(first.name.replace("_0000", "_*"))) for first in firsts]


@pytest.fixture
def made(nnunet_folder: Path, request: pytest.FixtureRequest) -> Made:
    """The model that a test is parametrised with, such as `Brains 2d`."""
    dataset, configuration = request.param.split()
    (folder,) = nnunet_folder.glob(f"results/*_{dataset}/*__{configuration}")
    return Made(folder, nnunet_folder / "raw" / folder.parent.name)


@pytest.fixture
def by_nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """by_nnunet(model folder, files of a scan): the mask of nnU-Net's predictor [X, Y, Z].

    It adds logits of overlapping patches in half precision, which decides near ties; `exact` makes it single.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    def predict(folder: Path, files: Sequence[Path], *, exact: bool = True) -> Any:
        with contextlib.redirect_stdout(io.StringIO()), monkeypatch.context() as patched:
            predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
            if exact:
                patched.setattr(torch, "half", torch.float32)
            predictor.predict_from_files_sequential([[str(file) for file in files]], [str(tmp_path / "theirs")])
        return np.asarray(nib.load(tmp_path / "theirs.nii.gz").dataobj)

    return predict
