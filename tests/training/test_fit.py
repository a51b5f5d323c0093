"""Trainings on a tiny cohort: what they learn, what they leave alone, what stops them."""

import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn

from segraft.adapters import AdapterSpec, DeadFactorsError, activated, adapter_tensors, fingerprint, graft, ungraft
from segraft.errors import SegraftError
from segraft.training import callbacks
from segraft.training.callbacks import EpochCheckpoint
from segraft.training.fit import check_device, fit
from segraft.training.module import NonFiniteLossError, SegmentationTask


def trained(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters() if value.requires_grad}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert list(first) == list(second)
    return all(torch.equal(value, second[name]) for name, value in first.items())


class Unused(nn.Module):
    """Has a convolution that its forward pass never calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forgotten = net, nn.Conv3d(1, 1, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net(image)


class Wrong(nn.Module):
    """Returns something else than one logit per label on the grid of the image."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self.conv, self.change = nn.Conv3d(1, 1, 1), change

    def forward(self, image: torch.Tensor) -> object:
        return self.change(self.conv(image))


class Exploding(nn.Module):
    """NaN from the third forward pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv3d(1, 1, 1), 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.conv(image) * (float("nan") if self.calls > 2 else 1)


# --- learning


@pytest.mark.parametrize("loss", ["dice_ce", "overlap"])
@pytest.mark.parametrize("spec", [None, AdapterSpec("dora_c", rank=2, train="head")], ids=["full", "dora_c"])
def test_the_loss_falls(make_net, source, settings, checkpoint, spec, loss):
    net = make_net()
    if spec is not None:
        graft(net, spec)
    result = fit(net, source, settings(epochs=8, loss=loss, schedule="constant"), checkpoint=checkpoint)
    assert len(result.losses) == 8
    assert result.losses[-1] < result.losses[0] - 0.1
    assert result.device == "cpu"
    assert not result.converged
    assert result.summary().startswith(f"loss {result.losses[-1]:.3f}, done after 8 epochs")
    assert not net.training
    assert {value.device.type for value in net.parameters()} == {"cpu"}


def test_slices_train_a_flat_network(make_net, flat_source, settings, checkpoint):
    result = fit(make_net(spatial_dims=2), flat_source, settings(epochs=4), checkpoint=checkpoint)
    assert result.losses[-1] < result.losses[0]


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps(make_net, source, settings, checkpoint, monkeypatch):
    seen = []
    step = SegmentationTask.training_step

    def spy(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        seen.append(loss["loss"].item())
        return loss

    monkeypatch.setattr(SegmentationTask, "training_step", spy)
    result = fit(make_net(), source, settings(volumes=1), checkpoint=checkpoint)
    assert len(seen) == 2 * 4
    assert result.losses == pytest.approx([sum(seen[:4]) / 4, sum(seen[4:]) / 4])


def test_the_seed_alone_decides(make_net, source, settings, checkpoint):
    results = []
    for noise, seed in ((1, 0), (2, 0), (1, 1)):
        net = graft(make_net(dropout=True), AdapterSpec("dora_c", rank=2))
        torch.manual_seed(noise)
        fit(net, source, settings(seed=seed), checkpoint=checkpoint)
        results.append(trained(net))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [0.02] * 4), ("cosine", [0.02, 0.02 * 0.853553, 0.01, 0.02 * 0.146447])]
)
def test_learning_rates_follow_the_schedule(make_net, source, settings, checkpoint, rates, schedule, expected):
    fit(make_net(), source, settings(schedule=schedule), checkpoint=checkpoint)
    assert rates == pytest.approx(expected, rel=1e-5)


def test_onecycle_rises_and_falls(make_net, source, settings, checkpoint, rates):
    fit(make_net(), source, settings(schedule="onecycle", epochs=5), checkpoint=checkpoint)
    assert max(rates) == pytest.approx(0.02)
    assert 0 < rates.index(max(rates)) < 5
    assert rates[0] < 0.001
    assert rates[-1] < 0.001


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "constant"])
def test_the_shortest_trainings(make_net, source, settings, checkpoint, schedule, epochs):
    result = fit(make_net(), source, settings(epochs=epochs, volumes=4, schedule=schedule), checkpoint=checkpoint)
    assert len(result.losses) == epochs


def test_bf16_stays_finite(make_net, source, settings, checkpoint):
    net = graft(make_net(), AdapterSpec("dora_c", rank=2))
    result = fit(net, source, settings(precision="bf16", epochs=3), checkpoint=checkpoint)
    assert result.losses[-1] < result.losses[0]
    assert all(torch.isfinite(value).all() for value in net.parameters())
    assert {value.dtype for value in net.parameters()} == {torch.float32}


def test_progress_is_drawn_where_it_is_asked_for(make_net, source, settings, checkpoint, capsys):
    console = Console(record=True, force_terminal=True, width=80)
    fit(make_net(), source, settings(), checkpoint=checkpoint, title="grafting", console=console)
    assert "grafting" in console.export_text()
    capsys.readouterr()
    fit(make_net(), source, settings(), checkpoint=checkpoint)
    assert capsys.readouterr() == ("", "")


def test_a_network_in_evaluation_mode_trains_like_any_other(make_net, source, settings, checkpoint):
    """As networks come from `load_base` or an earlier training: dropout and batch statistics are at work again."""
    results = []
    for training in (True, False):
        net = make_net(dropout=True, norm="batch").train(training)
        fit(net, source, settings(), checkpoint=checkpoint)
        results.append(dict(net.state_dict()))
    assert same(*results)
    assert int(results[0]["net.encoder.0.1.num_batches_tracked"]) == 4


# --- what a training leaves alone


@pytest.mark.parametrize("norm", [None, "instance", "batch"])
@pytest.mark.parametrize(
    "spec",
    [AdapterSpec("dora_c", rank=2), AdapterSpec("cp_lora", rank=2, bias="low_rank"), AdapterSpec("none", train=".*")],
    ids=["dora_c", "cp_lora", "full"],
)
def test_the_base_stays_as_it_was(make_net, source, settings, checkpoint, norm, spec):
    net = make_net(norm=norm)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    mark, image = fingerprint(net), torch.rand(1, 1, 8, 8, 8)
    start = net.eval()(image)
    graft(net, spec)
    fit(net, source, settings(), checkpoint=checkpoint)
    assert fingerprint(net) == mark
    with torch.inference_mode(), activated(net, None):
        assert torch.equal(net(image), start)
    assert not torch.equal(net(image), start)
    after = ungraft(net).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_running_statistics_move_in_the_adapter_and_not_in_the_base(make_net, source, settings, checkpoint):
    net = make_net(norm="batch")
    graft(net, AdapterSpec("dora_c", rank=2))
    before = {key: value.clone() for key, value in adapter_tensors(net, "default").items() if "running" in key}
    fit(net, source, settings(), checkpoint=checkpoint)
    after = adapter_tensors(net, "default")
    assert before
    assert all(not torch.equal(value, after[key]) for key, value in before.items())
    assert all(
        torch.equal(value, torch.full_like(value, float(key.endswith("var"))))
        for key, value in ungraft(net).state_dict().items()
        if key.endswith(("running_mean", "running_var"))
    )


# --- what stops a training


def test_a_loss_that_is_not_finite_names_step_and_cases(source, settings, checkpoint):
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan at step 2 on cases scan\d, scan\d: ") as caught:
        fit(Exploding(), source, settings(volumes=2), checkpoint=checkpoint)
    assert "\n" not in str(caught.value)
    assert checkpoint.is_file()  # of the first epoch, which went well: two steps of two scans


def test_a_layer_that_is_never_called_is_named(make_net, source, settings, checkpoint):
    for spec, name in (
        (AdapterSpec("none", train=".*"), "forgotten.segraft.default.weight.value"),
        (AdapterSpec("dora_c", rank=1), "forgotten.segraft.default.weight.B"),
    ):
        with pytest.raises(DeadFactorsError) as caught:
            fit(graft(Unused(make_net()), spec), source, settings(), checkpoint=checkpoint)
        assert name in str(caught.value)
        assert "net.decoder" not in str(caught.value)


def test_a_plain_network_may_have_layers_that_it_never_calls(make_net, source, settings, checkpoint):
    """As ViTs of MONAI have: there is no adapter that would silently train nothing."""
    fit(Unused(make_net()), source, settings(epochs=1), checkpoint=checkpoint)


def test_a_layer_that_is_never_called_may_be_left_out(make_net, source, settings, checkpoint):
    for spec in (
        AdapterSpec("dora_c", rank=1, exclude="forgotten"),
        AdapterSpec("none", train=".*", exclude="forgotten"),
    ):
        fit(graft(Unused(make_net()), spec), source, settings(epochs=1), checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda logits: logits[..., 1:], r"\(4, 1, 8, 8, 7\)"),
        (lambda logits: logits.expand(-1, 2, -1, -1, -1), r"\(4, 2, 8, 8, 8\)"),
        (lambda logits: [logits], "list"),
        (lambda logits: {"out": logits}, "dict"),
    ],
)
def test_wrong_outputs(source, settings, checkpoint, change, shape):
    with pytest.raises(SegraftError, match=f"Wrong gives {shape} for patches whose labels are"):
        fit(Wrong(change), source, settings(), checkpoint=checkpoint)
    assert not checkpoint.exists()


def test_nothing_to_train(make_net, source, settings, checkpoint):
    with pytest.raises(SegraftError, match="nothing would be trained"):
        fit(make_net().requires_grad_(requires_grad=False), source, settings(), checkpoint=checkpoint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device(make_net, source, settings, checkpoint):
    with pytest.raises(SegraftError, match="'cuda' is not available"):
        fit(make_net(), source, settings(device="cuda"), checkpoint=checkpoint)
    assert check_device("cpu") == "cpu"
    assert check_device("auto") == "auto"


def test_convergence_stops(make_net, source, settings, checkpoint):
    """With a vanishing learning rate the loss stays, up to the patches' noise, where it is."""
    result = fit(
        make_net(),
        source,
        settings(epochs=60, volumes=4, learning_rate=1e-12, stop_when_converged=True),
        checkpoint=checkpoint,
    )
    assert result.converged
    assert 20 <= len(result.losses) < 60
    assert callbacks.has_converged(result.losses)
    assert not any(callbacks.has_converged(result.losses[:n]) for n in range(len(result.losses)))
    assert "converged after" in result.summary()


def test_convergence_does_not_stop_what_did_not_ask_for_it(make_net, source, settings, checkpoint, monkeypatch):
    monkeypatch.setattr(callbacks, "has_converged", lambda _losses: True)
    result = fit(make_net(), source, settings(epochs=3), checkpoint=checkpoint)
    assert (len(result.losses), result.converged) == (3, False)


def test_ctrl_c_reaches_the_caller_and_leaves_a_checkpoint(make_net, source, settings, checkpoint, monkeypatch):
    class Impatient(EpochCheckpoint):
        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.current_epoch == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("segraft.training.fit.EpochCheckpoint", Impatient)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(make_net(), source, settings(epochs=3), checkpoint=checkpoint)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 0


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of every step, as it was taken."""
    taken: list[float] = []

    class Watching(EpochCheckpoint):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            taken.append(optimizer.param_groups[0]["lr"])

    assert issubclass(Watching, Callback)
    monkeypatch.setattr("segraft.training.fit.EpochCheckpoint", Watching)
    return taken
