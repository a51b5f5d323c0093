"""A training that was stopped and resumed is, bit for bit, the training that was not."""

import pytest
import torch
from torch import nn

from segraft.adapters import AdapterSpec, graft
from segraft.errors import SegraftError
from segraft.training import callbacks
from segraft.training.callbacks import EpochCheckpoint
from segraft.training.fit import fit


class Stopped(Exception):  # noqa: N818
    """Power cut."""


DORA = AdapterSpec("dora_c", rank=2, train=(r"net\.head\..*", "norm:.*"))


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of every step, whatever run took it."""
    taken: list[float] = []
    monkeypatch.setattr(
        EpochCheckpoint,
        "on_before_optimizer_step",
        lambda self, trainer, pl_module, optimizer: taken.append(optimizer.param_groups[0]["lr"]),
    )
    return taken


@pytest.fixture
def stopping_after(monkeypatch):
    """stopping_after(epochs): the next training dies after the checkpoint of that many epochs; None: it does not."""
    whole = EpochCheckpoint.on_train_epoch_end

    def arrange(epochs: int | None, *, within_next: bool = False) -> None:
        def write(self, trainer, pl_module) -> None:
            whole(self, trainer, pl_module)
            if not within_next and trainer.current_epoch + 1 == epochs:
                raise Stopped

        def step(self, trainer, *args) -> None:
            if within_next and trainer.current_epoch == epochs:
                raise Stopped

        monkeypatch.setattr(EpochCheckpoint, "on_train_epoch_end", write)
        monkeypatch.setattr(EpochCheckpoint, "on_train_batch_end", step, raising=False)

    return arrange


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("within_next", [False, True], ids=["after-epoch", "within-epoch"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
@pytest.mark.parametrize("spec", [None, DORA], ids=["full", "dora_c"])
def test_resuming_is_exact(
    make_net, source, settings, checkpoint, stopping_after, rates, spec, schedule, norm, within_next
):
    chosen = settings(epochs=4, schedule=schedule, weight_decay=0.01)

    def net() -> nn.Module:
        made = make_net(dropout=True, norm=norm)
        return made if spec is None else graft(made, spec)

    whole = net()
    in_one_go = fit(whole, source, chosen, checkpoint=checkpoint.with_name("whole.ckpt"))
    taken = rates[:]
    rates.clear()
    stopping_after(2, within_next=within_next)
    with pytest.raises(Stopped):
        fit(net(), source, chosen, checkpoint=checkpoint)
    del rates[4:]  # the step of the third epoch was lost with it
    stopping_after(None)
    torch.manual_seed(99)  # another process has another state
    resumed = net()
    result = fit(resumed, source, chosen, checkpoint=checkpoint, resume=True)
    assert result.losses == in_one_go.losses
    assert rates == taken
    assert len(taken) == 8
    assert_same(state(whole), state(resumed))


def test_resuming_a_finished_training_changes_nothing(make_net, source, settings, checkpoint):
    net, again = make_net(dropout=True), make_net(dropout=True)
    done = fit(net, source, settings(), checkpoint=checkpoint)
    assert fit(again, source, settings(), checkpoint=checkpoint, resume=True).losses == done.losses
    assert_same(state(net), state(again))


def test_resuming_a_converged_training_does_not_go_on(make_net, source, settings, checkpoint, monkeypatch):
    monkeypatch.setattr(callbacks, "has_converged", lambda losses: len(losses) == 2)
    chosen = settings(epochs=5, stop_when_converged=True)
    net, again = make_net(), make_net()
    done = fit(net, source, chosen, checkpoint=checkpoint)
    assert done.converged
    result = fit(again, source, chosen, checkpoint=checkpoint, resume=True)
    assert (result.losses, result.converged) == (done.losses, True)
    assert_same(state(net), state(again))


def test_the_checkpoint_of_an_adapter_leaves_the_base_out(make_net, source, settings, checkpoint):
    net = graft(make_net(), AdapterSpec("dora_c", rank=1))
    fit(net, source, settings(epochs=1), checkpoint=checkpoint)
    kept = set(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert kept == {f"net.{name}" for name, value in net.named_parameters() if value.requires_grad}
    assert all(".segraft." in key for key in kept)


def test_the_checkpoint_of_a_whole_training_holds_everything(make_net, source, settings, checkpoint):
    net = make_net(norm="batch")
    fit(net, source, settings(epochs=1), checkpoint=checkpoint)
    assert set(torch.load(checkpoint, weights_only=True)["state_dict"]) == {f"net.{key}" for key in net.state_dict()}
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize(
    "other",
    [
        None,
        AdapterSpec("lora_c", rank=2),
        AdapterSpec("dora_c", rank=3),
        AdapterSpec("dora_c", rank=2, exclude="head"),
        AdapterSpec("dora_c", rank=2, train="head"),
    ],
    ids=["full", "other-method", "other-rank", "fewer-layers", "more-tensors"],
)
def test_the_checkpoint_of_another_adapter_is_refused(make_net, source, settings, checkpoint, other):
    fit(graft(make_net(), AdapterSpec("dora_c", rank=2)), source, settings(epochs=1), checkpoint=checkpoint)
    net = make_net() if other is None else graft(make_net(), other)
    with pytest.raises(SegraftError, match="belongs to another network or adapter"):
        fit(net, source, settings(), checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(make_net, source, settings, checkpoint, share):
    fit(make_net(), source, settings(epochs=1), checkpoint=checkpoint)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SegraftError, match="is not a readable checkpoint") as caught:
        fit(make_net(), source, settings(), checkpoint=checkpoint, resume=True)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [1]])
def test_another_file_is_no_checkpoint(make_net, source, settings, tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(SegraftError, match="is no checkpoint of a training"):
        fit(make_net(), source, settings(), checkpoint=tmp_path / "weights.pt", resume=True)


def test_nothing_to_resume(make_net, source, settings, checkpoint):
    with pytest.raises(SegraftError, match="nothing to resume"):
        fit(make_net(), source, settings(), checkpoint=checkpoint, resume=True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    make_net, source, settings, checkpoint, stopping_after, monkeypatch
):
    fit(make_net(), source, settings(epochs=1), checkpoint=checkpoint)
    before = checkpoint.read_bytes()

    def half(_trainer, path) -> None:
        path.write_bytes(b"half")
        raise Stopped

    monkeypatch.setattr("lightning.Trainer.save_checkpoint", half)
    with pytest.raises(Stopped):
        fit(make_net(), source, settings(epochs=1), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
