"""Whether a study can run at all: its networks, their parts, its preparation. Looked at before anything is trained."""

from torch import nn

from segraft.errors import SegraftError
from segraft.jobs.preparing import checked
from segraft.networks.mae import MaskedAutoencoder
from segraft.networks.registry import outline
from segraft.studies.spec import Encoder, Study, arms_of
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
            if base.encoder is not None:
                _check_encoder(net, base.encoder, study)
        except SegraftError as error:
            raise SegraftError(f"the base {name!r} of the study {study.name}: {error}") from error


def _check_encoder(net: nn.Module, encoder: Encoder, study: Study) -> None:
    """Whether what masked pre-training leaves fits into the network, which is found out before hours of it.

    Raises:
        SegraftError: it is no masked auto-encoder, or the first tensor that does not fit.
    """
    patch = study.preparation.get("patch")
    if patch is None or "img_size" in encoder.arguments:
        raise SegraftError("the encoder sees whole patches: give the patch of the preparation, and no img_size.")
    asked = {**encoder.arguments, "img_size": list(patch)}
    masked = outline(encoder.network, in_channels=1, out_channels=1, arguments=asked)
    if not isinstance(masked, MaskedAutoencoder):
        raise SegraftError(
            f"{encoder.network} ({type(masked).__name__}) is no masked auto-encoder: choose vit_base, vit_small or "
            "vit_large for the encoder."
        )
    wanted = net.state_dict()
    for name, value in masked.vit.state_dict(prefix="vit.").items():
        found = wanted.get(name)
        if found is None or found.shape != value.shape:
            has = "none of that name" if found is None else f"{tuple(found.shape)}"
            raise SegraftError(
                f"its encoder ({encoder.network}) has {name} of shape {tuple(value.shape)}, and the network has {has}: "
                "give both the same sizes, and the network the patch of the preparation as img_size."
            )
