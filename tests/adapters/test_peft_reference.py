"""With the same factors, the same outputs as HF PEFT, where PEFT is right."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, graft

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (4, 5)),
    "linear-no-bias": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 9, 8)),
    "conv2d-no-bias": (lambda: nn.Conv2d(3, 4, (3, 1), bias=False), (2, 3, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 3, 2), padding=(0, 1, 0)), (2, 3, 4, 5, 6)),
}
METHODS = {
    "lora": ({}, {}),
    "dora": ({"use_dora": True}, {}),
    "rs_lora": ({"use_rslora": True}, {}),
    "rs_dora": ({"use_rslora": True, "use_dora": True}, {"scale": "alpha/sqrt(r)"}),
}


@pytest.mark.parametrize("trained", [False, True], ids=["start", "trained"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_same_outputs_as_peft(layer, method, trained):
    make, shape = LAYERS[layer]
    theirs_options, ours_options = METHODS[method]
    torch.manual_seed(0)
    ours, theirs = Net(make()), Net(make())
    theirs.load_state_dict(ours.state_dict())
    rank, alpha = 3, 7

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"], **theirs_options)
    peer = peft.get_peft_model(theirs, config).base_model.model.layer
    name = {"lora": "conv_lora", "dora": "conv_dora", "rs_dora": "dora"}.get(method, method)
    graft(
        ours,
        AdapterSpec(name if "conv" in layer else name.removeprefix("conv_"), rank=rank, alpha=alpha, **ours_options),
    )
    edit = ours.layer.segraft["default"]["weight"]

    if edit.m is not None:
        magnitude = peer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitude.flatten(), edit.m)
    with torch.no_grad():
        a, b = peer.lora_A["default"].weight, peer.lora_B["default"].weight
        if trained:
            b.normal_()
            if edit.m is not None:
                magnitude.mul_(torch.rand_like(magnitude) + 0.5)
                edit.m.copy_(magnitude.flatten())
        edit.A.copy_(a.reshape(edit.A.shape))
        edit.B.copy_(b.reshape(edit.B.shape))

    x = torch.randn(shape)
    expected = peer(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert trained != torch.equal(ours.layer.weight, ours.layer._parameters["weight"])


def test_lora_starts_with_the_spread_of_pefts():
    theirs = peft.get_peft_model(Net(nn.Conv2d(50, 4, 3)), peft.LoraConfig(r=64, target_modules=["layer"]))
    a = theirs.base_model.model.layer.lora_A["default"].weight
    ours = graft(Net(nn.Conv2d(50, 4, 3)), AdapterSpec("conv_lora", rank=64)).layer.segraft["default"]["weight"].A
    assert ours.std().item() == pytest.approx(a.std().item(), rel=0.05)
    assert ours.abs().max().item() == pytest.approx(a.abs().max().item(), rel=0.01)
