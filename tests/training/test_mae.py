"""Masked auto-encoding as a training: its settings, its patches, its steps."""

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from lightning import Trainer

from segraft.data.cohort import Case
from segraft.data.patches import collate
from segraft.data.preparation import Preparation, Window
from segraft.errors import SegraftError
from segraft.networks.mae import MaskedAutoencoder
from segraft.training.callbacks import EpochCheckpoint
from segraft.training.fit import fit
from segraft.training.mae import MaskedSettings, MaskedTask, check_masked_settings
from segraft.training.scans import ScanSource
from segraft.training.settings import check_settings

PATCH = (8, 8, 8)
PREPARATION = Preparation(patch=PATCH, intensity=Window(low=0, high=1))


def settings(**values) -> MaskedSettings:
    return check_masked_settings(**{"epochs": 2, "learning_rate": 0.01, "device": "cpu", **values})


def network(**arguments) -> MaskedAutoencoder:
    sizes = {"hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2, "decoder_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return MaskedAutoencoder(img_size=PATCH, patch_size=4, **sizes | arguments)


def save(path: Path, data: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.eye(4)), path)
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> ScanSource:
    """Patches of four scans without labels, smooth enough to be told from a part."""
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    grid = np.indices((12, 12, 12)).astype(float)
    cases = []
    for number in range(4):
        waves = sum(np.sin(grid[axis] * rng.uniform(0.2, 0.5)) for axis in range(3))
        cases.append(Case(f"s{number}", f"s{number}", (save(folder / f"s{number}.nii.gz", waves),), None))
    return ScanSource(cases, Preparation(patch=PATCH), seed=0)


def coded(tmp_path: Path, shape: tuple[int, int, int], **options) -> ScanSource:
    """One scan whose voxels say where they are."""
    image = np.arange(math.prod(shape)).reshape(shape) / math.prod(shape)
    case = Case("s", "s", (save(tmp_path / "s.nii.gz", image),), None)
    return ScanSource([case], PREPARATION, seed=0, augmentation="none", **options)


def test_patches_come_from_anywhere(tmp_path):
    shape = (10, 9, 8)
    source = coded(tmp_path, shape, patches_per_volume=300)
    item = source[0, 0]
    assert item["image"].shape == (300, 1, *PATCH)
    whole = np.arange(math.prod(shape)).reshape(shape) / math.prod(shape)
    starts = []
    for patch in item["image"][:, 0]:
        place = np.unravel_index(round(float(patch[0, 0, 0]) * math.prod(shape)), shape)
        x, y, z = (int(each) for each in place)
        assert np.allclose(patch, whole[x : x + 8, y : y + 8, z : z + 8], atol=1e-6)
        starts.append((x, y, z))
    assert set(starts) == {(x, y, 0) for x in range(3) for y in range(2)}
    assert max(starts.count(start) for start in set(starts)) < 85  # of 50 on average


def test_a_patch_depends_on_seed_epoch_and_index_alone(scans):
    first = scans[3, 1]["image"]
    assert torch.equal(first, scans[3, 1]["image"])
    assert not torch.equal(first, scans[4, 1]["image"])
    assert not torch.equal(first, scans[3, 2]["image"])


def test_scans_smaller_than_a_patch_are_padded(tmp_path):
    source = coded(tmp_path, (8, 5, 8))
    for patch in (source[0, 0]["image"][0, 0], source.middle(0)[0]):
        assert patch.shape == PATCH
        assert (patch[:, [0, 6, 7]] == 0).all()
        assert (patch[1:, 1:6] > 0).all()


def test_the_middle_is_the_middle(tmp_path):
    whole = np.arange(12 * 8 * 10).reshape(12, 8, 10) / 960
    assert np.allclose(coded(tmp_path, (12, 8, 10)).middle(0)[0], whole[2:10, :, 1:9], atol=1e-6)


def test_channels_are_patches_of_their_own_each_on_its_grid(tmp_path):
    """One scan of three channels on two grids, and one that lacks the second."""
    files = [save(tmp_path / f"{name}.nii.gz", np.full((8, 8, 8), 0.1)) for name in "ab"]
    for place, (shape, low) in enumerate((((8, 8, 8), 0.2), ((9, 9, 9), 0.4), ((8, 8, 8), 0.6))):
        image = np.full(shape, low)
        image[0] += 0.01
        files.append(save(tmp_path / f"c{place}.nii.gz", image))
    whole = Case("w", "w", tuple(files[2:]), None, channels=("T1", "T2", "DWI"))
    part = Case("p", "p", (files[2], None, files[4]), None, channels=("T1", "T2", "DWI"))
    source = ScanSource([whole, part], PREPARATION, seed=0, augmentation="none", patches_per_volume=60)
    for index, levels in ((0, {2, 4, 6}), (1, {2, 6})):
        image = source[0, index]["image"]
        assert image.shape == (60, 1, *PATCH)
        assert not image.isnan().any()
        assert {round(float(patch[0, -1, 0, 0]) * 10) for patch in image} == levels


def test_a_channel_has_its_own_intensities(tmp_path):
    image = np.linspace(0, 1, 512).reshape(8, 8, 8)
    files = (save(tmp_path / "a.nii.gz", image), save(tmp_path / "b.nii.gz", 100 * image))
    windows = (Window(low=0, high=1), Window(low=0, high=200))
    preparation = Preparation(patch=PATCH, intensity=windows)
    case = Case("s", "s", files, None, channels=("a", "b"))
    source = ScanSource([case], preparation, seed=0, augmentation="none", patches_per_volume=20)
    assert {round(float(patch.max()), 3) for patch in source[0, 0]["image"]} == {1.0, 0.5}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"augmentation": "loud"}, "unknown augmentation 'loud'"),
        ({"patches_per_volume": 0}, "patches per volume .0. must be positive"),
        ({"seed": -1}, "the seed .-1. not negative"),
    ],
)
def test_patches_out_of_range_are_refused(scans, values, says):
    with pytest.raises(SegraftError, match=says):
        ScanSource([Case("s", "s", (Path("s.nii.gz"),), None)], PREPARATION, **{"seed": 0, **values})


def test_no_scans_are_refused():
    with pytest.raises(SegraftError, match="no scans to train on"):
        ScanSource([], PREPARATION, seed=0)


def test_nan_in_a_scan_is_refused(tmp_path):
    image = np.random.default_rng(0).random((8, 8, 8))
    image[3, 3, 3] = np.nan
    case = Case("s", "s", (save(tmp_path / "s.nii.gz", image),), None)
    with pytest.raises(SegraftError, match=r"s.nii.gz holds NaN"):
        ScanSource([case], PREPARATION, seed=0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"loss": "overlap"}, "loss is about labels"),
        ({"foreground": 0.5}, "foreground is about labels"),
        ({"contrast_copies": 1}, "contrast_copies is about labels"),
        ({"schedule": "onecycle"}, "the schedule onecycle has a rise of its own"),
        ({"mask": 1.0}, "training setting mask = 1.0"),
        ({"mask": 0.0}, "training setting mask = 0.0"),
        ({"warm_up": 1.0}, "training setting warm_up = 1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, says):
    with pytest.raises(SegraftError, match=says) as caught:
        check_masked_settings(**values)
    assert "\n" not in str(caught.value)


def test_records_have_what_counts():
    record = check_masked_settings(epochs=3).model_dump(mode="json")
    assert not {"loss", "foreground", "contrast_copies", "patches_at_once", "devices"} & set(record)
    assert (record["mask"], record["warm_up"], record["weight_decay"]) == (0.75, 0.05, 0.05)
    assert check_masked_settings(**record).model_dump(mode="json") == record


@pytest.mark.parametrize(("schedule", "warm_up"), [("cosine", 0.2), ("cosine", 0.0), ("constant", 0.3)])
def test_the_rate_rises_and_falls(schedule, warm_up):
    steps, highest = 20, 0.01
    task = MaskedTask(network(), settings(schedule=schedule, warm_up=warm_up, learning_rate=highest), steps, None)
    made = task.configure_optimizers()
    optimiser, schedule_ = made["optimizer"], made["lr_scheduler"]["scheduler"]
    taken = []
    for _ in range(steps):
        taken.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        schedule_.step()
    rising = round(warm_up * steps)
    for step, rates in enumerate(taken):
        if step < rising:
            expected = highest * (step + 1) / rising
        elif schedule == "constant":
            expected = highest
        else:
            expected = highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
        assert rates == pytest.approx([expected] * 2), step


def test_weights_of_layers_decay_and_nothing_else():
    net = network()
    optimiser = MaskedTask(net, settings(weight_decay=0.1), 10, None).configure_optimizers()["optimizer"]
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.1, 0]
    assert all(group["betas"] == (0.9, 0.95) for group in optimiser.param_groups)
    names = {id(value): name for name, value in net.named_parameters()}
    decaying, others = ({names[id(value)] for value in group["params"]} for group in optimiser.param_groups)
    assert decaying | others == {name for name, value in net.named_parameters() if value.requires_grad}
    assert not decaying & others
    assert all(name.endswith("weight") and ".norm" not in name for name in decaying)
    assert {"vit.patch_embedding.position_embeddings", "mae_decoder.mask_token"} <= others


def test_training_lowers_the_loss(scans, tmp_path):
    found = fit(network(), scans, settings(epochs=150), checkpoint=tmp_path / "a.ckpt", make_task=MaskedTask)
    assert found.losses[0] > 1
    assert np.mean(found.losses[-10:]) < 0.75


def test_mixed_precision_trains_too(scans, tmp_path):
    full, mixed = network(), network()
    losses = fit(full, scans, settings(), checkpoint=tmp_path / "a.ckpt", make_task=MaskedTask).losses
    chosen = settings(precision="bf16")
    assert fit(mixed, scans, chosen, checkpoint=tmp_path / "b.ckpt", make_task=MaskedTask).losses == pytest.approx(
        losses, rel=0.02
    )


def test_a_step_is_the_mean_loss_at_the_settings_share(scans):
    net = network()
    task = MaskedTask(net, settings(mask=0.5), 1, None)
    batch = collate([scans[0, 0], scans[0, 1]])
    torch.manual_seed(3)
    step = task.training_step(batch, 0)
    torch.manual_seed(3)
    expected = net.losses(batch["image"], 0.5)
    for loss in step.values():
        assert loss.item() == pytest.approx(expected.mean().item())
    assert int(net(batch["image"], 0.5).masked[0].sum()) == 4


@pytest.mark.parametrize("options", [{"patches_at_once": 1}, {"recompute": (r"vit\.blocks\.\d+", "decoder")}])
def test_memory_for_time_gives_the_same_weights(scans, tmp_path, options):
    plain, other = network(), network()
    losses = fit(plain, scans, settings(), checkpoint=tmp_path / "a.ckpt", make_task=MaskedTask).losses
    found = fit(other, scans, settings(**options), checkpoint=tmp_path / "b.ckpt", make_task=MaskedTask).losses
    assert found == pytest.approx(losses, rel=1e-4)
    for key, value in plain.state_dict().items():
        if key.endswith("qkv.bias"):  # that of keys has no effect, so its gradient is rounding
            continue
        assert torch.allclose(other.state_dict()[key], value, atol=1e-3), key


def test_the_same_seed_gives_the_same_bits_and_another_others(scans, tmp_path):
    found = []
    for place, seed in enumerate((0, 0, 1)):
        net = network()
        fit(net, scans, settings(seed=seed), checkpoint=tmp_path / f"{place}.ckpt", make_task=MaskedTask)
        found.append(torch.cat([value.flatten() for value in net.state_dict().values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_resuming_is_exact(scans, tmp_path, monkeypatch):
    chosen = settings(epochs=4, warm_up=0.3)
    whole, resumed = network(dropout_rate=0.1), network(dropout_rate=0.1)
    in_one_go = fit(whole, scans, chosen, checkpoint=tmp_path / "whole.ckpt", make_task=MaskedTask)
    written = EpochCheckpoint.on_train_epoch_end

    def stop(self: EpochCheckpoint, trainer: Trainer, pl_module: MaskedTask) -> None:
        written(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(EpochCheckpoint, "on_train_epoch_end", stop)
        with pytest.raises(InterruptedError):
            fit(network(dropout_rate=0.1), scans, chosen, checkpoint=tmp_path / "a.ckpt", make_task=MaskedTask)
    torch.manual_seed(99)
    result = fit(resumed, scans, chosen, checkpoint=tmp_path / "a.ckpt", resume=True, make_task=MaskedTask)
    assert result.losses == in_one_go.losses
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_the_checkpoint_of_another_network_is_refused(scans, tmp_path):
    fit(network(), scans, settings(epochs=1), checkpoint=tmp_path / "a.ckpt", make_task=MaskedTask)
    with pytest.raises(SegraftError, match="belongs to another network"):
        fit(network(num_layers=1), scans, settings(), checkpoint=tmp_path / "a.ckpt", resume=True, make_task=MaskedTask)


def test_a_loss_that_is_not_finite_names_the_scans(scans):
    net = network()
    with torch.no_grad():
        net.mae_decoder.predict.bias.fill_(torch.inf)
    with pytest.raises(SegraftError, match=r"the loss is inf at step 0 on cases s2, s0"):
        MaskedTask(net, settings(), 1, None).training_step(collate([scans[0, 2], scans[0, 0]]), 0)


def test_it_takes_its_own_settings_and_network():
    with pytest.raises(TypeError):
        MaskedTask(network(), check_settings(), 1, None)
    with pytest.raises(TypeError):
        MaskedTask(torch.nn.Linear(1, 1), settings(), 1, None)
