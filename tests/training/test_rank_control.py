"""Rank control in a training: its rate, its records, its resumption; and patches that go through in groups."""

import math

import pytest
import torch

from segraft.adapters import AdapterSpec, graft, ranks_in_use
from segraft.adapters.rank_control import gated_edits
from segraft.training.callbacks import EpochCheckpoint
from segraft.training.fit import fit
from segraft.training.module import SegmentationTask

ARENA = AdapterSpec("arena", rank=8, train=("head",))
ADA_LORA = AdapterSpec("ada_lora", rank=6, control={"target": 2, "warm_up": 0.1, "settled": 0.3})


def gates(net):
    return {key: edit.v.detach().clone() for key, edit in gated_edits(net, "default").items()}


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant"])
def test_gates_shrink_by_the_scheduled_rate_of_each_step_alone(
    make_net, source, settings, checkpoint, schedule, monkeypatch
):
    net = graft(make_net(), ARENA)
    start = gates(net)
    asked = settings(epochs=3, volumes=1, schedule=schedule, learning_rate=0.05)
    rates = []
    stepped = SegmentationTask.optimizer_step

    def spy(self, epoch, batch_idx, optimizer, closure=None):
        rates.append(optimizer.param_groups[0]["lr"])
        assert schedule == "constant" or optimizer.param_groups[1]["lr"] == 0
        stepped(self, epoch, batch_idx, optimizer, closure)

    monkeypatch.setattr(SegmentationTask, "optimizer_step", spy)
    result = fit(net, source, asked, checkpoint=checkpoint)
    assert len(rates) == 12
    if schedule == "cosine":
        assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 12)) / 2 for t in range(12)])
    shrunk = 0.5 * sum(rates)
    for key, gate in gates(net).items():
        left = (start[key].abs() - shrunk).clamp_min(0) * start[key].sign()
        torch.testing.assert_close(gate, left, atol=1e-6, rtol=0)
    assert len(result.ranks) == 3
    assert result.ranks[-1] == ranks_in_use(net).mean
    assert sorted(result.ranks, reverse=True) == list(result.ranks)
    assert f"rank {result.ranks[-1]:.1f} in use" in result.summary()


@pytest.mark.parametrize("spec", [ARENA, ADA_LORA], ids=["arena", "ada_lora"])
def test_a_resumed_training_is_the_uninterrupted_one(make_net, source, settings, tmp_path, spec, monkeypatch):
    asked = settings(epochs=4)
    whole = graft(make_net(), spec)
    expected = fit(whole, source, asked, checkpoint=tmp_path / "a.ckpt")
    write = EpochCheckpoint.on_train_epoch_end

    def stop(self, trainer, pl_module):
        write(self, trainer, pl_module)
        if trainer.current_epoch == 1:
            raise InterruptedError

    monkeypatch.setattr(EpochCheckpoint, "on_train_epoch_end", stop)
    with pytest.raises(InterruptedError):
        fit(graft(make_net(), spec), source, asked, checkpoint=tmp_path / "b.ckpt")
    monkeypatch.setattr(EpochCheckpoint, "on_train_epoch_end", write)
    again = graft(make_net(), spec)
    result = fit(again, source, asked, checkpoint=tmp_path / "b.ckpt", resume=True)
    assert result.ranks == expected.ranks
    assert result.losses == expected.losses
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_the_orthogonality_term_trains_but_is_not_reported(make_net, source, settings, checkpoint):
    losses, sides = [], []
    for weight in (0.0, 100.0):
        control = {"target": 2, "orthogonality": weight}
        net = graft(make_net(), AdapterSpec("ada_lora", rank=4, control=control))
        result = fit(net, source, settings(epochs=1, volumes=4), checkpoint=checkpoint)
        losses.append(result.losses[0])
        sides.append(torch.cat([edit.sides()[0].flatten() for edit in gated_edits(net, "default").values()]))
    assert losses[0] == losses[1]  # of the one step, before anything moved
    assert not torch.equal(*sides)


@pytest.mark.parametrize("spec", [None, AdapterSpec("conv_dora", rank=2), ADA_LORA], ids=["plain", "dora", "ada_lora"])
def test_groups_of_patches_give_the_gradients_of_the_whole_step(
    make_net, source, settings, tmp_path, spec, monkeypatch
):
    """With a loss that is a mean over voxels, that is."""
    from segraft.training import losses

    mean = torch.nn.functional.binary_cross_entropy_with_logits
    monkeypatch.setitem(losses.LOSSES, "dice_ce", lambda: mean)
    nets, results = [], []
    for at_once in (None, 1, 3):
        net = make_net().double()
        if spec is not None:
            graft(net, spec)
        asked = settings(epochs=2, volumes=2, patches=2, patches_at_once=at_once, precision="32")
        monkeypatch.setattr(SegmentationTask, "_logits", lambda self, image, shape: self.net(image.double()))
        results.append(fit(net, source, asked, checkpoint=tmp_path / "last.ckpt"))
        nets.append(net)
    for net, result in zip(nets[1:], results[1:], strict=True):
        assert result.losses == pytest.approx(results[0].losses, abs=1e-6)
        for key, value in nets[0].state_dict().items():
            torch.testing.assert_close(net.state_dict()[key], value, atol=1e-6, rtol=1e-6)


def test_a_group_is_all_that_goes_through_the_network_at_a_time(make_net, source, settings, checkpoint):
    net, seen = make_net(), []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    fit(net, source, settings(epochs=1, volumes=3, patches_at_once=4), checkpoint=checkpoint)
    assert seen == [4, 2, 2]  # of two patches a volume; the last step has the fourth volume alone


def test_the_peak_of_memory_is_told(make_net, source, settings, checkpoint):
    result = fit(make_net(), source, settings(epochs=1), checkpoint=checkpoint)
    assert result.peak_bytes > 100 * 2**20  # torch alone takes more
    assert "peak memory" in result.summary()
