"""Gated updates and the control of their rank, against loops written from the papers' formulas and against PEFT."""

import math

import pytest
import torch
from torch import nn

from segraft.adapters import (
    PRESETS,
    AdapterSpec,
    Budget,
    Proximal,
    RankControlled,
    graft,
    load,
    merge,
    parameter_table,
    prune,
    ranks_in_use,
    read_header,
    require_gradients,
    save,
)
from segraft.adapters.rank_control import gated_edits, soft_threshold
from segraft.errors import SegraftError

GATED = [name for name, preset in PRESETS.items() if preset.gate != "none"]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose3d(5, 4, 2, stride=2),
        nn.Conv3d(4, 4, 3, groups=2, padding="same", padding_mode="reflect"),
        nn.Flatten(2),
        nn.Linear(64, 7),
    ).to(dtype)


def batch(dtype=torch.float64):
    return torch.randn(2, 2, 2, 2, 2, generator=torch.Generator().manual_seed(5)).to(dtype)


def gates(net):
    return {key: edit.v for key, edit in gated_edits(net, "default").items()}


def optimiser_for(net, control, rate=1e-2):
    moved = {id(gate) for gate in control.gates}
    free = [value for value in net.parameters() if value.requires_grad and id(value) not in moved]
    return torch.optim.AdamW([{"params": free, "lr": rate}, {"params": control.gates, "lr": 0.0}], weight_decay=0)


def train(net, control, steps=6, rate=1e-2, x=None):
    optimiser = optimiser_for(net, control, rate)
    x = batch() if x is None else x
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (net(x) - 1).square().mean()
        penalty = control.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimiser.step()
        control.step(rate)


@pytest.mark.parametrize("x", [-1.5, -0.5, -0.2, 0.0, 0.5, 0.51, 2.0])
def test_soft_threshold_is_that_of_the_paper(x):
    tau = 0.5
    wanted = x - tau if x > tau else x + tau if x < -tau else 0.0
    assert soft_threshold(torch.tensor(x, dtype=torch.float64), tau).item() == pytest.approx(wanted, abs=1e-15)


def reference_arena(w0, a, b, v, x, y, *, penalty, rho, rates):
    """The paper's loop in plain tensors: gradient steps on A and B, then the proximal step on v."""
    a, b, v = a.clone(), b.clone(), v.clone()
    for rate in rates:
        for tensor in (a, b, v):
            tensor.requires_grad_()
        weight = w0 + b @ torch.diag(v) @ a
        loss = ((x @ weight.t()) - y).square().mean()
        of_a, of_b, of_v = torch.autograd.grad(loss, (a, b, v))
        with torch.no_grad():
            z = v - rho * of_v
            tau = rate * penalty
            v = torch.where(z > tau, z - tau, torch.where(z < -tau, z + tau, torch.zeros_like(z)))
            a, b = (a - rate * of_a).detach(), (b - rate * of_b).detach()
    return a, b, v


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_fifty_steps_agree_with_a_loop_written_from_the_paper(rho):
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    x, y = torch.randn(20, 6).double(), torch.randn(20, 5).double()
    w0 = layer[0].weight.detach().clone()
    penalty, rates = 0.5, [1e-2 * (1 + math.cos(math.pi * t / 50)) / 2 for t in range(50)]
    spec = AdapterSpec("arena", rank=8, control={"penalty": penalty, "step": rho})
    graft(layer, spec)
    edit = gated_edits(layer, "default")["0.weight"]
    wanted = reference_arena(
        w0, edit.A.detach(), edit.B.detach(), edit.v.detach(), x, y, penalty=penalty, rho=rho, rates=rates
    )
    control = RankControlled(layer, 50)
    optimiser = torch.optim.SGD([{"params": [edit.A, edit.B], "lr": 0.1}, {"params": control.gates, "lr": 0.0}])
    for rate in rates:
        optimiser.param_groups[0]["lr"] = rate
        optimiser.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimiser.step()
        control.step(rate)
    for name, reference in zip(("A", "B", "v"), wanted, strict=True):
        torch.testing.assert_close(getattr(edit, name).detach(), reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("penalty", [0.2, 0.5, 1.5])
def test_without_a_gradient_the_rank_falls_as_the_start_and_the_schedule_say(penalty):
    net = network()
    graft(net, AdapterSpec("arena", rank=16, control={"penalty": penalty}))
    control, rates = RankControlled(net, 30), [0.02 * (1 + math.cos(math.pi * t / 30)) / 2 for t in range(30)]
    start = {key: gate.detach().clone() for key, gate in gates(net).items()}
    optimiser = optimiser_for(net, control)
    shrunk = 0.0
    for rate in rates:
        optimiser.zero_grad()
        net(batch()).square().mean().backward()
        optimiser.step()
        control.step(rate)
        shrunk += rate * penalty
        wanted = sum(int((gate.abs() > shrunk).sum()) for gate in start.values())
        used = ranks_in_use(net)
        assert used.used == wanted
        assert used.start == 16 * len(start)
    for key, gate in gates(net).items():
        left = (start[key].abs() - shrunk).clamp_min(0) * start[key].sign()
        torch.testing.assert_close(gate.detach(), left, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", GATED)
@pytest.mark.parametrize("factorisation", ["lora", "lora_c", "cp", "tucker"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_directions_not_in_use_are_dropped_and_nothing_else_changes(method, factorisation, magnitude, tmp_path):
    net = network()
    graft(net, AdapterSpec(method, rank=4, factorisation=factorisation, magnitude=magnitude, bias="low_rank"))
    train(net, RankControlled(net, 6), steps=6)
    with torch.no_grad():
        for number, gate in enumerate(gates(net).values()):
            gate[: number % 5] = 0  # one layer keeps all, one nothing
    net.eval()
    y, used = net(batch()).detach(), ranks_in_use(net)
    assert used.used < used.start
    path = save(net, tmp_path / "a.safetensors")
    assert torch.equal(net(batch()), y)  # what is in memory stays whole
    header = read_header(path)
    assert sum(now for now, _ in header.ranks.values()) == used.used
    assert {start for _, start in header.ranks.values()} == {4}

    loaded = load(network(), path).eval()
    torch.testing.assert_close(loaded(batch()), y, atol=1e-12, rtol=0)
    assert ranks_in_use(loaded) == used
    before = parameter_table(net).trainable
    assert parameter_table(loaded).trainable < before
    prune(net)
    assert parameter_table(net).trainable == parameter_table(loaded).trainable
    torch.testing.assert_close(net(batch()), y, atol=1e-12, rtol=0)
    again = save(loaded, tmp_path / "b.safetensors")
    assert read_header(again).ranks == header.ranks
    merge(loaded)
    torch.testing.assert_close(loaded(batch()), y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", GATED)
def test_a_pruned_adapter_trains_on(method, tmp_path):
    net = network()
    graft(net, AdapterSpec(method, rank=3))
    train(net, RankControlled(net, 3), steps=3)
    with torch.no_grad():
        first, second, *_ = gates(net).values()
        first.zero_()
        second[1:] = 0
    loaded = load(network(), save(net, tmp_path / "a.safetensors"))
    before = (loaded(batch()) - 1).square().mean()
    before.backward()
    require_gradients(loaded)
    train(loaded, RankControlled(loaded, 20), steps=20)
    assert (loaded(batch()) - 1).square().mean() < before


def test_a_file_that_claims_more_directions_than_its_spec_is_refused(tmp_path):
    wide, narrow = network(), network()
    graft(wide, AdapterSpec("arena", rank=6))
    path = save(wide, tmp_path / "a.safetensors")
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["segraft"])
    header["spec"]["rank"] = 4
    save_file(load_file(path), path, metadata={"segraft": json.dumps(header)})
    with pytest.raises(SegraftError, match="have another shape"):
        load(narrow, path)


class TestBudget:
    def test_the_schedule_is_the_papers(self):
        control, total, start, target = Budget(warm_up=0.1, settled=0.3), 100, 120, 40
        for t in range(1, 101):
            if t <= 10:
                wanted = 120
            elif t >= 70:
                wanted = 40
            else:
                wanted = int(40 + 80 * (1 - (t - 10) / (100 - 10 - 30)) ** 3)
            assert control.directions(t, total, start, target) == wanted

    def test_the_penalty_is_the_distance_from_orthogonal_sides_and_enters_the_gradient(self):
        net = nn.Sequential(nn.Linear(4, 5), nn.Conv2d(1, 3, 2)).double()
        graft(net, AdapterSpec("ada_lora", rank=2, control={"orthogonality": 0.3}))
        p, q = net[0].segraft["default"]["weight"].B, net[0].segraft["default"]["weight"].A
        k, c = net[1].segraft["default"]["weight"].B, net[1].segraft["default"]["weight"].A
        eye = torch.eye(2).double()
        wanted = sum(((side @ side.t()) - eye).square().sum() for side in (p.t(), q, k.t(), c.reshape(2, -1)))
        penalty = RankControlled(net, 10).penalty()
        torch.testing.assert_close(penalty, 0.3 * wanted)
        penalty.backward()
        assert p.grad.abs().sum() > 0
        assert c.grad.abs().sum() > 0

    @pytest.mark.parametrize("every", [1, 4])
    def test_the_budget_is_kept_after_every_choice_and_the_last_one_stays(self, every):
        net = network()
        graft(
            net, AdapterSpec("ada_lora", rank=6, control={"target": 2, "warm_up": 0.2, "settled": 0.4, "every": every})
        )
        control = RankControlled(net, 20)
        optimiser = optimiser_for(net, control)
        patterns = []
        for t in range(1, 21):
            optimiser.zero_grad()
            ((net(batch()) - 1).square().mean() + control.penalty()).backward()
            optimiser.step()
            control.step(1e-2)
            budget = Budget(warm_up=0.2, settled=0.4).directions(t, 20, 24, 8)
            if t > 4 and (t % every == 0 or t >= 12):
                assert ranks_in_use(net).used == budget
            patterns.append([gate.detach() != 0 for gate in gates(net).values()])
        assert ranks_in_use(net).used == 2 * 4
        for pattern in patterns[12:]:
            assert all(torch.equal(a, b) for a, b in zip(pattern, patterns[11], strict=True))

    def test_the_same_directions_stay_as_in_peft(self):
        from peft import AdaLoraConfig, get_peft_model

        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))
        steps, start, target = 30, 6, 2
        config = AdaLoraConfig(
            init_r=start, target_r=target, tinit=5, tfinal=9, deltaT=3, beta1=0.85, beta2=0.8, total_step=steps,
            target_modules=["0", "2"],
        )  # fmt: skip
        peer = get_peft_model(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5)), config)
        settings = {"target": target, "warm_up": 5 / 30, "settled": 9 / 30, "every": 3, "smoothing": 0.85}
        graft(net, AdapterSpec("ada_lora", rank=start, control={**settings, "uncertainty": 0.8}))
        control = RankControlled(net, steps)
        edits = gated_edits(net, "default")
        generator = torch.Generator().manual_seed(3)
        for t in range(1, steps + 1):
            for key, edit in edits.items():
                theirs = peer.base_model.model[int(key[0])]
                pairs = ((edit.A, theirs.lora_A), (edit.B, theirs.lora_B), (edit.v, theirs.lora_E))
                for ours, held in pairs:
                    their = held["default"]
                    step = torch.randn(ours.shape, generator=generator)
                    with torch.no_grad():
                        ours.add_(0.1 * step)
                        their.copy_(ours.view(their.shape))
                    ours.grad = torch.randn(ours.shape, generator=generator)
                    their.grad = ours.grad.clone().view(their.shape)
            control.step(1e-3)
            peer.base_model.update_and_allocate(t)
            for key, edit in edits.items():
                theirs = peer.base_model.model[int(key[0])].lora_E["default"]
                torch.testing.assert_close(edit.v.detach(), theirs.detach().flatten(), msg=f"step {t}, {key}")
        assert ranks_in_use(net).used == 2 * target

    def test_what_is_remembered_survives_a_checkpoint(self):
        nets = [network(), network()]
        controls = []
        for net in nets:
            graft(net, AdapterSpec("ada_lora", rank=4, control={"target": 1, "warm_up": 0.1, "settled": 0.2}))
            controls.append(RankControlled(net, 20))
        train(nets[0], controls[0], steps=10)
        nets[1].load_state_dict(nets[0].state_dict())
        controls[1].load_state_dict(controls[0].state_dict())
        for net, control in zip(nets, controls, strict=True):
            train(net, control, steps=8)
        for ours, theirs in zip(gates(nets[0]).values(), gates(nets[1]).values(), strict=True):
            assert torch.equal(ours, theirs)

    def test_a_budget_above_the_rank_is_refused(self):
        with pytest.raises(SegraftError, match=r"5 directions per weight is above the rank 4.* or a lower target"):
            AdapterSpec("ada_lora", rank=4, control={"target": 5})
        # of several ranks only their sum can tell
        net = graft(network(), AdapterSpec("ada_lora", rank=2, ranks={"0": 5}, control={"target": 4}))
        with pytest.raises(SegraftError, match=r"4 directions per weight .* than the 2.75 .* higher rank, or a lower"):
            RankControlled(net, 10)


def test_a_network_without_gates_is_left_alone():
    net = graft(network(), AdapterSpec("conv_dora", rank=2))
    control = RankControlled(net, 10)
    assert control.penalty() is None
    assert control.gates == []
    control.step(0.1)
    assert ranks_in_use(net) is None
    assert ranks_in_use(network()) is None
    prune(net)


def test_only_adapters_that_train_are_controlled():
    net = graft(network(), AdapterSpec("arena", rank=4), "first")
    graft(net, AdapterSpec("arena", rank=4), "second")
    control = RankControlled(net, 10)
    assert list(control.runners) == ["second"]


@pytest.mark.parametrize("gate", ["uniform", "zero"])
def test_a_gate_of_fixed_rank_trains_as_any_factor(gate):
    net = graft(network(), AdapterSpec("conv_lora", rank=4, gate=gate))
    before = {key: value.detach().clone() for key, value in gates(net).items()}
    control = RankControlled(net, 10)
    assert not control.runners
    train(net, control, steps=3)
    assert all((value != before[key]).all() for key, value in gates(net).items())


def test_the_starts_are_those_of_the_papers():
    arena = gated_edits(graft(network(), AdapterSpec("arena", rank=64)), "default")
    values = torch.cat([edit.v.detach() for edit in arena.values()])
    assert values.abs().max() <= 1
    assert values.min() < -0.9
    assert values.max() > 0.9
    assert abs(values.mean()) < 0.15
    assert all((edit.factors()[0] == 0).all() for edit in arena.values())
    ada = gated_edits(graft(network(), AdapterSpec("ada_lora", rank=64)), "default")
    for edit in ada.values():
        assert (edit.v == 0).all()
        for side in edit.sides():
            assert side.detach().norm(dim=1).mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora", "control": "proximal"}, "'proximal' works on a gate: choose gate 'uniform' or 'zero'"),
        ({"method": "arena", "control": "greedy"}, "unknown rank control 'greedy': choose one of fixed, proximal"),
        ({"method": "arena", "control": {"rho": 1}}, "rank control 'proximal' has no setting 'rho': it has penalty"),
        ({"method": "arena", "control": {"penalty": -1}}, "penalty is -1: it must be a number, at least 0"),
        ({"method": "arena", "control": {"penalty": "much"}}, "penalty is 'much': it must be a number"),
        ({"method": "ada_lora", "control": {"warm_up": 0.7}}, "together they must not exceed 1"),
        ({"method": "ada_lora", "control": {"smoothing": 1.0}}, "smoothing is 1.0: .* below 1"),
        ({"method": "ada_lora", "control": {"every": 1.5}}, "every is 1.5: it must be a whole number"),
        ({"method": "ada_lora", "control": {"every": 0}}, "every is 0: it must be a number, at least 1"),
        ({"method": "lora", "gate": "open"}, "unknown gate 'open': choose 'none', 'uniform' or 'zero'"),
        ({"method": "arena", "control": {"kind": []}}, "unknown rank control"),
        ({"method": "ada_lora", "control": "proximal"}, "a gate that starts at zero stays there"),
        ({"method": "none", "gate": "zero"}, "method 'none' has no factors, so .* gate"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(SegraftError, match=message):
        AdapterSpec(**options)


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec("arena"),
        AdapterSpec("arena", control="fixed"),
        AdapterSpec("arena", gate="zero", control=Proximal(0.1, 0.2)),
        AdapterSpec("dora_c", gate="uniform", control="budget"),
        AdapterSpec("ada_lora", control={"target": 3.5}),
    ],
)
def test_a_spec_survives_json(spec):
    import json

    assert AdapterSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_specs_without_a_gate_read_as_before():
    assert not {"gate", "control"} & set(AdapterSpec("dora_c").to_dict())
    assert AdapterSpec("arena", control={"step": 0.1}).rank_control == Proximal(0.5, 0.1)


@pytest.mark.parametrize("method", GATED)
def test_a_step_that_mixed_precision_skips_leaves_gates_and_memory_alone(method):
    """Gradients overflow in the first steps there: the optimiser is passed over, and so are the gates."""
    net = graft(network(), AdapterSpec(method, rank=4))
    control = RankControlled(net, 20)
    with torch.no_grad():
        for gate in gates(net).values():
            gate.uniform_(-1, 1)
    before = {key: gate.detach().clone() for key, gate in gates(net).items()}
    for value in net.parameters():
        if value.requires_grad:
            value.grad = torch.full_like(value, math.inf)
    control.step(0.1)
    assert all(torch.equal(gate, before[key]) for key, gate in gates(net).items())
    train(net, control, steps=19)
    assert all(gate.isfinite().all() for gate in gates(net).values())
    state = control.state_dict()["default"]
    assert all(value.isfinite().all() for value in state.values())
    if method == "ada_lora":
        assert ranks_in_use(net).used == round(4 * 4 * 2 / 3)  # its budget went by the steps of the training


def test_a_training_does_not_stop_before_its_budget_has_settled():
    net = graft(network(), AdapterSpec("ada_lora", rank=4, control={"warm_up": 0, "settled": 0.5}))
    control = RankControlled(net, 10)
    allowed = []
    for _ in range(10):
        allowed.append(control.may_stop)
        train(net, control, steps=1)
    assert allowed == [False] * 5 + [True] * 5
    assert RankControlled(graft(network(), AdapterSpec("arena")), 10).may_stop


def test_networks_of_others_name_their_projections_however_they_were_built():
    from monai.networks.nets import SwinUNETR

    import segraft.networks  # noqa: F401  its table

    arguments = {"in_channels": 1, "out_channels": 1, "feature_size": 12, "depths": (1, 1, 1, 1)}
    net = graft(SwinUNETR(**arguments), AdapterSpec("arena", rank=2))
    assert {key.rpartition(".")[2] for key in gates(net)} == {
        f"weight_{k * d}_{(k + 1) * d}" for d in (12, 24, 48, 96) for k in (1, 2)
    }
    with pytest.raises(SegraftError, match=r"named as a whole \(\.\*\\.attn\\.qkv\) and by its projections"):
        graft(SwinUNETR(**arguments), AdapterSpec("arena", targets=("key", r".*\.attn\.qkv")))
    with pytest.raises(SegraftError, match="its projections query, key, value"):
        graft(SwinUNETR(**arguments), AdapterSpec("arena", targets="keys"))
