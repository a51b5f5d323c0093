"""Files of others name networks: which of them are built."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from segraft.errors import SegraftError
from segraft.networks import build, load_base, save_base, trust
from segraft.networks.trusted import VARIABLE, require_trusted, trust_asked

ARGUMENTS = {"in_channels": 1, "out_channels": 1, "widths": [2, 4]}


@pytest.fixture(autouse=True)
def _nothing_trusted(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


@pytest.fixture
def named(tmp_path):
    """named(network, arguments): a base file whose header was changed to name that."""

    def make(network, arguments):
        net = build("unet", in_channels=1, out_channels=1, arguments={"widths": [2, 4]})
        base = save_base(net, tmp_path, network="unet", arguments=ARGUMENTS)
        header = {"format": 1, "version": "1", "network": network, "fingerprint": base.fingerprint, "record": {}}
        header["arguments"] = {"in_channels": 1, "out_channels": 1, **arguments}
        save_file(load_file(base.path), base.path, metadata={"segraft_base": json.dumps(header)})
        return base.path

    return make


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package that notes when it is imported: mine_somewhere.nets:Net."""
    package = tmp_path / "site" / "mine_somewhere"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    ran = tmp_path / "ran"
    text = f"open({str(ran)!r}, 'w').close()\nfrom segraft.networks import UNet\nclass Net(UNet): pass\n"
    (package / "nets.py").write_text(text)
    monkeypatch.syspath_prepend(str(package.parent))
    yield ran
    for name in [name for name in sys.modules if name.startswith("mine_somewhere")]:
        del sys.modules[name]


@pytest.mark.parametrize("network", ["subprocess:Popen", "this:x", "torch.nn:Linear", "monai.losses:DiceLoss"])
def test_other_packages_are_refused(named, network):
    path = named(network, {})
    with pytest.raises(SegraftError, match="names the network") as error:
        load_base(path)
    assert str(path) in str(error.value)
    assert "--trust" in str(error.value)
    assert VARIABLE in str(error.value)


@pytest.mark.parametrize("network", ["a b:c", ":", "a.b:c:d", "monai.networks.nets::UNet", "x:y\nFAKE: run this"])
def test_what_is_no_path_is_not_repeated_as_a_command(named, network):
    with pytest.raises(SegraftError, match=r"is no 'package\.module:Class'") as error:
        load_base(named(network, {}))
    assert "--trust" not in str(error.value)


def test_nothing_is_imported_before(named, mine):
    path = named("mine_somewhere.nets:Net", {"widths": [2, 4]})
    with pytest.raises(SegraftError, match="--trust mine_somewhere or set SEGRAFT_TRUST=mine_somewhere"):
        load_base(path)
    assert not mine.exists()


@pytest.mark.parametrize("name", ["mine_somewhere", "mine_somewhere.nets", "mine_somewhere.nets:Net"])
def test_what_the_user_vouches_for_is_built(named, mine, monkeypatch, name):
    monkeypatch.setenv(VARIABLE, "other_package")
    trust(name)
    net, _ = load_base(named("mine_somewhere.nets:Net", {"widths": [2, 4]}))
    assert type(net).__name__ == "Net"


def test_by_the_environment(named, mine, monkeypatch):
    path = named("mine_somewhere.nets:Net", {"widths": [2, 4]})
    for value in ("mine", "mine_somewhere.net", "mine_somewhere.nets:Other"):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(SegraftError, match="--trust"):
            load_base(path)
    monkeypatch.setenv(VARIABLE, "other, mine_somewhere")
    load_base(path)


def test_what_was_asked_for_by_its_path_is_that_class_alone(named, mine):
    trust_asked("mine_somewhere.nets:Net")
    trust_asked("monai.networks.nets:HoVerNet")  # which files may name anyway, with plain arguments
    load_base(named("mine_somewhere.nets:Net", {"widths": [2, 4]}))
    with pytest.raises(SegraftError, match="--trust"):
        require_trusted("mine_somewhere.nets:UNet2", {}, "file")
    with pytest.raises(SegraftError, match="pretrained_url"):
        require_trusted("monai.networks.nets:HoVerNet", {"pretrained_url": "x"}, "file")


@pytest.mark.parametrize(
    ("network", "arguments", "named_argument"),
    [
        ("monai.networks.nets.hovernet:HoVerNet", {"pretrained_url": "http://x/y"}, "pretrained_url"),
        ("monai.networks.nets:DenseNet121", {"spatial_dims": 2, "pretrained": True}, "pretrained"),
        ("monai.networks.nets:EfficientNetBN", {"model_name": "efficientnet-b0"}, "pretrained"),  # by default
        ("monai.networks.nets:SegResNet", {"act": ["RELU", {"where": "../x"}]}, "where"),
        ("segraft.networks.outputs:OutputsOnTop", {"network": "unet", "outputs": 1, "more": "~/x"}, "more"),
    ],
)
def test_arguments_that_reach_out_are_refused(network, arguments, named_argument):
    with pytest.raises(SegraftError, match=f"with {named_argument} .*--trust {network} or set"):
        require_trusted(network, arguments, "file")
    trust(network)
    require_trusted(network, arguments, "file")


@pytest.mark.parametrize(
    "network",
    [
        "monai.networks.nets:TorchVisionFCModel",
        "monai.networks.nets.transchex:Transchex",
        "monai.networks.nets.cell_sam_wrapper:CellSamWrapper",
        "monai.networks.nets.unet:nn",
        "monai.networks.nets.unet:Convolution",  # of another package, imported there
        "monai.networks.netsx:UNet",
    ],
)
def test_classes_of_those_packages_that_are_not_built(network):
    with pytest.raises(SegraftError, match="names the network"):
        require_trusted(network, {}, "file")


def test_a_network_within_one_of_ours():
    within = {"network": "mine.nets:Net", "outputs": 2, "arguments": {}}
    with pytest.raises(SegraftError, match=r"'mine\.nets:Net'"):
        require_trusted("segraft.networks.outputs:OutputsOnTop", within, "file")
    within = {"network": "monai.networks.nets:DenseNet121", "outputs": 2, "arguments": {"pretrained": True}}
    with pytest.raises(SegraftError, match="pretrained"):
        require_trusted("segraft.networks.outputs:OutputsOnTop", within, "file")


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("unet", ARGUMENTS),
        ("monai.networks.nets:SegResNet", {"norm": ["GROUP", {"num_groups": 8}], "upsample_mode": "nontrainable"}),
        ("monai.networks.nets.swin_unetr:SwinUNETR", {"feature_size": 12}),
        ("monai.networks.nets:EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False}),
        ("segraft.networks.swin:OriginalSwinUNETR", {"feature_size": 12}),
        (
            "segraft.networks.outputs:OutputsOnTop",
            {"network": "monai.networks.nets:UNet", "outputs": 2, "arguments": {"norm": "batch"}},
        ),
        ("dynamic_network_architectures.architectures.unet:PlainConvUNet", {"n_stages": 3}),
    ],
)
def test_built_without_a_word(network, arguments):
    require_trusted(network, arguments, "file")


@pytest.mark.parametrize("name", ["", "a b", "a:b:c", "../x", "a.b:"])
def test_what_is_no_package(name):
    with pytest.raises(SegraftError, match="no package to trust"):
        trust(name)


def test_an_adapter_that_names_its_network(named, tmp_path, monkeypatch):
    """Whose base is a file of weights: the network is built as the adapter's record says."""
    import segraft
    from segraft.jobs import load_model

    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    segraft.graft(net, segraft.AdapterSpec("lora", rank=1))
    base = {"network": "subprocess:Popen", "arguments": {"args": ["true"]}, "path": "w.pt"}
    path = segraft.save(net, tmp_path / "adapter.safetensors", record={"base": base})
    with pytest.raises(SegraftError, match="--trust subprocess"):
        load_model(path)
