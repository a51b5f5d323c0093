"""The masked auto-encoder: its encoder is MONAI's ViT, what is masked is not looked at, and its loss is He's."""

import math

import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR, ViT
from torch import nn

from segraft.errors import SegraftError
from segraft.networks import NETWORKS, build, load_base, load_checkpoint, save_base
from segraft.networks.mae import MaskedAutoencoder, Reconstruction, draw, reconstruction_losses
from segraft.networks.vit import encode, image_of, patches_of, sines

SMALL = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2, "decoder_layers": 1}
IMAGE, PATCH, GRID = (16, 8, 24), (4, 4, 8), (4, 2, 3)
PATCHES = math.prod(GRID)


@pytest.fixture
def net() -> MaskedAutoencoder:
    return MaskedAutoencoder(img_size=IMAGE, patch_size=PATCH, **SMALL)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 1, *IMAGE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_patches_are_numbered_x_major():
    image = torch.zeros(1, 1, *IMAGE)
    for number in range(PATCHES):
        x, y, z = np.unravel_index(number, GRID)
        image[0, 0, 4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 8 * z : 8 * z + 8] = number
    patches = patches_of(image, PATCH)
    assert patches.shape == (1, PATCHES, 128)
    assert torch.equal(patches[0], torch.arange(PATCHES)[:, None].expand(-1, 128).float())


def test_patches_hold_their_voxels_x_major_and_go_back(image):
    patches = patches_of(image, PATCH)
    number = np.ravel_multi_index((2, 1, 1), GRID)
    assert torch.equal(patches[1, number], image[1, 0, 8:12, 4:8, 8:16].reshape(-1))
    assert torch.equal(image_of(patches, GRID, PATCH), image)


@pytest.mark.parametrize("width", [12, 14, 64])
def test_positions_are_sines_of_each_axis(width):
    found = sines(GRID, width)[0]
    each = width // 6
    for number in range(PATCHES):
        place = np.unravel_index(number, GRID)
        expected = []
        for coordinate in place:
            angles = [coordinate / 10_000 ** (k / each) for k in range(each)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        expected += [0.0] * (width - len(expected))
        assert found[number].tolist() == pytest.approx(expected, abs=1e-6)


def test_each_position_is_another():
    positions = sines((6, 6, 6), 96)[0]
    distances = torch.cdist(positions, positions) + torch.eye(216) * 10
    assert distances.min() > 0.1


@pytest.mark.parametrize(("patches", "share", "kept"), [(24, 0.75, 6), (216, 0.75, 54), (10, 0.75, 2), (8, 0.0, 8)])
def test_masking_keeps_exactly_the_rest(patches, share, kept):
    visible, masked = draw(5, patches, share)
    assert visible.shape == (5, kept)
    assert (masked.sum(1) == patches - kept).all()
    for places, hidden in zip(visible, masked, strict=True):
        assert places.tolist() == torch.nonzero(~hidden).flatten().tolist()


def test_masks_differ_between_images_and_come_from_the_seed_alone():
    first = draw(4, 64, 0.75, seeded(1))[1]
    assert len({tuple(row.tolist()) for row in first}) == 4
    assert torch.equal(first, draw(4, 64, 0.75, seeded(1))[1])
    assert not torch.equal(first, draw(4, 64, 0.75, seeded(2))[1])
    torch.manual_seed(1)
    assert torch.equal(first, draw(4, 64, 0.75)[1])


def test_every_patch_is_masked_equally_often():
    often = draw(4000, 16, 0.75, seeded(0))[1].float().mean(0)
    assert (often - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


@pytest.mark.parametrize(
    ("share", "what"),
    [(1.0, "leaves none to look at"), (0.99, "leaves none to look at"), (-0.1, "masks none"), (0.01, "masks none")],
)
def test_shares_that_leave_nothing_to_do_are_refused(share, what):
    with pytest.raises(SegraftError, match=what):
        draw(1, 8, share)


def test_the_encoder_is_monais_vit(net, image):
    vit = ViT(1, IMAGE, PATCH, hidden_size=24, mlp_dim=48, num_layers=2, num_heads=2)
    vit.load_state_dict(net.vit.state_dict())
    with torch.no_grad():
        expected = vit.eval()(image)[0]
        assert torch.equal(encode(net.vit, image), expected)
        every = torch.arange(PATCHES).expand(3, -1)
        assert torch.allclose(encode(net.vit, image, every), expected, atol=1e-6)


def test_the_encoder_has_the_keys_and_shapes_of_unetrs():
    arguments = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
    net = MaskedAutoencoder(img_size=(32, 16, 48), **arguments, decoder_layers=1)
    unetr = UNETR(1, 2, img_size=(32, 16, 48), feature_size=8, **arguments)
    wanted = {key: value.shape for key, value in unetr.state_dict().items() if key.startswith("vit.")}
    assert {key: value.shape for key, value in net.state_dict().items() if key.startswith("vit.")} == wanted


def test_visible_patches_go_through_the_encoder_alone(net, image):
    """By hand: projection as a matrix, positions, then the blocks on those tokens and no others."""
    visible, _ = draw(3, PATCHES, 0.75, seeded(3))
    embedding = net.vit.patch_embedding
    weight = embedding.patch_embeddings.weight.flatten(1)
    with torch.no_grad():
        for number, places in enumerate(visible):
            voxels = patches_of(image, PATCH)[number, places]
            tokens = voxels @ weight.T + embedding.patch_embeddings.bias + embedding.position_embeddings[0, places]
            for block in net.vit.blocks:
                tokens = block(tokens[None])[0]
            assert torch.allclose(encode(net.vit, image, visible)[number], net.vit.norm(tokens), atol=1e-5)


def test_what_is_masked_changes_nothing_of_the_prediction(net, image):
    net.eval()
    with torch.no_grad():
        made = net(image, 0.75, seeded(0))
        hidden = image_of(made.masked[:, :, None].expand(-1, -1, math.prod(PATCH)), GRID, PATCH)
        again = net(torch.where(hidden, torch.rand_like(image), image), 0.75, seeded(0))
        other = net(torch.where(hidden, image, torch.rand_like(image)), 0.75, seeded(0))
    assert torch.equal(made.masked, again.masked)
    assert torch.equal(made.predicted, again.predicted)
    assert not torch.allclose(made.predicted, other.predicted, atol=1e-3)


def test_the_decoder_puts_states_where_they_are_visible(net, image):
    """Without blocks, a visible patch's prediction depends on its own state, a masked one's on the token and place."""
    decoder = net.mae_decoder
    decoder.blocks = nn.ModuleList()
    visible, masked = draw(3, PATCHES, 0.75, seeded(0))
    states = torch.randn(3, visible.shape[1], 24)
    found = decoder(states, visible)
    for number in range(3):
        for patch in range(PATCHES):
            if masked[number, patch]:
                token = decoder.mask_token[0, 0]
            else:
                token = decoder.embed(states[number, visible[number].tolist().index(patch)])
            expected = decoder.predict(decoder.norm(token + decoder.positions[0, patch]))
            assert torch.allclose(found[number, patch], expected, atol=1e-5)


def test_the_loss_is_a_mean_over_normalised_masked_patches(net, image):
    image = image * 3 + 5
    torch.manual_seed(7)
    losses = net.losses(image, 0.5)
    torch.manual_seed(7)
    made = net(image, 0.5)
    for number in range(3):
        errors = []
        for patch in range(PATCHES):
            if made.masked[number, patch]:
                x, y, z = np.unravel_index(patch, GRID)
                cut = image[number, 0, 4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 8 * z : 8 * z + 8].double().numpy().ravel()
                target = (cut - cut.mean()) / np.sqrt(cut.var() + 1e-6)
                errors.append(np.mean((made.predicted[number, patch].detach().double().numpy() - target) ** 2))
        assert len(errors) == PATCHES // 2
        assert float(losses[number].detach()) == pytest.approx(np.mean(errors), rel=1e-4)


def test_predicting_zero_costs_one_and_nothing_where_there_is_nothing(net, image):
    image = image.clone()
    image[2] = 0.3
    made = net(image).blank()
    zeros = reconstruction_losses(made, net.targets(image)[0])
    assert zeros[:2].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert float(zeros[2]) == pytest.approx(0, abs=1e-6)


def test_visible_patches_do_not_count(net, image):
    targets = net.targets(image)[0]
    masked = draw(3, PATCHES, 0.75, seeded(0))[1]
    predicted = targets.clone().requires_grad_()
    reconstruction_losses(Reconstruction(predicted + torch.ones(1), masked), targets).sum().backward()
    assert (predicted.grad[~masked] == 0).all()
    assert (predicted.grad[masked] != 0).all()
    perfect = torch.where(masked[:, :, None], targets, 100.0)
    assert reconstruction_losses(Reconstruction(perfect, masked), targets).tolist() == [0, 0, 0]


def test_gradients_reach_what_took_part_and_nothing_else(net, image):
    torch.manual_seed(0)
    net.losses(image[:1]).sum().backward()
    torch.manual_seed(0)
    masked = net(image[:1]).masked[0]
    positions = net.vit.patch_embedding.position_embeddings.grad[0]
    assert (positions[masked] == 0).all()
    assert (positions[~masked].abs().sum(1) > 0).all()
    for name, value in net.named_parameters():
        if ".norm_cross_attn." in name:
            assert not value.requires_grad
        else:
            assert value.grad.abs().sum() > 0, name
    assert not [name for name, _ in net.mae_decoder.named_parameters() if "norm_cross_attn" in name]
    assert not net.mae_decoder.positions.requires_grad


def test_completing_with_the_targets_gives_the_image(net, image):
    made = net(image)
    perfect = Reconstruction(net.targets(image)[0], made.masked)
    assert torch.allclose(net.completed(image, perfect), image, atol=1e-5)
    blanked = net.blanked(image, made)
    assert torch.equal(blanked.isnan().sum((1, 2, 3, 4)), made.masked.sum(1) * math.prod(PATCH))
    assert torch.equal(blanked.nan_to_num(-1) == -1, blanked.isnan())
    assert torch.equal(torch.where(blanked.isnan(), image, blanked), image)
    filled = net.completed(image, made)
    assert torch.equal(filled[~blanked.isnan()], image[~blanked.isnan()])


def test_the_papers_encoder_has_its_count():
    with torch.device("meta"):
        net = MaskedAutoencoder(img_size=(128, 128, 48))
    assert sum(value.numel() for value in net.vit.parameters() if value.requires_grad) == 88_322_304
    assert net.mae_decoder.embed.out_features == 512
    assert len(net.mae_decoder.blocks) == 8


@pytest.mark.parametrize(("hidden", "width"), [(768, 512), (384, 256), (96, 64), (24, 32), (1024, 512)])
def test_the_decoder_is_narrower_than_the_encoder(hidden, width):
    with torch.device("meta"):
        net = MaskedAutoencoder(**SMALL | {"hidden_size": hidden, "mlp_dim": 48}, img_size=32)
    assert net.mae_decoder.embed.out_features == width


@pytest.mark.parametrize("name", ["vit_small", "vit_base", "vit_large"])
def test_the_named_sizes_are_those_of_the_literature(name):
    with torch.device("meta"):
        net = build(name, in_channels=1, out_channels=1)
    widths = {"vit_small": (384, 6, 12), "vit_base": (768, 12, 12), "vit_large": (1024, 16, 24)}
    attention = net.vit.blocks[0].attn
    assert (net.vit.norm.normalized_shape[0], attention.num_heads, len(net.vit.blocks)) == widths[name]
    assert net.vit.blocks[0].mlp.linear1.out_features == 4 * widths[name][0]
    assert net.img_size == (96, 96, 96)
    assert net.size_multiple == 16
    assert name in NETWORKS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"img_size": (16, 8, 20)}, "cannot be cut into patches of 4×4×8 voxels"),
        ({"img_size": PATCH}, "is a single patch"),
        ({"img_size": (16, 8)}, "img_size .* is not one or three positive whole numbers"),
        ({"patch_size": 0}, "patch_size 0 is not one or three"),
        ({"patch_size": 4.0}, "patch_size 4.0 is not one or three"),
        ({"num_heads": 5}, "hidden_size 24 does not divide among 5 heads"),
        ({"decoder_size": 40}, "decoder_size 40 is no multiple of 32"),
        ({"in_channels": 4}, "trained on one channel, not on 4"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(arguments, says):
    with pytest.raises(SegraftError, match=says):
        MaskedAutoencoder(**{"img_size": IMAGE, "patch_size": PATCH, **SMALL, **arguments})


def test_images_of_another_size_are_refused(net):
    with pytest.raises(SegraftError, match=r"takes images of 1×16×8×24 voxels .* and was given 1×16×8×16"):
        net(torch.zeros(1, 1, 16, 8, 16))


def test_a_base_file_gives_it_back(net, tmp_path, image):
    arguments = {"in_channels": 1, "out_channels": 1, "img_size": list(IMAGE), "patch_size": list(PATCH), **SMALL}
    save_base(net, tmp_path, network="vit_small", arguments=arguments)
    again, _ = load_base(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(image, 0.5, seeded(0)).predicted, net.eval()(image, 0.5, seeded(0)).predicted)


UNETR_SIZES = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2, "img_size": [32, 16, 32]}


@pytest.fixture
def encoder(tmp_path):
    """The folder of an encoder file, and its network."""
    arguments = {"decoder_layers": 1, **UNETR_SIZES}
    net = build("vit_small", in_channels=1, out_channels=1, arguments=arguments)
    channels = {"in_channels": 1, "out_channels": 1}
    save_base(net, tmp_path / "encoder", network="vit_small", arguments=channels | arguments)
    return tmp_path / "encoder", net


def unetr(**arguments):
    arguments = {"feature_size": 4, **UNETR_SIZES, **arguments}
    return build("monai.networks.nets.unetr:UNETR", in_channels=1, out_channels=2, arguments=arguments)


def test_its_file_is_the_encoder_of_monais_unetr(encoder):
    folder, net = encoder
    other = unetr()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    loaded = load_checkpoint(other, folder)
    after = other.state_dict()
    for key, value in net.vit.state_dict().items():
        assert torch.equal(after[f"vit.{key}"], value)
    for key, value in before.items():
        if not key.startswith(("vit.", "out.")):  # new outputs have a start of their own
            assert torch.equal(after[key], value)
    assert loaded.tensors == len(net.vit.state_dict())
    assert loaded.layout == "encoder of a masked auto-encoder"
    assert loaded.untrained == ("decoder",)
    assert set(loaded.kept) == {"decoder", "head"}
    assert loaded.outputs.new == (0, 1)
    assert loaded.unused == {"mae_decoder": len(net.mae_decoder.state_dict())}
    assert "the decoder starts at random: train it, with --train decoder." in loaded.notes(("a", "b"))
    scan = torch.rand(2, 1, 32, 16, 32)
    with torch.no_grad():
        assert torch.equal(other.eval().vit(scan)[0], encode(net.eval().vit, scan))


@pytest.mark.parametrize("sizes", [{}, {"patch_size": 8, "num_layers": 3, "hidden_size": 48}], ids=["16", "8"])
def test_its_file_is_the_encoder_of_every_channel(tmp_path, sizes):
    arguments = {**UNETR_SIZES, **sizes}
    net = build("vit_small", in_channels=1, out_channels=1, arguments={"decoder_layers": 1, **arguments})
    channels = {"in_channels": 1, "out_channels": 1}
    save_base(net, tmp_path, network="vit_small", arguments={"decoder_layers": 1, **channels, **arguments})
    other = build("unetr_channelwise", in_channels=3, out_channels=2, arguments={"feature_size": 4, **arguments})
    loaded = load_checkpoint(other, tmp_path)
    found = {key: value for key, value in other.state_dict().items() if key.startswith("vit.")}
    given = {key: value for key, value in net.state_dict().items() if key in found}
    assert set(given) == set(found)
    assert all(torch.equal(value, found[key]) for key, value in given.items())
    assert loaded.tensors == len(found)
    assert "decoder" in loaded.untrained
    with torch.no_grad():
        assert other.eval()(torch.rand(1, 3, 32, 16, 32)).isfinite().all()


def test_its_file_goes_on_as_itself(encoder):
    folder, net = encoder
    arguments = {"decoder_layers": 1, **UNETR_SIZES}
    other = build("vit_small", in_channels=1, out_channels=1, arguments=arguments)
    assert load_checkpoint(other, folder / "base.safetensors").kept == {}
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"img_size": [32, 32, 32]}, r"img size 32×16×32, this network 32×32×32 .*\"img_size\": \[32, 16, 32\]"),
        ({"hidden_size": 48}, "hidden size 24, this network 48"),
        ({"mlp_dim": 96}, "mlp dim 48, this network 96"),
        ({"in_channels": 4}, "in channels 1, this network 4 .take a network that encodes channels one by one"),
        ({"qkv_bias": True}, "qkv bias False, this network True"),
    ],
)
def test_an_encoder_of_other_sizes_is_refused_in_words(encoder, arguments, says):
    with pytest.raises(SegraftError, match=says):
        load_checkpoint(unetr(**arguments), encoder[0])


def test_a_network_without_a_vit_is_refused(encoder):
    net = build("unet", in_channels=1, out_channels=1, arguments={"widths": [4, 8]})
    with pytest.raises(
        SegraftError, match=r"holds a ViT .encoder of a masked auto-encoder., and the network is UNet: "
    ):
        load_checkpoint(net, encoder[0])
