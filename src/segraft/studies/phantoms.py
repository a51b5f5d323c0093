"""The synthetic cohorts of a study that is run without any."""

from pathlib import Path

from segraft.data.dataset_json import LISTING
from segraft.data.phantom_contrast_cohort import UNLABELLED, write_contrast_cohort, write_unlabelled_contrasts
from segraft.errors import SegraftError
from segraft.studies.spec import Study

SYNTHETIC = "All scans are synthetic phantoms, not patients: the numbers compare methods on them, and nothing more."


def with_phantoms(study: Study, folder: Path) -> Study:
    """The study on phantoms, where it has some and no cohort was given; else as it is.

    Args:
        study: as read.
        folder: receives `labelled/` and `unlabelled/`; what is there is drawn again only where it is not whole.

    Raises:
        SegraftError: a cohort to pre-train on was given, and none to adapt to; the folder cannot be written to.
    """
    drawn = study.phantoms
    if study.data is not None or drawn is None:
        return study
    if study.pretrain_data is not None:
        raise SegraftError(
            f"the study {study.name} is run on phantoms where no cohort is given, and was given one to pre-train on "
            f"alone ({study.pretrain_data}): give --data too, or neither."
        )
    labelled, others = folder / "labelled" / LISTING, folder / "unlabelled" / UNLABELLED
    if not labelled.is_file():
        write_contrast_cohort(labelled.parent, patients=drawn.patients, seed=drawn.seed)
    if not others.is_file():
        write_unlabelled_contrasts(others.parent, patients=drawn.unlabelled, seed=drawn.seed)
    changes = {"data": labelled, "pretrain_data": others, "notes": (SYNTHETIC, *study.notes)}
    return study.model_copy(update=changes)
