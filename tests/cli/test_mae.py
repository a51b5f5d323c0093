"""`segraft pretrain --mae`: an encoder from scans without labels, and what becomes of it."""

import json

import pytest
from safetensors.torch import load_file

from segraft.data.cohort import Cohort
from segraft.jobs.cases import Served, served_cases
from segraft.networks import read_base
from segraft.training.callbacks import EpochCheckpoint

SIZES = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
NETWORK = json.dumps({"patch_size": 4, "num_layers": 2, "decoder_layers": 1, **SIZES})
UNETR = ("--base", "monai.networks.nets.unetr:UNETR")
UNETR_ARGUMENTS = ("--network-args", json.dumps({"img_size": [16, 16, 16], "feature_size": 4, **SIZES}))


@pytest.fixture(scope="module")
def unlabelled(make_cohort, tmp_path_factory):
    """A list of four scans whose labels it does not name."""
    folder = make_cohort(tmp_path_factory.mktemp("unlabelled"), [f"u{number}" for number in range(4)], seed=9)
    images = [f"imagesTr/u{number}.nii.gz" for number in range(4)]
    (folder / "unlabelled.json").write_text(json.dumps({"name": "Unlabelled", "unlabelled": images}))
    return folder / "unlabelled.json"


@pytest.fixture
def pretrain(segraft, unlabelled, tmp_path):
    """pretrain(out, *more): a short masked pre-training."""

    def run(out, *more):
        return segraft(
            *("pretrain", "--mae", "--network", "vit_small", "--network-args", NETWORK, "--data", unlabelled),
            *("--epochs", 3, "--device", "cpu", "--out", tmp_path / out, *more),
        )

    return run


@pytest.fixture(scope="module")
def encoder(segraft, unlabelled, tmp_path_factory):
    """The folder of an encoder as MONAI's UNETR has it: patches of 16 voxels, twelve blocks."""
    folder = tmp_path_factory.mktemp("encoder")
    arguments = json.dumps({"img_size": [32, 16, 16], "decoder_layers": 1, **SIZES})
    made = segraft(
        *("pretrain", "--mae", "--network", "vit_small", "--network-args", arguments, "--data", unlabelled),
        *("--mask", "0.5", "--epochs", 1, "--device", "cpu", "--out", folder / "encoder"),
    )
    assert made.code == 0, made.err
    return folder / "encoder"


def tensors(folder):
    return {key: value.numpy().tobytes() for key, value in load_file(folder / "base.safetensors").items()}


def test_json_has_the_losses(pretrain, tmp_path):
    made = pretrain("encoder", "--patch", 16, 16, 16, "--json")
    assert made.code == 0, made.err
    result = made.json
    assert len(result["training"]["losses"]) == 3
    assert result["img_size"] == [16, 16, 16]
    assert result["cases"] == ["u0", "u1", "u2", "u3"]
    assert set(result["reconstruction"]) == {"scans", "before", "after", "zero", "place"}
    assert {path.name for path in (tmp_path / "encoder").iterdir()} == {
        "base.safetensors",
        "reconstruction.png",
        "run.json",
    }


def test_two_lines_say_what_was_made(pretrain):
    made = pretrain("encoder", "--patch", 16, 16, 16)
    first, second = made.out.splitlines()
    assert "base.safetensors: encoder of 16×16×16 voxels" in first
    assert "4 scans" in first
    assert "reconstruction.png: squared error over masked patches in the middle of 4 scans" in second


def test_options_of_the_training_arrive(pretrain, tmp_path):
    options = ("--mask", 0.5, "--warm-up", 0.2, "--weight-decay", 0.1, "--no-flip", "--volumes", 1, "--patches", 3)
    made = pretrain("encoder", "--seed", 4, *options)
    assert made.code == 0, made.err
    asked = json.loads((tmp_path / "encoder" / "run.json").read_text())["settings"]
    wanted = {"mask": 0.5, "warm_up": 0.2, "weight_decay": 0.1, "flip": False, "volumes": 1, "patches": 3, "seed": 4}
    assert {name: asked[name] for name in wanted} == wanted


def test_the_same_seed_gives_the_same_bytes(pretrain, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert pretrain(out, "--seed", seed).code == 0
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    assert tensors(tmp_path / "a") != tensors(tmp_path / "c")
    pictures = [(tmp_path / out / "reconstruction.png").read_bytes() for out in "abc"]
    assert pictures[0] == pictures[1]


def test_a_resumed_pretraining_ends_as_if_it_had_not_stopped(pretrain, monkeypatch, tmp_path):
    assert pretrain("whole").code == 0
    original = EpochCheckpoint.on_train_epoch_end

    def stop(self, trainer, pl_module):
        original(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            raise RuntimeError("the power went")

    with monkeypatch.context() as patched:
        patched.setattr(EpochCheckpoint, "on_train_epoch_end", stop)
        with pytest.raises(RuntimeError, match="the power went"):
            pretrain("parts")
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"last.ckpt", "run.json"}
    other = pretrain("parts", "--resume", "--mask", 0.5)
    assert (other.code, "settings.mask" in other.err) == (2, True)
    assert pretrain("parts", "--resume").code == 0
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    assert (tmp_path / "parts" / "reconstruction.png").read_bytes() == (
        tmp_path / "whole" / "reconstruction.png"
    ).read_bytes()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--labels", "1"), ["--mae does not look at labels", "leave --labels out"]),
        (("--loss", "overlap"), ["loss is about labels"]),
        (("--foreground", "0.5"), ["foreground is about labels"]),
        (("--contrast-copies", "2"), ["contrast_copies is about labels"]),
        (("--schedule", "onecycle"), ["onecycle has a rise of its own"]),
        (("--mask", "1"), ["mask", "less than 1"]),
        (("--patch", "16", "16", "1"), ["cannot be cut into patches"]),
        (("--network", "unet3d", "--network-args", "{}"), ["unet3d", "no masked auto-encoder"]),
    ],
)
def test_what_does_not_go_with_masking_is_refused(refused, unlabelled, tmp_path, more, says):
    refused(
        *("pretrain", "--mae", "--network", "vit_small", "--network-args", NETWORK, "--data", unlabelled),
        *("--device", "cpu", "--out", tmp_path / "out", *more),
        says=says,
    )


@pytest.mark.parametrize("option", ["--mask", "--warm-up"])
def test_its_options_go_with_it_alone(refused, work, tmp_path, option):
    refused("pretrain", "--data", work / "D", "--out", tmp_path / "out", option, "0.5", says=[option, "--mae"])


def test_without_it_labels_are_needed(refused, unlabelled, tmp_path):
    refused("pretrain", "--data", unlabelled, "--out", tmp_path / "out", says=["unlabelled.json"])


def test_an_encoder_alone_is_not_adapted(refused, encoder, work, tmp_path):
    refused(
        *("adapt", "--base", encoder, "--data", work / "D", "--labels", "1", "--out", tmp_path / "run"),
        says=["segments nothing by itself", "--weights", '"img_size": [32, 16, 16]'],
    )


def test_nor_does_it_predict(refused, encoder, work, tmp_path):
    image = work / "D" / "imagesTr" / "p0.nii.gz"
    refused("predict", encoder, image, "-o", tmp_path / "mask.nii.gz", says=["segments nothing by itself"])


def test_a_unetr_takes_its_encoder_and_is_adapted(segraft, encoder, work, tmp_path):
    arguments = json.dumps({"img_size": [32, 16, 16], "feature_size": 4, **SIZES})
    made = segraft(
        *("adapt", *UNETR, "--weights", encoder, "--network-args", arguments, "--data", work / "D", "--labels", "1"),
        *("--patch", 32, 16, 16, "--shots", 3, "--method", "lora_c", "--rank", 2, "--targets", "encoder"),
        *("--train", "decoder", "--epochs", 1, "--device", "cpu", "--out", tmp_path / "run"),
    )
    assert made.code == 0, made.err
    assert "the decoder starts at random" in made.err + made.out
    image = work / "D" / "imagesTr" / "p0.nii.gz"
    found = segraft("predict", tmp_path / "run", image, "-o", tmp_path / "mask.nii.gz", "--device", "cpu")
    assert found.code == 0, found.err
    assert (tmp_path / "mask.nii.gz").is_file()


def test_weights_of_another_size_are_refused(refused, encoder, work, tmp_path):
    refused(
        *("adapt", *UNETR, "--weights", encoder, *UNETR_ARGUMENTS, "--data", work / "D", "--labels", "1"),
        *("--device", "cpu", "--out", tmp_path / "run"),
        says=["img size 32×16×16, this network 16×16×16", '"img_size": [32, 16, 16]'],
    )


@pytest.fixture(scope="module")
def known(make_cohort, unlabelled, tmp_path_factory):
    """A labelled cohort of eight: the four that the encoder saw, under other names, and four that it did not."""
    folder = make_cohort(tmp_path_factory.mktemp("known"), [f"k{number}" for number in range(8)], seed=31)
    for kind in ("imagesTr", "labelsTr"):
        for number in range(4):
            seen = unlabelled.parent / kind / f"u{number}.nii.gz"
            (folder / kind / f"k{number}.nii.gz").write_bytes(seen.read_bytes())
    return folder


@pytest.fixture(scope="module")
def on_encoder(segraft, encoder, known):
    """on_encoder(out, *more): an adapter on a UNETR with the encoder; its cases and notes."""

    def adapt(out, *more):
        arguments = json.dumps({"img_size": [32, 16, 16], "feature_size": 4, **SIZES})
        made = segraft(
            *("adapt", *UNETR, "--weights", encoder, "--network-args", arguments, "--data", known, "--labels", "1"),
            *("--patch", 32, 16, 16, "--method", "none", "--train", "decoder", "--epochs", 1, "--volumes", 4),
            *("--patches", 1, "--device", "cpu", "--out", out, "--json", *more),
        )
        assert made.code == 0, made.err
        return set(made.json["cases"]), " ".join(made.json["notes"])

    return adapt


NEW = {"k4", "k5", "k6", "k7"}


def test_what_the_encoder_saw_is_drawn_and_measured_last(on_encoder, segraft, known, tmp_path):
    adapted, notes = on_encoder(tmp_path / "run", "--shots", 2)
    assert adapted < NEW
    assert "4 cases of Toy pre-trained the base's encoder and are left out." in notes
    evaluate = ("evaluate", tmp_path / "run", "--data", known, "--device", "cpu", "--out", tmp_path, "--json")
    told = segraft(*evaluate).json["record"]
    assert set(told["cases"]) == NEW - adapted
    assert "4 cases of Toy pre-trained the base's encoder and are left out." in told["notes"]
    told = segraft(*evaluate, "--cases", 3).json["record"]
    assert "1 of the cases to evaluate on also pre-trained the base's encoder (without labels)" in told["notes"][-1]


def test_all_means_all_where_no_label_was_read(on_encoder, known, tmp_path):
    adapted, notes = on_encoder(tmp_path / "run")
    assert adapted == NEW | {"k0", "k1", "k2", "k3"}
    assert "encoder and are" not in notes


def test_an_imported_base_knows_what_its_encoder_saw(segraft, encoder, known, tmp_path):
    arguments = json.dumps({"img_size": [32, 16, 16], "feature_size": 4, **SIZES})
    made = segraft(
        *("import", encoder, "--network", UNETR[1], "--network-args", arguments, "--labels", "core"),
        *("--patch", 32, 16, 16, "--out", tmp_path / "base"),
    )
    assert made.code == 0, made.err
    assert Served.of(read_base(tmp_path / "base").record) == Served.by_weights(encoder)
    assert served_cases(Cohort.read(known), Served.by_weights(encoder)) == {"k0", "k1", "k2", "k3"}
