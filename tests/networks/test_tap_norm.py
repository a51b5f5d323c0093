"""What the decoder of the channel-wise UNETR is given: states in which what all tokens share is gone."""

import pytest
import torch
from torch import Tensor, nn

from segraft.adapters import fingerprint
from segraft.errors import SegraftError
from segraft.networks import build, load_weights

SIZES = (16, 16, 8)
ARGUMENTS = {
    "img_size": SIZES,
    "patch_size": 4,
    "hidden_size": 12,
    "mlp_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "feature_size": 4,
}


def make(**more) -> nn.Module:
    torch.manual_seed(0)
    return build("unetr_channelwise", in_channels=3, out_channels=2, arguments=ARGUMENTS | more).eval()


def image() -> Tensor:
    return torch.randn(2, 3, *SIZES, generator=torch.Generator().manual_seed(1))


def fused(net: nn.Module, x: Tensor) -> list[Tensor]:
    """What each linear map is given: [B, T, C·d]."""
    seen: list[Tensor] = []
    for fuse in net.fusion:
        fuse.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    net(x)
    return seen


class Moved(nn.Module):
    """A ViT whose states have another scale and a vector in common."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, volumes: Tensor) -> tuple[Tensor, list[Tensor]]:
        last, states = self.vit(volumes)
        shift = torch.linspace(-30, 40, last.shape[-1])
        return 5 * last + shift, [5 * state + shift for state in states]


def test_a_feature_has_mean_0_and_variance_1_over_the_tokens_of_an_image():
    net, x = make(), image()
    _, states = net.vit(x[1:, 2:])
    (state,) = states[0]
    expected = (state - state.mean(0)) / (state.var(0, correction=0) + 1e-5).sqrt()
    first, *others = fused(net, x)
    torch.testing.assert_close(first[1, :, 24:], expected, rtol=1e-4, atol=1e-5)
    for each in (first, *others):
        torch.testing.assert_close(each.mean(1), torch.zeros(2, 36), rtol=0, atol=1e-5)


def test_a_channel_that_is_missing_is_zero():
    """Alone in the batch, and beside an image that has it."""
    net, x = make(), image()
    x[0, 1] = torch.nan
    for given in (x, x[:1]):
        for each in fused(net, given)[-2:]:
            assert not each[0, :, 12:24].any()
            assert each[0, :, :12].any()


@pytest.mark.parametrize(("norm", "same"), [("instance", True), ("none", False)])
def test_what_tokens_share_and_its_scale_count_for_nothing(norm, same):
    net, x = make(tap_norm=norm), image()
    with torch.no_grad():
        before = net(x)
        net.vit = Moved(net.vit)
        assert torch.allclose(net(x), before, rtol=1e-2, atol=1e-2) == same


def test_files_of_both_kinds_are_told_apart(tmp_path):
    """Their parameters are alike, and what they compute is not."""
    normed, raw = make(), make(tap_norm="none")
    assert [name for name, _ in normed.named_parameters()] == [name for name, _ in raw.named_parameters()]
    assert fingerprint(normed) != fingerprint(raw)
    torch.save(raw.state_dict(), tmp_path / "raw.pt")
    torch.save(normed.state_dict(), tmp_path / "normed.pt")
    with pytest.raises(SegraftError, match=r"missing, such as fusion\.tap_norm_instance"):
        load_weights(normed, tmp_path / "raw.pt")
    with pytest.raises(SegraftError, match=r"fusion\.tap_norm_instance"):
        load_weights(raw, tmp_path / "normed.pt")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tap_norm": "layer"}, "unknown tap_norm 'layer': choose one of none, instance"),
        ({"img_size": (4, 4, 4)}, 'img_size is 4×4×4, a single patch, .* "tap_norm": "none"'),
    ],
)
def test_what_cannot_be_normed_is_refused(arguments, says):
    with pytest.raises(SegraftError, match=says):
        make(**arguments)
    make(tap_norm="none", img_size=(4, 4, 4))
