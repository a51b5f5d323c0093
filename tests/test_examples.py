"""The examples on real scans, in their quick versions: they run to the end and write what they say."""

import importlib.util
import json
import sys
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, monkeypatch, *arguments: object):
    """An example's `main`, as from the command line; its module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    module.main()
    return module


@pytest.mark.data
def test_masked_pretraining(real_data, tmp_path, monkeypatch, capsys):
    out, results = tmp_path / "out", tmp_path / "results"
    given = ("--data", real_data / "hippocampus" / "dataset.json", "--out", out, "--results", results)
    example = run("masked_pretraining", monkeypatch, *given, "--device", "cpu", "--quick")
    found = json.loads((results / "masked_pretraining.json").read_text())
    groups = [found["cases"]["unlabelled"], *found["cases"]["labelled"].values(), found["cases"]["test"]]
    served = [case for group in groups for case in group]
    assert len(set(served)) == len(served) == 6 + 2 + 2
    assert {(row["encoder"], row["trained"]) for row in found["rows"]} == {(a.encoder, a.trained) for a in example.ARMS}
    assert len(found["rows"]) == 6
    by_arm = {(row["encoder"], row["trained"]): row for row in found["rows"]}
    for (encoder, trained), row in by_arm.items():
        assert all(len(values) == 2 for values in row["dice"].values())
        assert row["trainable_parameters"] == by_arm["random", trained]["trainable_parameters"], encoder
    errors = found["pretraining"]["errors_on_test_scans"]
    assert errors["the mean of each patch"] == pytest.approx(1, abs=0.01)
    assert (
        errors["the mean over the scans of the pre-training, at each place"] < 1 < errors["the nearest visible patch"]
    )
    assert len(found["states"]["pre-trained"]) == 3
    assert "| decoder | pre-trained |" in (results / "masked_pretraining.md").read_text()
    assert "| decoder | pre-trained |" in capsys.readouterr().out
    assert matplotlib.image.imread(results / "masked_pretraining.png").ndim == 3
    with pytest.raises(SystemExit, match="use another --out"):
        run("masked_pretraining", monkeypatch, *given)


def test_copies_of_the_nearest_visible_patch(monkeypatch):
    """Four patches in a row, of which the first and the last are seen."""
    import torch

    from segraft.networks.mae import MaskedAutoencoder

    monkeypatch.setattr(sys, "argv", ["masked_pretraining", "--help"])
    with pytest.raises(SystemExit):
        run("masked_pretraining", monkeypatch, "--help")
    example = sys.modules["example_masked_pretraining"]
    net = MaskedAutoencoder(img_size=(16, 4, 4), patch_size=4, hidden_size=12, mlp_dim=12, num_layers=1, num_heads=1)
    targets = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 64)
    copied = example.nearest_visible(targets, torch.tensor([[False, True, True, False]]), net)
    assert copied[0, :, 0].tolist() == [0, 0, 3, 3]


@pytest.mark.data
def test_open_ms(real_data, tmp_path, monkeypatch):
    if not (real_data / "open_ms").is_dir():
        pytest.skip("no scans of multiple sclerosis")
    run("open_ms", monkeypatch, "--data", real_data / "open_ms", "--results", tmp_path, "--quick")
    found = json.loads((tmp_path / "open_ms.json").read_text())
    assert set(found["dice"]) == {"the training patient", "the unseen patient", "the unseen patient without T1c"}
    assert all(0 <= value <= 1 for value in found["dice"].values())
    assert len(found["commands"]) == 5
    assert all(row["seconds"] > 0 and 0.1 < row["peak_gib"] < 24 for row in found["commands"].values())
    assert "nothing of how well" in found["what"]
