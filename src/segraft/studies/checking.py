"""Whether a study can run at all: its networks, their parts, its preparation. Looked at before anything is trained."""

from segraft.errors import SegraftError
from segraft.jobs.preparing import checked
from segraft.networks.registry import outline
from segraft.studies.spec import Study, arms_of
from segraft.training.strategies import require_parts


def check_study(study: Study) -> None:
    """Build every network, without memory for its weights where it can be, and look for what the arms would train.

    Raises:
        SegraftError: a network, its arguments, a part that a strategy names, or the preparation does not fit.
    """
    checked(study.preparation)
    for name, base in study.bases.items():
        try:
            net = outline(base.network, in_channels=1, out_channels=1, arguments=base.arguments)
            for arms in study.arms:
                for arm in arms_of(arms) if arms.base == name else ():
                    require_parts(net, arm.train)
        except SegraftError as error:
            raise SegraftError(f"the base {name!r} of the study {study.name}: {error}") from error
