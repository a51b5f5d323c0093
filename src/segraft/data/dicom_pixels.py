"""The intensities of one slice of a DICOM series."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from segraft.data.dicom_slices import Slice
from segraft.errors import SegraftError


def hounsfield(each: Slice) -> NDArray[Any]:
    """Rescaled intensities [rows, columns]: int16 if exact, else float32."""
    from pydicom.pixels.processing import apply_modality_lut

    _check_decoder(each)
    try:
        values = np.asarray(apply_modality_lut(each.dataset.pixel_array, each.dataset), dtype=np.float64)
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError, NotImplementedError, OSError) as error:
        raise SegraftError(f"the pixels of {each.path} cannot be read ({error}): copy or export it again.") from error
    if values.shape != each.size:
        raise SegraftError(f"the pixels of {each.path} are no single plane ({values.shape}): export it again.")
    whole = np.iinfo(np.int16)
    if values.min() >= whole.min and values.max() <= whole.max and np.array_equal(values, np.rint(values)):
        return values.astype(np.int16)
    return values.astype(np.float32)


def _check_decoder(each: Slice) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    syntax = each.dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise SegraftError(
            f"{each.path} is stored as {syntax.name}, which is no way to store CT: export it uncompressed."
        ) from error
    if not decoder.is_available:
        needed = "; or ".join(decoder.missing_dependencies)
        raise SegraftError(
            f"{each.path} is compressed as {syntax.name}, and no decoder for it is installed ({needed}): install one "
            "of these, or export the series uncompressed."
        )
