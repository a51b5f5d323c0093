"""Options that do not fit: one sentence with the cure, and nothing is written."""

import pytest
import torch


@pytest.fixture
def adapt(refused, work, tmp_path):
    """adapt(option, …, says=[…]): an adaptation with these options is refused."""

    def check(*more, says):
        return refused(
            *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "2"),
            *("--epochs", "1", "--device", "cpu", "--out", tmp_path / "run", *more),
            says=says,
        )

    return check


@pytest.fixture
def pretrain(refused, work, tmp_path):
    """pretrain(option, …, says=[…])."""

    def check(*more, says):
        return refused(
            *("pretrain", "--data", work / "D", "--labels", "1", "--cases", "2", "--epochs", "1", "--device", "cpu"),
            *("--out", tmp_path / "base", *more),
            says=says,
        )

    return check


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "magic"), ["magic", "dora_c"]),
        (("--method", "none"), ["nothing", "train"]),
        (("--targets", "attic"), ["attic", "decoder"]),
        (("--targets", r"encoder\.[0"), ["encoder", "not a valid regular expression"]),
        (("--targets", r"nowhere\..*"), ["nowhere", "decoder"]),
        (("--exclude", "attic"), ["attic", "decoder"]),
        (("--train", "attic"), ["attic", "decoder"]),
        (("--train", "shallow"), ["shallow", "UNet", "decoder"]),
        (("--recompute", "attic"), ["attic", "decoder"]),
        (("--recompute", "decoder", "--recompute", r"encoder\.[0"), ["encoder", "not a valid regular expression"]),
        (("--rank", "0"), ["rank", "0", "at least 1"]),
        (("--rank", "-3"), ["rank", "-3", "at least 1"]),
        (("--alpha", "0"), ["alpha"]),
        (("--bias", "loud"), ["loud", "low_rank"]),
        (("--loss", "regret"), ["loss", "regret", "dice_ce"]),
        (("--learning-rate", "0"), ["learning_rate"]),
        (("--window", "250", "-175"), ["window", "250", "-175"]),
        (("--window", "9000", "9100"), ["9000", ".nii.gz"]),
        (("--percentiles", "60", "40"), ["60", "40"]),
        (("--window", "0", "1", "--percentiles", "1", "99"), ["--window", "--percentiles"]),
        (("--orientation", "RAT"), ["RAT"]),
        (("--spacing", "1", "0", "1"), ["spacing"]),
        (("--patch", "15", "16", "16"), ["15", "multiples of 2", "patch"]),
        (("--patch", "16", "16", "1"), ["patch"]),
        (("--patch", "16", "16", "-4"), ["patch", "-4"]),
        (("--labels", "liver"), ["liver", "1 (core)", "2 (rim)", "dataset.json"]),
        (("--labels", "1", "--exclude", "head"), ["rim", "--train head"]),
        (("--labels", "rim"), ["asked for twice"]),
        (("--shots", "0"), ["0", "at least 1"]),
        (("--patient-pattern", "p("), ["p("]),
        (("--patient-pattern", "x(.)"), ["x(.)", "dataset.json"]),
        (("--base", "no/where"), ["no/where", "segraft pretrain"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_adapt(adapt, options, says):
    adapt(*options, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--network", "vnet"), ["vnet", "unet3d"]),
        (("--network", "no.such.package:Net"), ["no.such.package"]),
        (("--network", "monai.networks.nets:NoNet"), ["NoNet"]),
        (("--network-args", "{widths}"), ["--network-args", "JSON"]),
        (("--network-args", "[1]"), ["--network-args", "object"]),
        (("--network-args", '{"wdiths": [4, 8]}'), ["wdiths"]),
        (("--network-args", '{"widths": [4]}'), ["widths"]),
        (("--network-args", '{"widths": "broad"}'), ["widths"]),
        (("--network-args", '{"widths": [4, 8], "out_channels": 3}'), ["one logit per label"]),
        (("--network-args", '{"widths": [4, 8], "in_channels": 2}'), ["channel"]),
        (("--network", "unet", "--network-args", '{"widths": [4, 8]}', "--patch", "16", "16", "16"), ["patch"]),
        (("--network", "monai.networks.nets:SegResNet", "--patch", "7", "7", "7"), ["SegResNet", "7 7 7"]),
        (("--recompute", "attic"), ["attic", "decoder"]),
        (("--cases", "9"), ["9", "8"]),
        (("--cases", "0"), ["at least 1"]),
        (("--weights", "no/weights.pt"), ["no/weights.pt"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_pretrain(pretrain, options, says):
    pretrain(*options, says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
class TestNoGpu:
    SAYS = ("cuda", "--device cpu")

    def test_pretrain(self, pretrain):
        pretrain("--device", "cuda", says=self.SAYS)

    def test_adapt(self, adapt):
        adapt("--device", "cuda", says=self.SAYS)

    def test_predict(self, refused, work, tmp_path):
        scan = work / "D" / "imagesTr" / "p0.nii.gz"
        refused("predict", work / "run", scan, "-o", tmp_path / "m.nii", "--device", "cuda", says=self.SAYS)

    def test_evaluate(self, refused, work, tmp_path):
        arguments = ("--data", work / "D", "--out", tmp_path / "s", "--device", "cuda")
        refused("evaluate", work / "run", *arguments, says=self.SAYS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--paper", "nature"), ["nature", "sah"]),
        (("--paper", "sah", "--rank", "0"), ["rank", "0"]),
        (("--network", "vnet"), ["vnet"]),
        (("--targets", "attic"), ["attic"]),
    ],
)
def test_params(refused, options, says):
    refused("params", *options, says=says)


@pytest.mark.parametrize("arguments", [["--epochs", "many"], ["--device", "abacus"], ["--patch", "16"], ["--no-such"]])
def test_what_the_parser_refuses_ends_with_2_and_without_traceback(segraft, work, tmp_path, arguments):
    outcome = segraft("pretrain", "--data", work / "D", "--out", tmp_path / "base", *arguments)
    assert outcome.code == 2
    assert arguments[0] in outcome.err
    assert outcome.err.startswith("segraft: ")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "base").exists()


def test_a_file_where_the_run_folder_should_be(adapt, tmp_path):
    (tmp_path / "taken").write_text("")
    adapt("--out", tmp_path / "taken" / "run", says=[tmp_path / "taken"])


def test_network_arguments_without_weights(refused, work, tmp_path):
    refused(
        *("adapt", "--base", work / "base", "--data", work / "D", "--labels", "2", "--shots", "2"),
        *("--network-args", '{"widths": [4]}', "--out", tmp_path / "run"),
        says=["--weights"],
    )


def test_the_demo_does_not_replace_a_base_of_the_users(refused, work, tmp_path):
    (tmp_path / "base").mkdir()
    refused("demo", "--out", tmp_path, says=["choose another --out"])
