"""Real scans: does an encoder that was pre-trained without labels help where only ten cases have some?

A vision transformer learns to tell hidden patches of 120 hippocampus MRI volumes, whose labels are not read. It is then
the encoder of a UNETR that learns both parts of the hippocampus from ten labelled volumes, in three ways: all of it
trained, the encoder frozen, the encoder frozen under a low-rank adapter. Each is compared with the same from random
weights, for several draws of ten cases, on the same 50 further volumes. No case serves twice.

    python examples/masked_pretraining.py --data ../shared/data/hippocampus/dataset.json

Writes `masked_pretraining.json` (every number, the cases, versions), `masked_pretraining.md` and
`masked_pretraining.png` (inputs, what was visible, reconstructions) to `--results`. A run goes on where it was stopped:
what is finished in `--out` is not done again. `--quick` does all of it on few cases in a minute, which shows nothing.
"""

import argparse
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from segraft.adapters import AdapterSpec, read_header
from segraft.atomic import replacing
from segraft.data.preparation import Preparation
from segraft.evaluation.results import mean_sd
from segraft.jobs import adapt, evaluate
from segraft.jobs.base_source import BaseSource
from segraft.jobs.bases import build_from
from segraft.jobs.masked_pretraining import FIGURE, pretrain_masked
from segraft.jobs.run_folder import versions
from segraft.jobs.unlabelled import read_unlabelled
from segraft.networks import build, load_base, load_checkpoint, read_base
from segraft.networks.mae import MaskedAutoencoder, Reconstruction, reconstruction_losses
from segraft.studies.run import write_json
from segraft.training.mae import MaskedSettings
from segraft.training.scans import ScanSource
from segraft.training.settings import TrainingSettings
from segraft.training.strategies import selectors

PATCH = (32, 48, 32)
SIZES = {"patch_size": 8, "hidden_size": 96, "mlp_dim": 384, "num_layers": 4, "num_heads": 3}
"""Of the encoder, the same in both networks."""
UNETR = {**SIZES, "img_size": list(PATCH), "feature_size": 8, "tap_norm": "instance"}
RATE = 3e-3
"""Learning rate of every training."""


@dataclass(frozen=True)
class Protocol:
    """How much of everything.

    Attributes:
        unlabelled: cases of the pre-training.
        labelled: cases of one training with labels.
        test: cases that every model is tested on.
        seeds: each draws other labelled cases, random encoders and orders.
        masked_epochs: of the pre-training.
        epochs: of a training with labels.
    """

    unlabelled: int = 120
    labelled: int = 10
    test: int = 50
    seeds: tuple[int, ...] = (0, 1, 2)
    masked_epochs: int = 600
    epochs: int = 60


QUICK = Protocol(unlabelled=6, labelled=2, test=2, seeds=(0,), masked_epochs=2, epochs=1)


def pretrained(data: Path, out: Path, cases: list[str], protocol: Protocol, device: str, console: Console) -> Path:
    """The folder of the encoder, pre-trained where it is not yet."""
    folder = out / "encoder"
    if not (folder / "base.safetensors").is_file():
        pretrain_masked(
            data,
            folder,
            network="vit_small",
            network_arguments={**SIZES, "decoder_layers": 2},
            cases=cases,
            preparation={"patch": PATCH},
            settings=MaskedSettings(
                epochs=protocol.masked_epochs, volumes=16, patches=1, learning_rate=3e-3, device=device
            ),
            resume=(folder / "last.ckpt").is_file(),
            console=console,
        )
    return folder


def split(data: Path, protocol: Protocol) -> dict[str, Any]:
    """Cases without labels, with labels for each seed, and to test on."""
    ids = [case.id for case in read_unlabelled(data).cases]
    random.Random(0).shuffle(ids)  # noqa: S311  no secret
    needed = [protocol.unlabelled, *[protocol.labelled] * len(protocol.seeds), protocol.test]
    if len(ids) < sum(needed):
        raise SystemExit(f"{data} has {len(ids)} cases, and {sum(needed)} are needed.")
    parts = [sorted(ids.pop(0) for _ in range(count)) for count in needed]
    return {
        "unlabelled": parts[0],
        "labelled": {str(seed): part for seed, part in zip(protocol.seeds, parts[1:-1], strict=True)},
        "test": parts[-1],
    }


def untrained(out: Path, seed: int) -> Path:
    """The weights of an encoder that was never trained, as a file."""
    path = out / f"untrained-{seed}.pt"
    if not path.is_file():
        torch.manual_seed(seed)
        net = build("vit_small", in_channels=1, out_channels=1, arguments={**SIZES, "img_size": PATCH})
        with replacing(path) as aside:
            torch.save(net.state_dict(), aside)
    return path


def middles(data: Path, ids: list[str]) -> torch.Tensor:
    """The patches in the middle of scans [N, 1, X, Y, Z], as networks are given them."""
    by_id = {case.id: case for case in read_unlabelled(data).cases}
    source = ScanSource([by_id[each] for each in ids], Preparation(patch=PATCH), seed=0, augmentation="none")
    return torch.stack([source.middle(index) for index in range(len(source))])


def losses(data: Path, encoder: Path, cases: dict[str, Any]) -> dict[str, float]:
    """Mean squared error over masked patches in the middle of the test scans: of networks and of trivial guesses."""
    net, info = load_base(encoder)
    images = middles(data, cases["test"])
    torch.manual_seed(0)
    fresh = build_from(info.network, info.arguments)
    found: dict[str, float] = {}
    with torch.no_grad():
        targets = net.targets(images)[0]
        place = net.targets(middles(data, cases["unlabelled"]))[0].mean(0, keepdim=True)
        for name, each in (("untrained", fresh), ("trained", net)):
            made = each.eval()(images, generator=torch.Generator().manual_seed(0))
            found[name] = float(reconstruction_losses(made, targets).mean())
        guesses = {
            "the mean of each patch": torch.zeros_like(targets),
            "the nearest visible patch": nearest_visible(targets, made.masked, net),
            "the mean over the scans of the pre-training, at each place": place.expand_as(targets),
        }
        for name, guess in guesses.items():
            found[name] = float(reconstruction_losses(Reconstruction(guess, made.masked), targets).mean())
    return found


def nearest_visible(targets: torch.Tensor, masked: torch.Tensor, net: MaskedAutoencoder) -> torch.Tensor:
    """In place of every patch the visible one next to it."""
    places = torch.cartesian_prod(*(torch.arange(size).float() for size in net.grid))
    far = torch.cdist(places, places)[None] + masked[:, None, :] * 1e6
    return targets.gather(1, far.argmin(2)[:, :, None].expand_as(targets))


@dataclass(frozen=True)
class Arm:
    """A row of the table: which encoder, and what is trained of the network."""

    encoder: str
    trained: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.encoder}-{self.trained}".replace(" ", "_")


TRAINED = {
    "all": AdapterSpec("none", train=selectors(["full"])),
    "decoder": AdapterSpec("none", train=selectors(["decoder"])),
    "rs_lora and decoder": AdapterSpec("rs_lora", rank=8, train=selectors(["decoder"])),
}
ARMS = tuple(Arm(encoder, trained) for trained, encoder in product(TRAINED, ("random", "pre-trained")))


def one(
    arm: Arm, seed: int, data: Path, out: Path, cases: dict[str, Any], protocol: Protocol, device: str, console: Console
) -> dict[str, Any]:
    """Train and test, what is not done yet."""
    run = out / f"{arm.name}-{seed}"
    model = run / "adapter.safetensors"
    encoder = out / "encoder" if arm.encoder == "pre-trained" else untrained(out, seed)
    if not model.is_file():
        adapt(
            BaseSource("unetr_channelwise", encoder, UNETR),
            data,
            run,
            spec=TRAINED[arm.trained],
            shots=cases["labelled"][str(seed)],
            preparation={"patch": PATCH},
            settings=TrainingSettings(
                epochs=protocol.epochs, volumes=2, patches=1, learning_rate=RATE, seed=seed, device=device
            ),
            resume=(run / "last.ckpt").is_file(),
            console=console,
        )
    if not (run / "evaluation.json").is_file():
        evaluate(model, data, out=run, cases=cases["test"], device=device, console=console)
    record = read_header(model).record
    tested = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["cases"]
    return {
        **asdict(arm),
        "seed": seed,
        "dice": {name: [each["dice"] for each in tested if each["name"] == name] for name in record["labels"].values()},
        "losses": record["training"]["losses"],
        "seconds": record["training"]["seconds"],
        "trainable_parameters": record["trainable_parameters"],
    }


def states(data: Path, out: Path, encoder: Path, cases: dict[str, Any], seed: int) -> dict[str, list[dict[str, float]]]:
    """What the tapped states of the test scans are made of, root mean squares, tap by tap.

    `common` is what all tokens of all scans share, `scan` what those of a scan share beyond it, `token` the rest.
    `directions` is how many directions there are in scan and token (the exponential of their spectrum's entropy).
    `place` is how well a linear map of the normed states tells where a token is (R²; every second scan is left out of
    its fit and serves to measure it).
    """
    images, found = middles(data, cases["test"]), {}
    for name, weights in (("random", untrained(out, seed)), ("pre-trained", encoder)):
        net = build("unetr_channelwise", in_channels=1, out_channels=1, arguments=UNETR)
        load_checkpoint(net, weights)
        with torch.no_grad():
            last, states = net.vit.eval()(images)
        rows = []
        for state in [*(states[tap - 1] for tap in net.taps[:-1]), last]:
            common, scan = state.mean((0, 1)), state.mean(1, keepdim=True)
            spectrum = torch.linalg.svdvals((state - common).flatten(0, 1)).square()
            share = spectrum / spectrum.sum()
            parts = {"common": common, "scan": scan - common, "token": state - scan}
            rows.append(
                {part: float(value.square().mean().sqrt()) for part, value in parts.items()}
                | {"directions": float(torch.special.entr(share).sum().exp()), "place": told_place(net, state)}
            )
        found[name] = rows
    return found


def told_place(net: torch.nn.Module, state: torch.Tensor) -> float:
    """R² of a ridge regression of the tokens' coordinates, over the axes."""
    normed = net.normed(state).double()
    places = torch.cartesian_prod(*(torch.arange(size).double() for size in net.grid))
    places = (places - places.mean(0)) / places.std(0, correction=0)
    fitted, tested = (normed[start::2].flatten(0, 1) for start in (0, 1))
    targets = [places.repeat(len(normed[start::2]), 1) for start in (0, 1)]
    penalty = 10 * torch.eye(fitted.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(fitted.T @ fitted + penalty, fitted.T @ targets[0])
    return float(1 - (tested @ weights - targets[1]).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset.json of the Decathlon's Task04_Hippocampus")
    parser.add_argument("--out", type=Path, default=Path("examples/out/masked_pretraining"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", help="do these alone now; the results need all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="few cases and epochs")
    arguments = parser.parse_args()
    protocol, console = QUICK if arguments.quick else Protocol(), Console(stderr=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    refuse_another(arguments.out / "settings.json", asdict(protocol) | {"network": UNETR, "learning_rate": RATE})
    cases = split(arguments.data, protocol)
    common = arguments.device, console
    encoder = pretrained(arguments.data, arguments.out, cases["unlabelled"], protocol, *common)
    rows = [
        one(arm, seed, arguments.data, arguments.out, cases, protocol, *common)
        for seed in (arguments.seeds or protocol.seeds)
        for arm in ARMS
    ]
    if arguments.seeds and set(arguments.seeds) != set(protocol.seeds):
        return
    base = read_base(encoder)
    result = {
        "what": "Hippocampus: an encoder pre-trained on scans without labels, then ten labelled cases",
        "protocol": asdict(protocol),
        "masked_autoencoder": {"name": base.network, "arguments": base.arguments, "fingerprint": base.fingerprint},
        "segmentation": {"name": "unetr_channelwise", "arguments": UNETR, "rank": 8},
        "settings": {"masked": base.record["settings"], "learning_rate": RATE, "volumes": 2, "patches": 1},
        "pretraining": {
            "seconds": base.record["training"]["seconds"],
            "losses": base.record["training"]["losses"],
            "errors_on_test_scans": losses(arguments.data, encoder, cases),
        },
        "states": states(arguments.data, arguments.out, encoder, cases, protocol.seeds[0]),
        "machine": {"cores": os.cpu_count(), "device": base.record["training"]["device"]},
        "versions": versions(),
        "cases": cases,
        "rows": rows,
    }
    write_json(arguments.results / "masked_pretraining.json", result)
    with replacing(arguments.results / "masked_pretraining.md") as aside:
        aside.write_text(page := markdown_of(result), encoding="utf-8")
    shutil.copy(encoder / FIGURE, arguments.results / "masked_pretraining.png")
    print(page)


def refuse_another(path: Path, asked: dict[str, Any]) -> None:
    """Keep the settings of a folder, and stop where it was started with others."""
    asked = json.loads(json.dumps(asked))
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != asked:
        raise SystemExit(f"{path.parent} was started with {path.read_text()}: use another --out.")
    write_json(path, asked)


def overall(row: dict[str, Any]) -> float:
    """Mean Dice over cases and labels."""
    return fmean(fmean(values) for values in row["dice"].values())


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table: mean over the seeds (SD of the seeds' means), and what pre-training adds, seed by seed."""
    labels = list(rows[0]["dice"])
    lines = [
        f"| trained | encoder starts | Dice, mean of {len({row['seed'] for row in rows})} draws (SD) | "
        + " | ".join(labels)
        + " | pre-trained − random, each draw | loss at the end | trained parameters |",
        "|" + "---|" * (6 + len(labels)),
    ]
    for arm in ARMS:
        own = [row for row in rows if (row["encoder"], row["trained"]) == (arm.encoder, arm.trained)]
        other = {
            row["seed"]: overall(row) for row in rows if row["trained"] == arm.trained and row["encoder"] == "random"
        }
        gains = "" if arm.encoder == "random" else ", ".join(f"{overall(row) - other[row['seed']]:+.3f}" for row in own)
        lines.append(
            f"| {arm.trained} | {arm.encoder} | {mean_sd([overall(row) for row in own])} | "
            + " | ".join(f"{fmean(fmean(row['dice'][label]) for row in own):.3f}" for label in labels)
            + f" | {gains} | {fmean(row['losses'][-1] for row in own):.3f} | {own[0]['trainable_parameters']:,} |"
        )
    return lines


def gain(rows: list[dict[str, Any]]) -> str:
    """What pre-training changes, over all pairs."""
    found = {(row["encoder"], row["trained"], row["seed"]): overall(row) for row in rows}
    changes = [
        value - found["random", trained, seed]
        for (encoder, trained, seed), value in found.items()
        if encoder == "pre-trained"
    ]
    return (
        f"Over all {len(changes)} pairs pre-training changes it by {fmean(changes):+.3f} (from {min(changes):+.3f} to "
        f"{max(changes):+.3f}); it is higher in {sum(change > 0 for change in changes)} of them."
    )


def markdown_of(result: dict[str, Any]) -> str:
    """The page."""
    protocol, cases, before = result["protocol"], result["cases"], result["pretraining"]
    tested, curve = len(cases["test"]), before["losses"]
    shown = sorted({round(place * (len(curve) - 1) / 10) for place in range(11)})
    versions_ = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    setting = (
        f"A ViT ({SIZES}) is pre-trained as a masked auto-encoder on {len(cases['unlabelled'])} hippocampus volumes "
        f"without their labels ({protocol['masked_epochs']} epochs of patches of {'×'.join(map(str, PATCH))} voxels, "
        f"{before['seconds']:.0f} s). It is then the encoder of `unetr_channelwise` "
        f"({result['segmentation']['arguments']}), trained on {protocol['labelled']} labelled volumes for "
        f"{protocol['epochs']} epochs and tested on {tested} volumes, always the same. {len(protocol['seeds'])} draws "
        "of labelled volumes, without overlap, each with a random encoder of its own. No case serves twice. Learning "
        f"rate {result['settings']['learning_rate']} throughout. {result['machine']['cores']} cores, "
        f"{result['machine']['device']}; {versions_}."
    )
    made_of = (
        "Root mean square of the tapped states of the test scans, before they are normed: what all tokens share, what "
        "those of one scan share beyond it, and the rest; how many directions the last two span; and how well a linear "
        "map of the normed states tells where in the image a token is (R²)."
    )
    lines = [
        "# An encoder from scans without labels, and ten labelled cases",
        "",
        "Made by `examples/masked_pretraining.py`; every number and the cases' names are in the JSON beside this page.",
        "",
        setting,
        "",
        "## With ten labelled cases",
        "",
        *table(result["rows"]),
        "",
        f"Dice: mean over {tested} cases and both labels; SD over draws. " + gain(result["rows"]),
        "",
        "## Telling hidden patches",
        "",
        f"Mean squared error over masked patches in the middle of the {tested} test scans, each patch normalised:",
        "",
        "| prediction | error |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in before["errors_on_test_scans"].items()),
        "",
        "Mean training loss (patches from anywhere, augmented): "
        + ", ".join(f"epoch {place + 1}: {curve[place]:.3f}" for place in shown)
        + ".",
        "",
        "![Input, visible patches and reconstruction of four scans](masked_pretraining.png)",
        "",
        "## What the decoder is given",
        "",
        made_of,
        "",
        "| encoder | tap | common | scan | token | directions | place |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {tap} | {row['common']:.2f} | {row['scan']:.2f} | {row['token']:.2f} "
            f"| {row['directions']:.1f} | {row['place']:.2f} |"
            for name, rows in result["states"].items()
            for tap, row in enumerate(rows, start=1)
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
