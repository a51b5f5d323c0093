"""The mixed loss of equation 2: the ladder of contrasts, and the training step that sums over it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from segraft.adapters import AdapterSpec, graft
from segraft.errors import SegraftError
from segraft.networks import MultiViewUNet
from segraft.training.contrast import FARTHEST, ladder, with_contrast
from segraft.training.fit import fit
from segraft.training.losses import LOSSES
from segraft.training.module import NonFiniteLossError, SegmentationTask


@pytest.mark.parametrize(
    ("copies", "gammas", "weights"),
    [
        (0, [1], [1]),
        (1, [1, 2 / 3], [2 / 3, 1 / 3]),
        (2, [1, 2 / 3, 3 / 2], [1 / 2, 1 / 4, 1 / 4]),
        (4, [1, 1.5**-0.5, 1.5**0.5, 2 / 3, 3 / 2], [2 / 7, 3 / 14, 3 / 14, 1 / 7, 1 / 7]),
    ],
)
def test_ladders_by_hand(copies, gammas, weights):
    found = ladder(copies)
    assert [contrast.gamma for contrast in found] == pytest.approx(gammas)
    assert [contrast.weight for contrast in found] == pytest.approx(weights)


@given(st.integers(0, 40))
def test_weights_fall_with_the_distance_and_sum_to_one(copies):
    found = ladder(copies)
    assert found == ladder(copies)
    assert len(found) == len({contrast.gamma for contrast in found}) == copies + 1
    assert found[0].gamma == 1
    assert sum(contrast.weight for contrast in found) == pytest.approx(1)
    distance = [abs(math.log(contrast.gamma)) for contrast in found]
    assert max(distance) <= math.log(FARTHEST) + 1e-12
    for one, first in zip(found, distance, strict=True):
        for other, second in zip(found, distance, strict=True):
            if first < second - 1e-9:
                # in proportion to the distance, half the weight at the farthest
                assert one.weight > other.weight
                assert one.weight - other.weight == pytest.approx(
                    found[0].weight * (second - first) / math.log(FARTHEST) / 2
                )
    below = sum(contrast.gamma < 1 for contrast in found)
    assert below - sum(contrast.gamma > 1 for contrast in found) == copies % 2


def test_contrast_of_known_values():
    image = torch.tensor([0.0, 0.25, 1.0, 4.0, -0.25])
    assert with_contrast(image, 1) is image
    torch.testing.assert_close(with_contrast(image, 0.5), torch.tensor([0.0, 0.5, 1.0, 2.0, -0.5]))
    torch.testing.assert_close(with_contrast(image, 2), torch.tensor([0.0, 0.0625, 1.0, 16.0, -0.0625]))


@given(st.lists(st.floats(-0.25, 1.25, width=32), min_size=2, max_size=20, unique=True), st.integers(1, 9))
def test_contrast_keeps_the_order_and_stays_finite(values, copies):
    image = torch.tensor(sorted(values))
    for contrast in ladder(copies):
        changed = with_contrast(image, contrast.gamma)
        assert torch.isfinite(changed).all()
        assert (changed.diff() >= -1e-6).all()
        assert (changed * image >= 0).all()


# --- the training step


def batch(seed: int = 0, *, flat: bool = True) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 1, 8, 8, 1 if flat else 8, generator=generator)
    return {"image": image, "label": (image > 0.7).float(), "case": ["a", "b", "c"]}


class Scaling(nn.Module):
    """Logits are the image times one number."""

    def __init__(self, factor: float = 0.7) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.factor * image


def test_equation_2_by_hand(settings):
    """Two pixels, one of the label, at the contrasts 1, 2/3 and 3/2."""
    task = SegmentationTask(Scaling(), settings(loss="overlap", contrast_copies=2), 1)
    image, mask = [0.49, 0.09], [1.0, 0.0]
    given = {
        "image": torch.tensor(image).reshape(1, 1, 2, 1, 1),
        "label": torch.tensor(mask).reshape(1, 1, 2, 1, 1),
        "case": ["a"],
    }
    expected = 0.0
    for gamma, weight in ((1, 1 / 2), (2 / 3, 1 / 4), (3 / 2, 1 / 4)):
        bright, dark = (1 / (1 + math.exp(-0.7 * x**gamma)) for x in image)
        # over the label and over its background, scaled by 2/n: LO / (L + O) is O / (1 + O) where L is 1, else 0
        expected -= weight * (bright / (1 + bright) + (1 - dark) / (2 - dark)) * 2 / 2
    assert task.training_step(given, 0)["loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "dora_c"])
@pytest.mark.parametrize("copies", [0, 1, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_sum_written_out(settings, loss, copies, adapted):
    net = MultiViewUNet(width=2)
    if adapted:
        graft(net, AdapterSpec("dora_c", rank=2, train="M3"))
        with torch.no_grad():
            for value in net.parameters():
                if value.requires_grad:
                    value.add_(0.1 * torch.randn(value.shape))
    trained = [value for value in net.parameters() if value.requires_grad]
    given = batch()
    value = SegmentationTask(net, settings(loss=loss, contrast_copies=copies), 1).training_step(given, 0)["loss"]
    found = torch.autograd.grad(value, trained)

    image, mask = given["image"][..., 0], given["label"][..., 0]
    function, written = LOSSES[loss](), torch.zeros(())
    rungs = max(1, math.ceil(copies / 2))
    shares = [1 - math.ceil(i / 2) / rungs / 2 for i in range(copies + 1)]
    for i, share in enumerate(shares):
        gamma = 1.5 ** ((-1 if i % 2 else 1) * math.ceil(i / 2) / rungs)
        written = written + share / sum(shares) * function(net(image**gamma), mask)
    torch.testing.assert_close(value, written)
    for mine, theirs in zip(found, torch.autograd.grad(written, trained), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_copies_the_step_is_the_loss_itself(settings, loss):
    net, given = Scaling(), batch(flat=False)
    value = SegmentationTask(net, settings(loss=loss), 1).training_step(given, 0)["loss"]
    assert torch.equal(value, LOSSES[loss]()(net(given["image"]), given["label"]))


def test_where_contrast_changes_nothing_the_mixed_loss_is_the_loss(settings):
    """Intensities of 0 and 1 alone; the weights sum to 1, so that settings of the loss keep their meaning."""
    given = batch()
    given["image"] = given["image"].round()
    steps = [
        SegmentationTask(Scaling(), settings(loss="overlap", contrast_copies=copies), 1).training_step(given, 0)["loss"]
        for copies in (0, 5)
    ]
    torch.testing.assert_close(*steps)


def test_one_pass_per_contrast_and_the_same_every_time(settings):
    seen = []
    net = Scaling()
    net.register_forward_pre_hook(lambda _module, given: seen.append(given[0].clone()))
    task, given = SegmentationTask(net, settings(contrast_copies=3), 1), batch()
    first, second = (task.training_step(given, 0)["loss"] for _ in range(2))
    assert torch.equal(first, second)
    assert len(seen) == 8
    assert all(torch.equal(one, other) for one, other in zip(seen[:4], seen[4:], strict=True))
    assert torch.equal(seen[0], given["image"][..., 0])
    assert torch.equal(given["image"], batch()["image"])  # the patches are left as they are


def test_what_is_wrong_with_a_copy_stops_the_training(settings):
    class Fragile(Scaling):
        calls = 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(image) * (math.nan if self.calls == 3 else 1)

    class Odd(Scaling):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image)[..., 1:]

    for net, error, message in (
        (Fragile(), NonFiniteLossError, "the loss is nan"),
        (Odd(), SegraftError, "Odd gives"),
    ):
        task = SegmentationTask(net, settings(contrast_copies=2), 1)
        task._trainer = type("Trainer", (), {"global_step": 0})()
        with pytest.raises(error, match=message):
            task.training_step(batch(), 0)


@pytest.mark.parametrize("recompute", [(), ("encoder", "M3")], ids=["kept", "recomputed"])
def test_a_whole_training_with_copies(flat_source, settings, tmp_path, recompute):
    results = []
    for run in range(2):
        torch.manual_seed(0)
        net = graft(MultiViewUNet(width=4), AdapterSpec("dora_c", rank=2))
        values = settings(loss="overlap", contrast_copies=2, epochs=3, recompute=recompute)
        results.append(fit(net, flat_source, values, checkpoint=tmp_path / f"{run}.ckpt").losses)
    assert results[0] == results[1]
    assert results[0][-1] < results[0][0]
