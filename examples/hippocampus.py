"""Real scans: pre-train on one half of the hippocampus, adapt to the other from ten cases, compare adaptations.

A U-Net learns the anterior hippocampus (label 1) from 60 MRI volumes. It is then adapted to the posterior part
(label 2) from 10 other volumes, once per adaptation, and each result is tested on the same 40 further volumes. No case
serves twice.

    python examples/hippocampus.py --data ../shared/data/hippocampus/dataset.json

Writes `results.json` (every number, the cases, seed, versions, cores) and `results.md`, and prints one table. A run
goes on where it was stopped: what is finished in `--out` is not done again.
"""

import argparse
import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from segraft.adapters import AdapterSpec, read_header
from segraft.atomic import replacing
from segraft.evaluation.results import mean_sd
from segraft.jobs import adapt, evaluate, pretrain
from segraft.jobs.run_folder import versions
from segraft.networks import read_base
from segraft.training.settings import TrainingSettings
from segraft.training.strategies import selectors

ADAPTATIONS = {
    "head": ("none", "head"),
    "decoder": ("none", "decoder"),
    "full": ("none", "full"),
    **{name: (name, "none") for name in ("lora_c", "conv_lora", "cp_lora", "dora_c", "conv_dora", "cp_dora")},
    "none": ("none", "none"),  # the base as it is; last, as it is tested on the cases that the others leave
}
"""Row -> (adapter method, strategy)."""
RATE = 3e-3
"""Learning rate of every training."""
CASES = {"pretrain": 60, "adapt": 10, "test": 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset.json of the Decathlon's Task04_Hippocampus")
    parser.add_argument("--out", type=Path, default=Path("examples/out/hippocampus"))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--pretrain-epochs", type=int, default=40)
    parser.add_argument("--adapt-epochs", type=int, default=60)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    console = Console(stderr=True)

    asked = {name: value for name, value in vars(arguments).items() if name not in ("data", "out", "device")}
    settings = arguments.out / "settings.json"
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8")) != asked:
        raise SystemExit(f"{arguments.out} was started with {settings.read_text()}: use the same, or another --out.")
    with replacing(settings) as aside:
        aside.write_text(json.dumps(asked), encoding="utf-8")

    base_folder = arguments.out / "base"
    if not (base_folder / "base.safetensors").is_file():
        pretrain(
            arguments.data,
            base_folder,
            network="unet3d",
            network_arguments={"widths": arguments.widths},
            labels=["1"],
            cases=CASES["pretrain"],
            settings=TrainingSettings(
                epochs=arguments.pretrain_epochs,
                volumes=4,
                patches=1,
                learning_rate=RATE,
                seed=arguments.seed,
                device=arguments.device,
            ),
            resume=(base_folder / "last.ckpt").is_file(),
            console=console,
        )
    base = read_base(base_folder)

    rows, cases = [], {"pretrain": sorted(base.record["cases"])}
    for name, (method, strategy) in ADAPTATIONS.items():
        run = arguments.out / name
        rows.append(row := one(name, method, strategy, run, cases.get("test"), arguments, console))
        for purpose in ("adapt", "test"):
            found = row.pop(f"{purpose}_cases")
            if found and cases.setdefault(purpose, found) != found:
                raise SystemExit(f"{run}: its {purpose} cases are not those of the others; start with a new --out.")
    served = [case for purpose in CASES for case in cases[purpose]]
    if not len(served) == len(set(served)) == sum(CASES.values()):
        raise SystemExit("a case serves twice; start with a new --out.")

    result = {
        "what": "Hippocampus: pre-trained on the anterior part (label 1), adapted to the posterior part (label 2)",
        "network": {"name": base.network, "arguments": base.arguments, "fingerprint": base.fingerprint},
        "rank": arguments.rank,
        "seed": arguments.seed,
        "settings": {
            "pretrain": base.record["settings"],
            "adapt_epochs": arguments.adapt_epochs,
            "learning_rate": RATE,
        },
        "patch": base.record["preparation"]["patch"],
        "pretrain_seconds": base.record["training"]["seconds"],
        "machine": {"cores": os.cpu_count(), "device": base.record["training"]["device"]},
        "versions": versions(),
        "cases": cases,
        "rows": rows,
    }
    with replacing(arguments.out / "results.json") as aside:
        aside.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    markdown = markdown_of(result)
    with replacing(arguments.out / "results.md") as aside:
        aside.write_text(markdown, encoding="utf-8")
    show(rows)
    print(arguments.out / "results.json", arguments.out / "results.md", sep="\n")


def one(
    name: str,
    method: str,
    strategy: str,
    run: Path,
    test_cases: list[str] | None,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, object]:
    """Adapt (nothing, for `none`) and test."""
    model = arguments.out / "base" if name == "none" else run / "adapter.safetensors"
    if name != "none" and not model.is_file():
        adapt(
            arguments.out / "base",
            arguments.data,
            run,
            spec=AdapterSpec(method, rank=arguments.rank, train=selectors([strategy])),
            labels=["2"],
            shots=CASES["adapt"],
            settings=TrainingSettings(
                epochs=arguments.adapt_epochs,
                volumes=2,
                patches=1,
                learning_rate=RATE,
                seed=arguments.seed,
                device=arguments.device,
            ),
            resume=(run / "last.ckpt").is_file(),
            console=console,
        )
    record = read_header(model).record if name != "none" else {}
    if not (run / "evaluation.json").is_file():
        evaluate(
            model,
            arguments.data,
            out=run,
            labels=["2"],
            cases=test_cases or CASES["test"],
            seed=arguments.seed,
            device=arguments.device,
            console=console,
        )
    tested = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    results = tested["cases"]
    return {
        "adaptation": name,
        "method": method,
        "strategy": strategy,
        "dice": [each["dice"] for each in results],
        "hausdorff95_mm": [each["hausdorff95_mm"] for each in results],
        "trainable_parameters": record.get("trainable_parameters", 0),
        "file_bytes": model.stat().st_size if name != "none" else 0,
        "epochs": len(record["training"]["losses"]) if record else 0,
        "seconds": record["training"]["seconds"] if record else 0.0,
        "adapt_cases": sorted(record.get("cases", {})),
        "test_cases": [each["case"] for each in results],
    }


COLUMNS = ("adaptation", "Dice, mean (SD)", "HD95 mm, mean (SD)", "trained", "file", "epochs", "seconds")


def cells(rows: list[dict[str, object]]) -> list[tuple[str, ...]]:
    """The table, best last."""
    return [
        (
            row["adaptation"],
            mean_sd(row["dice"]),
            mean_sd(row["hausdorff95_mm"], digits=2),
            f"{row['trainable_parameters']:,}",
            f"{row['file_bytes'] / 1000:,.0f} kB",
            str(row["epochs"]),
            f"{row['seconds']:.0f}",
        )
        for row in sorted(rows, key=lambda row: sum(row["dice"]))
    ]


def show(rows: list[dict[str, object]]) -> None:
    """The table on screen."""
    table = Table(*COLUMNS)
    for row in cells(rows):
        table.add_row(*row)
    Console().print(table)


def markdown_of(result: dict[str, object]) -> str:
    """The table as a page, with what it was made with."""
    sizes = ", ".join(f"{len(cases)} to {purpose}" for purpose, cases in result["cases"].items())
    network, machine, made_with = result["network"], result["machine"], result["versions"]
    lines = [
        "# Hippocampus: from the anterior to the posterior part",
        "",
        "Made by `examples/hippocampus.py`; every number and the names of the cases are in the JSON beside this page.",
        "",
        f"{result['what']}. Cases: {sizes}; none serves twice. Network: {network['name']}, {network['arguments']}; "
        f"patch {result['patch']}; rank {result['rank']}; seed {result['seed']}; learning rate "
        f"{result['settings']['learning_rate']}; pre-training {result['pretrain_seconds']:.0f} s. "
        f"{machine['cores']} cores, {machine['device']}; "
        + ", ".join(f"{name} {version}" for name, version in made_with.items())
        + ".",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in cells(result["rows"])),
        "",
        "One seed and one split: differences smaller than the spread between cases say little.",
        "Seconds are those of the training alone.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
