"""The page of a file on the Hub: what the record says, and nothing else."""

from pathlib import Path

import pytest
import yaml

from segraft.adapters import AdapterHeader, AdapterSpec
from segraft.exchange.front_matter import front_matter
from segraft.exchange.model_card import MARK, Published, adapter_card, base_card, by_hand
from segraft.networks import Base

RECORD = {
    "labels": {"1": "whole tumour", "2": "core"},
    "regions": {"1": [1, 2, 3], "2": [2, 3]},
    "channels": ["FLAIR", "T1 post"],
    "preparation": {
        "spacing": [1.0, 1.0, 2.5],
        "intensity": [{"kind": "window", "low": -100, "high": 240.5}, {"kind": "percentiles", "lower": 1, "upper": 99}],
        "patch": [96, 96, 32],
        "orientation": "RAS",
    },
    "base": {"network": "my.nets:Net", "arguments": {"in_channels": 2}, "path": "../x/weights.pt"},
    "settings": {"epochs": 100, "recompute": []},
    "training": {"losses": [1.5, 0.5, 0.25], "converged": True},
    "cases": {"Smith": "0" * 16, "Jones": "1" * 16},
    "dataset": "Saint Elsewhere",
    "versions": {"torch": "2.8"},
}


def card(record: dict, *, ranks: dict | None = None, spec: AdapterSpec | None = None, **published: object) -> str:
    spec = spec or AdapterSpec("conv_lora", rank=4, targets=("decoder", "a|b"))
    header = AdapterHeader(Path("a"), spec, "f" * 64, record, "9.9", {"x": (2, 3), "y": (5,)}, ranks or {})
    return adapter_card(header, Published("ward/tumour", 1234567, **published))  # type: ignore[arg-type]


def rows(text: str) -> dict[str, str]:
    cells = [line[2:-2].split(" | ", 1) for line in text.splitlines() if line.startswith("| ")]
    return {pair[0]: pair[1] for pair in cells}


def test_what_the_record_says():
    text = card(RECORD)
    found = rows(text)
    assert found["segments"] == "1: whole tumour, of values 1 + 2 + 3; 2: core, of values 2 + 3"
    assert found["base network"] == "`my.nets:Net(in_channels=2)`: a class of its maker, which must be installed"
    assert found["base's fingerprint"] == f"`{'f' * 64}`"
    assert found["method"] == "conv_lora: W = W0 + α/R · Σ B[o,R]·A[R,i,h,w] (Aleem et al. 2024)"
    assert (found["parameters"], found["bytes"], found["rank"]) == ("11", "1,234,567", "4")
    assert found["adapted"] == r"`decoder`, `a\|b`"
    assert found["trained on"] == "2 cases"
    assert found["spacing in mm"] == "1 × 1 × 2.5"
    assert found["intensities"] == "-100 becomes 0, 240.5 becomes 1; percentile 1 becomes 0, percentile 99 becomes 1"
    assert found["patch in voxels"] == "96 × 96 × 32"
    assert found["epochs trained"] == "3 (until it converged)"
    assert found["recompute"] == "none"
    assert "segraft predict run --channel FLAIR=scan1.nii.gz --channel 'T1 post=scan2.nii.gz' --base BASE -o" in text
    assert "`weights.pt` where it was trained" in found["base"]
    assert not any(secret in text for secret in ("Smith", "Jones", "Elsewhere", "0000", "../x"))


def test_nothing_is_said_of_what_the_record_does_not_hold():
    text = card({})
    assert "license" not in text
    assert "base_model" not in text
    assert not any(f"## {section}" in text for section in ("Preparation", "Evaluation", "Training"))
    assert rows(text)["trained on"] == rows(text)["segments"] == "not recorded"


def test_metadata():
    text = card(RECORD, license="cc-by-4.0", base_repository="ward/base")
    assert text.startswith("---\n")
    assert MARK in text
    assert front_matter(text) == {
        "library_name": "segraft",
        "pipeline_tag": "image-segmentation",
        "tags": ["segraft", "medical", "adapter", "conv_lora"],
        "base_model": "ward/base",
        "base_model_relation": "adapter",
        "license": "cc-by-4.0",
    }
    assert "--base BASE" not in text


def test_the_metadata_is_what_the_client_reads():
    from huggingface_hub import ModelCard

    data = ModelCard(card(RECORD, license="mit", base_repository="ward/base")).data
    assert (data.library_name, data.license, data.base_model) == ("segraft", "mit", "ward/base")


@pytest.mark.parametrize(
    "text", ["", "# no front", "---\nnot closed: 1\n", "---\n[: broken\n---\n", "---\n- list\n---\n"]
)
def test_pages_without_metadata(text):
    assert front_matter(text) == {}


def test_names_do_not_break_the_table():
    nasty = "a | b\n# c <script>`[x](y)&"
    text = card({"labels": {"1": nasty}, "settings": {"loss": nasty}})
    for cell in (rows(text)["segments"], rows(text)["loss"]):
        assert not set(cell) & set("|<`[\n")
    assert not any(line.startswith("# c") for line in text.splitlines())
    assert yaml.safe_load(text.split("---")[1])


def test_evaluation():
    row = {"n": 7, "dice_mean": 0.81239, "dice_sd": 0.061, "hausdorff95_mm_mean": 3.456, "hausdorff95_mm_sd": None}
    text = card(RECORD, evaluation={"core": row, "all": row | {"dice_mean": None}})
    assert "| core | 7 | 0.812 (0.06) | 3.46 (–) |" in text
    assert "| all labels | 7 | – | 3.46 (–) |" in text


def test_ranks_in_use():
    spec = AdapterSpec("arena", rank=8)
    found = rows(card(RECORD, spec=spec, ranks={"a": (3, 8), "b": (0, 8)}))
    assert found["rank"] == "8 at the start; 3 of 16 directions in use"
    assert found["scale"] == "α = 1"


def test_a_base():
    record = {"labels": {"1": "liver"}, "imported": {"weights": "x.pt", "layout": "BTCV"}}
    base = Base(Path("b"), "swin_unetr", {"in_channels": 1}, "e" * 64, record)
    text = base_card(base, Published("ward/base", 10))
    assert rows(text)["imported from"] == "weights made elsewhere (BTCV)"
    assert "segraft pull ward/base -o base\nsegraft adapt --base base" in text


def test_an_encoder():
    base = Base(Path("b"), "vit_small", {}, "e" * 64, {"encoder": {"prefix": "vit", "img_size": [32, 48, 32]}})
    text = base_card(base, Published("ward/encoder", 10))
    assert rows(text)["outputs"].startswith("none: it is an encoder")
    assert """--weights base --network-args '{"img_size": [32, 48, 32]}' --train decoder""" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", False),
        ("---\nlicense: mit\n---\n", False),
        ("---\nlicense: mit\n---", False),
        ("---\nlicense: mit\n---\n\n# Mine\n", True),
        ("# Mine", True),
        (f"---\nlicense: mit\n---\n{MARK}\n# Ours\n", False),
    ],
)
def test_pages_written_by_hand(text, wanted):
    assert by_hand(text) == wanted
