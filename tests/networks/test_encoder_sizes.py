"""An encoder file of another vision transformer with tensors of the same shapes, and what a file says of its sizes."""

import pytest

from segraft.adapters import fingerprint
from segraft.errors import SegraftError
from segraft.networks import build, load_checkpoint, save_base
from segraft.networks.encoder_files import encoder_record, fixed_size, vit_of, vit_of_base, with_sizes

VIT = {"patch_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_layers": 3, "num_heads": 2}
SIZE = (16, 24, 16)
ONE = {"in_channels": 1, "out_channels": 1}


def encoder(folder, **more):
    arguments = {**ONE, **VIT, "img_size": list(SIZE), "decoder_layers": 1, **more}
    net = build("vit_small", **ONE, arguments={key: value for key, value in arguments.items() if key not in ONE})
    save_base(net, folder, network="vit_small", arguments=arguments, record=encoder_record("vit", net.img_size))
    return folder


def unetr(channels=3, **more):
    arguments = {**VIT, "img_size": SIZE, "feature_size": 4, **more}
    return build("unetr_channelwise", in_channels=channels, out_channels=2, arguments=arguments)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"img_size": (24, 16, 16)}, r'img size 16×24×16, this network 24×16×16 .*\{"img_size": \[16, 24, 16\]\}'),
        ({"img_size": (96, 8, 8)}, "img size 16×24×16, this network 96×8×8"),
        ({"num_heads": 4}, r'num heads 2, this network 4 .give --network-args .\{"num_heads": 2\}'),
        ({"img_size": (24, 16, 16), "num_heads": 3}, r'\{"num_heads": 2, "img_size": \[16, 24, 16\]\}'),
        ({"qkv_bias": True}, r'qkv bias False, this network True .*"qkv_bias": false'),
        ({"patch_size": 4, "img_size": (8, 12, 8)}, r"patch size 8, this network 4"),
    ],
)
def test_another_transformer_of_the_same_shapes_is_refused(tmp_path, other, says):
    net = unetr(**other)
    before = fingerprint(net)
    with pytest.raises(SegraftError, match=says):
        load_checkpoint(net, encoder(tmp_path))
    assert fingerprint(net) == before
    load_checkpoint(unetr(), tmp_path)


def test_of_whole_networks_too(tmp_path):
    arguments = {**VIT, "img_size": list(SIZE), "feature_size": 4, "in_channels": 3, "out_channels": 2}
    base = save_base(unetr(), tmp_path, network="unetr_channelwise", arguments=arguments)
    with pytest.raises(SegraftError, match="img size 16×24×16, this network 24×16×16"):
        load_checkpoint(unetr(img_size=(24, 16, 16)), base.path)
    load_checkpoint(unetr(), base.path)


def test_what_a_network_does_not_take_as_an_argument(tmp_path):
    """MONAI's UNETR has patches of 16 voxels and twelve blocks."""
    net = build("monai.networks.nets:UNETR", in_channels=1, out_channels=1,
                arguments={"img_size": (32, 48, 32), "hidden_size": 24, "mlp_dim": 32, "num_heads": 2})  # fmt: skip
    with pytest.raises(
        SegraftError, match=r"patch size 8, this network 16, .*UNETR has no argument for this: take unetr_ch"
    ):
        load_checkpoint(net, encoder(tmp_path))


def test_sizes_of_networks():
    net = build("monai.networks.nets:UNETR", in_channels=2, out_channels=1,
                arguments={"img_size": (32, 48, 16), "hidden_size": 24, "mlp_dim": 32, "num_heads": 2})  # fmt: skip
    assert fixed_size(net) == (32, 48, 16)
    assert vit_of(net) == {
        "in_channels": 2, "patch_size": 16, "hidden_size": 24, "mlp_dim": 32, "num_layers": 12, "patches": 6,
        "qkv_bias": False, "num_heads": 2, "img_size": [32, 48, 16],
    }  # fmt: skip
    assert fixed_size(unetr(img_size=(16, 8))) == (16, 8)
    unet = build("unet", in_channels=1, out_channels=1, arguments={"widths": (4, 8)})
    assert (fixed_size(unet), vit_of(unet)) == (None, {})


@pytest.mark.parametrize("network", ["unetr_channelwise", "monai.networks.nets:UNETR"])
def test_sizes_that_are_left_out_are_the_files(tmp_path, network):
    sizes = {} if network == "unetr_channelwise" else {"patch_size": 16, "num_layers": 12, "img_size": [16, 32, 16]}
    folder = encoder(tmp_path / "encoder", **sizes)
    arguments, notes = with_sizes(network, {"in_channels": 1, "out_channels": 2, "feature_size": 4}, folder)
    rest = {key: value for key, value in arguments.items() if key not in ONE}
    net = build(network, in_channels=1, out_channels=2, arguments=rest)
    loaded = load_checkpoint(net, folder)
    assert loaded.tensors == sum(key.startswith("vit.") for key in net.state_dict())
    assert fixed_size(net) == tuple(sizes.get("img_size", SIZE))
    assert ("patch_size" in arguments) == (network == "unetr_channelwise")
    assert "num_heads 2" in notes[0]
    assert "qkv_bias" not in arguments, "as the network has it anyway"


@pytest.mark.parametrize("network", ["swin_unetr", "unet", "unet_channelwise"])
def test_networks_of_another_kind_take_none(tmp_path, network):
    """SwinUNETR has patches and heads of its own."""
    folder = encoder(tmp_path)
    assert with_sizes(network, ONE, folder) == (ONE, ())
    arguments = {"widths": (4, 8)} if "unet" in network and "swin" not in network else {"feature_size": 12}
    with pytest.raises(SegraftError, match=r"holds a ViT .*name the network unetr_channelwise"):
        load_checkpoint(build(network, **ONE, arguments=arguments), folder)


def test_what_is_given_stays(tmp_path):
    arguments, _ = with_sizes("unetr_channelwise", {"img_size": (24, 16, 16), "in_channels": 4}, encoder(tmp_path))
    assert arguments["img_size"] == (24, 16, 16)
    assert arguments["in_channels"] == 4
    assert arguments["num_heads"] == 2


def test_patches_that_are_no_cubes_are_refused_in_words(tmp_path):
    folder = encoder(tmp_path, patch_size=[8, 8, 16])
    with pytest.raises(SegraftError, match="patches of 8×8×16 voxels are no cubes, as those of unetr_channelwise are"):
        with_sizes("unetr_channelwise", ONE, folder)
    arguments, _ = with_sizes("unetr_channelwise", {"in_channels": 1, "out_channels": 1, "patch_size": 8}, folder)
    rest = {key: value for key, value in arguments.items() if key not in ONE}
    with pytest.raises(SegraftError, match="patch size 8×8×16, this network 8"):
        load_checkpoint(build("unetr_channelwise", **ONE, arguments=rest), folder)


def test_only_encoder_files_say_sizes(tmp_path):
    arguments = {**VIT, "img_size": list(SIZE), "feature_size": 4, "in_channels": 3, "out_channels": 2}
    base = save_base(unetr(), tmp_path, network="unetr_channelwise", arguments=arguments)
    assert vit_of_base(base)["num_heads"] == 2
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "w.safetensors").write_bytes(b"")
    for weights in (base.path, tmp_path / "w.pt", tmp_path / "w.safetensors", tmp_path / "no.safetensors"):
        assert with_sizes("unetr_channelwise", {"in_channels": 3}, weights) == ({"in_channels": 3}, ())
