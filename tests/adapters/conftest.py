"""The matrix that one set of tests runs through: methods by layer kinds, all tiny."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segraft.adapters import PRESETS, AdapterSpec, graft
from segraft.adapters.graft import grafted_layers
from segraft.adapters.grafted import base_tensor, grafts_of


class SelfAttention(nn.Module):
    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    """Keys and values of other widths than the query, which gives q, k and v weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[..., :4], x[..., 4:7], x[..., 7:])[0]


class FusedAttention(nn.Module):
    """As the transformers of MONAI and timm: one linear layer gives q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class StandardisedConv2d(nn.Conv2d):
    """A layer with a forward of its own: standardises its weight before use."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


@dataclass(frozen=True)
class LayerKind:
    """How to build a network around one kind of layer, the shape of its input, and options of the spec."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def net(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return nn.Sequential(self.make()).to(dtype)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(4)).to(dtype)

    def spec(self, method: str, **options: Any) -> AdapterSpec:
        chosen = {"rank": 2, **self.options, **options}
        if method == "tucker":
            return AdapterSpec("none", factorisation="tucker", **chosen)
        return AdapterSpec(method, **chosen)


LINE, IMAGE, VOLUME = (2, 4, 7), (2, 4, 6, 7), (1, 4, 5, 4, 6)

KINDS = {
    "linear": LayerKind(lambda: nn.Linear(4, 6), (2, 3, 4)),
    "linear-no-bias": LayerKind(lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "conv1d": LayerKind(lambda: nn.Conv1d(4, 6, 3, padding=1), LINE),
    "conv2d": LayerKind(lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGE),
    "conv3d": LayerKind(lambda: nn.Conv3d(4, 6, 3, padding=1), VOLUME),
    "conv2d-no-bias": LayerKind(lambda: nn.Conv2d(4, 6, 3, bias=False), IMAGE),
    "conv2d-one-output": LayerKind(lambda: nn.Conv2d(4, 1, 3), IMAGE),
    "transposed1d": LayerKind(lambda: nn.ConvTranspose1d(4, 6, 2, stride=2), LINE),
    "transposed2d": LayerKind(lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), IMAGE),
    "transposed3d": LayerKind(lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), VOLUME),
    "conv1d-groups": LayerKind(lambda: nn.Conv1d(4, 6, 3, groups=2), LINE),
    "conv2d-groups": LayerKind(lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "conv3d-groups": LayerKind(lambda: nn.Conv3d(4, 6, 3, groups=2), VOLUME),
    "transposed1d-groups": LayerKind(lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), LINE),
    "transposed2d-groups": LayerKind(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), IMAGE),
    "transposed3d-groups": LayerKind(lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), VOLUME),
    "depthwise": LayerKind(lambda: nn.Conv2d(4, 4, 3, groups=4), IMAGE),
    "depthwise3d-multiplied": LayerKind(lambda: nn.Conv3d(4, 8, 3, groups=4), VOLUME),
    "depthwise-transposed": LayerKind(lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), IMAGE),
    "dilated2d": LayerKind(lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), IMAGE),
    "dilated3d": LayerKind(lambda: nn.Conv3d(4, 6, (3, 1, 3), dilation=(2, 1, 1), padding=1), VOLUME),
    "strided1d": LayerKind(lambda: nn.Conv1d(4, 6, 3, stride=2), LINE),
    "strided2d": LayerKind(lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1), IMAGE),
    "strided3d": LayerKind(lambda: nn.Conv3d(4, 6, 2, stride=2), VOLUME),
    "transposed2d-all": LayerKind(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2, bias=False),
        IMAGE,
    ),
    "kernel1-2d": LayerKind(lambda: nn.Conv2d(4, 6, 1), IMAGE),
    "kernel1-3d": LayerKind(lambda: nn.Conv3d(4, 6, 1), VOLUME),
    "kernel3x1": LayerKind(lambda: nn.Conv2d(4, 6, (3, 1)), IMAGE),
    "kernel1x3x3": LayerKind(lambda: nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), VOLUME),
    "transposed1x2x2": LayerKind(lambda: nn.ConvTranspose3d(4, 6, (1, 2, 2), stride=(1, 2, 2)), VOLUME),
    "same": LayerKind(lambda: nn.Conv2d(4, 6, (3, 4), padding="same", dilation=2), IMAGE),
    "same-reflect": LayerKind(lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), IMAGE),
    "valid": LayerKind(lambda: nn.Conv2d(4, 6, 3, padding="valid"), IMAGE),
    "reflect1d": LayerKind(lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), LINE),
    "reflect2d": LayerKind(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
    "replicate3d": LayerKind(lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"), VOLUME),
    "circular2d": LayerKind(lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), IMAGE),
    "attention": LayerKind(SelfAttention, (2, 5, 4)),
    "attention-sequence-first": LayerKind(lambda: SelfAttention(batch_first=False), (5, 2, 4)),
    "attention-cross": LayerKind(CrossAttention, (2, 5, 12)),
    "attention-key-value": LayerKind(
        SelfAttention, (2, 5, 4), {"slices": {r"0\.attention": ("2/3", "3/3")}, "exclude": r".*out_proj"}
    ),
    "fused-key-value": LayerKind(FusedAttention, (2, 5, 4), {"slices": {r".*qkv": ("2/3", "3/3")}}),
    "own-forward": LayerKind(lambda: StandardisedConv2d(4, 6, 3), IMAGE),
}

METHODS = [*(name for name in PRESETS if name != "none"), "tucker"]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> LayerKind:
    """Every kind of layer; `parametrize("kind", [names], indirect=True)` runs a few of them."""
    return KINDS[request.param]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Every method; may be parametrised indirectly as `kind`."""
    return request.param


@pytest.fixture(params=["in place", "data", "load", "another object"])
def overwrite(request: pytest.FixtureRequest) -> Callable[[nn.Module, Tensor], None]:
    """Each way of putting new numbers in the place of the frozen weight of a net of one layer."""

    def _overwrite(net: nn.Module, new: Tensor) -> None:
        layer = net[0]
        base = base_tensor(layer, "weight")
        if request.param == "in place":
            with torch.no_grad():
                base.copy_(new)
        elif request.param == "data":
            base.data.copy_(new)
        elif request.param == "load":
            net.load_state_dict({"0.weight": new}, strict=False)
        else:
            layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)

    return _overwrite


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """Move every tensor of an adapter away from its start, as training would."""

    def _randomise(net: nn.Module, name: str = "default", seed: int = 5, scale: float = 0.3) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, layer in grafted_layers(net):
                for value in (p for e in grafts_of(layer).edits(name).values() for p in e.parameters()):
                    value.add_(scale * torch.randn(value.shape, generator=generator).to(value))
        return net

    return _randomise


@pytest.fixture
def adapted(randomise: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The network of a kind, grafted, with its factors away from their start."""

    def _adapted(kind: LayerKind, method: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
        return randomise(graft(kind.net(dtype), kind.spec(method, **options)))

    return _adapted


@dataclass
class Snapshot:
    """What a network is: its classes, its tensors with their bits, what is trainable."""

    classes: dict[str, type]
    tensors: dict[str, Tensor]
    trainable: dict[str, bool]
    extra: set[str]

    @classmethod
    def of(cls, net: nn.Module) -> "Snapshot":
        return cls(
            {name: type(module) for name, module in net.named_modules(remove_duplicate=False)},
            {key: value.clone() for key, value in net.state_dict().items()},
            {name: value.requires_grad for name, value in net.named_parameters(remove_duplicate=False)},
            set(net.__dict__) - {"_segraft_merged"},  # what `unmerge` needs stays
        )

    def assert_holds(self, net: nn.Module, *, bits: bool = True) -> None:
        now = Snapshot.of(net)
        assert now.classes == self.classes
        assert list(now.tensors) == list(self.tensors)
        assert now.trainable == self.trainable
        assert now.extra == self.extra
        for key, value in self.tensors.items():
            assert now.tensors[key].dtype == value.dtype, key
            assert now.tensors[key].shape == value.shape, key
            if bits:
                assert torch.equal(now.tensors[key], value), key


@pytest.fixture
def snapshot() -> Callable[[nn.Module], Snapshot]:
    """Takes down what a network is, to hold it against what becomes of it."""
    return Snapshot.of
