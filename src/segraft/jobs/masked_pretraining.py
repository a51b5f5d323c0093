"""Pre-training an encoder without labels, as a masked auto-encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from segraft.adapters import parameter_table
from segraft.atomic import replacing
from segraft.data.cohort import Case
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.evaluation.mae_figure import Shown, reconstruction_figure
from segraft.jobs.bases import build_from
from segraft.jobs.cases import choose
from segraft.jobs.intensities import by_channel
from segraft.jobs.preparing import settle_preparation
from segraft.jobs.run_folder import RunFolder, versions
from segraft.jobs.unlabelled import read_unlabelled
from segraft.jobs.watching import watched
from segraft.networks import load_checkpoint, save_base
from segraft.networks.bases import FILE_NAME
from segraft.networks.encoder_files import encoder_record
from segraft.networks.mae import MaskedAutoencoder, reconstruction_losses
from segraft.networks.registry import outline
from segraft.networks.vit import shown, three
from segraft.training.distributed import Team
from segraft.training.fit import Fit, check_device, check_precision, fit
from segraft.training.mae import MaskedSettings, MaskedTask
from segraft.training.recomputation import regions
from segraft.training.scans import ScanSource

FIGURE = "reconstruction.png"
LOOKED_AT, DRAWN = 16, 4  # scans


@dataclass(frozen=True)
class Reconstructed:
    """How well masked patches in the middle of some of the scans are told: mean squared errors.

    Attributes:
        scans: how many.
        before: the training.
        after: it.
        zero: of predicting 0, which is 1 where no patch is of one value.
        place: of predicting each patch as it is at its place in the other scans, on average: what can be told without
            looking at the scan.
    """

    scans: int
    before: float
    after: float
    zero: float
    place: float


@dataclass(frozen=True)
class PretrainedEncoder:
    """Result of `pretrain_masked`.

    Attributes:
        path: of the base file.
        figure: of the picture.
        fingerprint: of the weights.
        cases: ids of the scans.
        img_size: voxels along X, Y and Z that the encoder takes.
        parameters: trained ones of the encoder; the decoder's serve the pre-training alone.
        reconstruction: how well it works.
        training: how it went.
        notes: what the user should know.
    """

    path: Path
    figure: Path
    fingerprint: str
    cases: tuple[str, ...]
    img_size: tuple[int, int, int]
    parameters: int
    reconstruction: Reconstructed
    training: Fit
    notes: tuple[str, ...]


def pretrain_masked(
    data: str | Path,
    out: str | Path,
    *,
    network: str = "vit_base",
    network_arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    cases: int | Sequence[str] | None = None,
    preparation: Preparation | Mapping[str, Any] | None = None,
    settings: MaskedSettings | None = None,
    patient_pattern: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> PretrainedEncoder:
    """Train a masked auto-encoder on scans and write `out/base.safetensors` and `out/reconstruction.png`.

    The encoder's tensors, under `vit.`, are those of `unetr_channelwise` and of MONAI's UNETR: give the file as their
    weights.

    Args:
        data: the scans; see `read_unlabelled`.
        out: folder to write to.
        network: a key of `segraft.networks.NETWORKS` that is a `MaskedAutoencoder`.
        network_arguments: further keyword arguments of it. Its `img_size` is the patch size of the preparation.
        weights: to start from, as of `segraft.networks.load_checkpoint`; None starts from random weights.
        cases: patients to draw, or the ids of the cases to take; None means all.
        preparation: of the scans, whole or only the fields that differ from the defaults; the patch size is chosen
            from the data where neither it nor `img_size` is given.
        settings: of the training.
        patient_pattern: regular expression whose first group, searched in a case's id, is the patient.
        resume: go on after the last finished epoch, exactly.
        overwrite: replace a base that is there.
        console: for progress; None is silent.

    Several processes may train together, as of `pretrain`.

    Raises:
        SegraftError: bad input of any kind; nothing is written then.
    """
    settings = settings or MaskedSettings()
    check_device(settings.device)
    check_precision(settings.device, settings.precision)
    team = Team.join(settings)
    console = console if team.first else None
    folder = RunFolder(Path(out), FILE_NAME, resume=resume, overwrite=overwrite, writes=team.first)
    cohort = read_unlabelled(data, patient_pattern)
    chosen = choose(cohort, cases, seed=settings.seed, purpose="to pre-train on")
    preparation = by_channel(preparation, None, cohort.channels, str(cohort.path))
    arguments, settled = _sized(network, network_arguments or {}, preparation, chosen.cases)
    torch.manual_seed(settings.seed)
    net = _autoencoder(build_from(network, arguments), network)
    notes = () if weights is None else load_checkpoint(net, weights).notes()
    regions(net, settings.recompute)  # a wrong name is told before scans are read
    source = ScanSource(
        chosen.cases,
        settled,
        seed=settings.seed,
        patches_per_volume=settings.patches,
        augmentation=settings.augmentation,
        flip_axes=None if settings.flip else (),
        watch=watched("preparing scans", console),
    )
    digests = {case.id: case.digest() for case in watched("fingerprinting scans", console)(chosen.cases)}
    given = {
        "preparation": settled.model_dump(mode="json"),
        "dataset": cohort.name,
        "patient_pattern": cohort.patient_pattern,
        "cases": digests,
    }
    asked = settings.model_dump(mode="json")
    total = _total(net, source)
    before, zero, place, _ = _looked_at(net, source, settings, total)
    with folder.training({"network": network, "arguments": arguments, "settings": asked, **given}):
        training = fit(
            net,
            source,
            settings,
            checkpoint=folder.checkpoint,
            resume=resume,
            title="pre-training",
            console=console,
            make_task=MaskedTask,
        )
        after, _, _, drawn = _looked_at(net, source, settings, total)
        made = Reconstructed(min(len(source), LOOKED_AT), before, after, zero, place)
        figure = folder.path / FIGURE
        note = (
            f"Middle slices; {settings.mask:.0%} of the patches of {shown(net.patch_size)} voxels masked, each drawn "
            f"at its true mean and contrast. Mean squared error over {made.scans} scans: {after:.3f} (untrained "
            f"{before:.3f}, of predicting each patch's mean {zero:.3f}, of what is at its place in other scans "
            f"{place:.3f})."
        )
        record = given | {
            **encoder_record("vit", net.img_size),
            "settings": asked,
            "training": asdict(training),
            "reconstruction": asdict(made),
            "versions": versions(),
        }

        def write() -> tuple[Path, str]:
            folder.path.mkdir(parents=True, exist_ok=True)
            with replacing(figure) as aside:
                aside.write_bytes(reconstruction_figure(drawn, note=note))
            base = save_base(net, folder.path, network=network, arguments=arguments, record=record)
            return base.path, base.fingerprint

        path, fingerprint = team.first_does(write)
    return PretrainedEncoder(
        path,
        figure,
        fingerprint,
        tuple(case.id for case in chosen.cases),
        net.img_size,
        parameter_table(net.vit).trainable,
        made,
        training,
        (*notes, *chosen.notes),
    )


def _autoencoder(net: torch.nn.Module, network: str) -> MaskedAutoencoder:
    if isinstance(net, MaskedAutoencoder):
        return net
    raise SegraftError(
        f"{network} ({type(net).__name__}) is no masked auto-encoder: choose vit_base, vit_small or vit_large."
    )


def _sized(
    network: str,
    given: Mapping[str, Any],
    preparation: Preparation | Mapping[str, Any] | None,
    cases: Sequence[Case],
) -> tuple[dict[str, Any], Preparation]:
    """Arguments and preparation that agree on the size of an image.

    Raises:
        SegraftError: both say one, and not the same; or the network is none.
    """
    arguments = {"in_channels": 1, "out_channels": 1, **given}
    sizeless = {
        name: value for name, value in arguments.items() if name not in {"img_size", "in_channels", "out_channels"}
    }
    probe = _autoencoder(
        outline(network, in_channels=arguments["in_channels"], out_channels=1, arguments=sizeless), network
    )
    patch = preparation.patch if isinstance(preparation, Preparation) else (preparation or {}).get("patch")
    if "img_size" in given:
        asked = three(given["img_size"], "img_size")
        if patch is not None and tuple(patch) != asked:
            raise SegraftError(
                f"the patch of {shown(patch)} voxels is not the network's img_size of {shown(asked)}: give one of the "
                "two, or both alike."
            )
        if not isinstance(preparation, Preparation):
            preparation = {**(preparation or {}), "patch": asked}
    settled = settle_preparation(preparation, None, probe, cases)
    return {**arguments, "img_size": list(settled.patch)}, settled


def _total(net: MaskedAutoencoder, source: ScanSource) -> Tensor:
    """The targets [1, T, voxels] in the middle of every scan, added up."""
    total = net.targets(source.middle(0)[None])[0]
    for index in range(1, len(source)):
        total += net.targets(source.middle(index)[None])[0]
    return total


def _looked_at(
    net: MaskedAutoencoder, source: ScanSource, settings: MaskedSettings, total: Tensor
) -> tuple[float, float, float, tuple[Shown, ...]]:
    """The loss over the middle of some scans, of predicting 0 and each place's mean, and what to draw; same masks."""
    generator = torch.Generator().manual_seed(settings.seed)
    training, drawn = net.training, []
    found: list[tuple[float, float, float]] = []
    net.eval()
    with torch.no_grad():
        for index in range(min(len(source), LOOKED_AT)):
            image = source.middle(index)[None]
            made, targets = net(image, settings.mask, generator), net.targets(image)[0]
            others = replace(made, predicted=(total - targets) / max(1, len(source) - 1))
            losses = [float(reconstruction_losses(each, targets)) for each in (made, made.blank(), others)]
            found.append((losses[0], losses[1], losses[2]))
            if index < DRAWN:
                pictures = (image, net.blanked(image, made), net.completed(image, made))
                drawn.append(Shown(source.case(index), *(each[0, 0].numpy() for each in pictures)))
    net.train(training)
    loss, zero, place = (sum(each) / len(found) for each in zip(*found, strict=True))
    return loss, zero, place, tuple(drawn)
