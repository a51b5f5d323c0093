"""A layer registered under several names is one layer: adapted once, under any of its names."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, graft, load, merge, parameter_table, require_gradients, save, ungraft
from segraft.adapters.grafted import grafts_of


class ConvDropoutNormReLU(nn.Module):
    """Registers its layers twice, as nnU-Net's block of that name, and runs those in `all_modules`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.InstanceNorm2d(outputs, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm, nn.LeakyReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_modules(x)


class Net(nn.Module):
    """Its decoder also holds the encoder, as nnU-Net's does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ConvDropoutNormReLU(1, 3)
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
        self.decoder.block = ConvDropoutNormReLU(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder.block(self.encoder(x))


def make() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(1, 1, 6, 6)


PLACES = [
    None,
    r"encoder\.conv",
    r"encoder\.all_modules\.0",
    r"decoder\.encoder\.conv",
    r"decoder\.encoder\.all_modules\.0",
    r".*encoder.*",
]


@pytest.mark.parametrize("targets", PLACES)
def test_adapted_once_under_any_name(targets, snapshot, randomise):
    net, x = make()
    before, expected = snapshot(net), net(x)
    graft(net, AdapterSpec("dora_c", rank=2, targets=targets))
    assert net.encoder.conv is net.encoder.all_modules[0]
    assert net.encoder.conv is net.decoder.encoder.conv
    assert torch.equal(net(x), expected)
    trained = [name for name, value in net.named_parameters() if value.requires_grad]
    assert len(trained) == (6 if targets is None else 3)
    net(x).square().sum().backward()
    require_gradients(net)
    randomise(net)
    changed = net(x)
    assert not torch.allclose(changed, expected)
    assert torch.equal(merge(net)(x), changed)
    before.assert_holds(net, bits=False)
    assert net.state_dict()["encoder.conv.weight"].equal(net.state_dict()["decoder.encoder.all_modules.0.weight"])


def test_ungrafting_restores_every_name(snapshot, randomise):
    net, _ = make()
    before = snapshot(net)
    ungraft(randomise(graft(net, AdapterSpec("lora", train="norm:.*"))))
    before.assert_holds(net)


def test_excluding_one_name_excludes_the_layer():
    net, _ = make()
    graft(net, AdapterSpec("lora", exclude=r"encoder\.all_modules\.0"))
    assert not grafts_of(net.encoder.conv).edited()
    assert hasattr(net.decoder.block.conv, "segraft")


def test_counted_and_saved_once(tmp_path, randomise):
    net, x = make()
    randomise(graft(net, AdapterSpec("lora", rank=2)))
    assert parameter_table(net).of("default") == 2 * (9 * 1 + 3) + 2 * (9 * 3 + 2)
    assert parameter_table(net).total == sum(value.numel() for value in net.parameters())
    path = save(net, tmp_path / "a.safetensors")
    other, _ = make()
    assert torch.equal(load(other, path)(x), net(x))
