"""Two processes train as one would. As a script this file is what they run: `test_distributed.py FOLDER DEVICES`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from segraft.adapters import AdapterSpec, graft
from segraft.data.cohort import Case
from segraft.data.patches import EpochSampler, PatchSource, shares
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.jobs import adapt, pretrain
from segraft.jobs.adapting import adapting_settings
from segraft.networks import UNet
from segraft.training import fit as fitting
from segraft.training.batch_norms import batch_norms_together
from segraft.training.callbacks import EpochCheckpoint
from segraft.training.distributed import Team, Together, is_first_process
from segraft.training.fit import fit
from segraft.training.settings import check_settings
from segraft.training.strategies import selectors

TORCHRUN = {"TORCHELASTIC_RUN_ID": "run", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "training", "SLURM_PROCID": "0"}
CASES, SECONDS = 5, 120  # a last batch of one case, for two processes; the longest that a run may take


class Double(UNet):
    """Computes in float64, so that another order of summing is as good as not seen."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.double()

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.double())


class Unused(UNet):
    """Has a convolution that its forward pass never calls."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.forgotten = nn.Conv3d(1, 1, 3)


TRAININGS: dict[str, tuple[AdapterSpec | None, dict[str, Any], dict[str, Any]]] = {
    # name: what is grafted, arguments of the network, settings
    "double": (AdapterSpec("dora_c", rank=2, train="head"), {}, {}),
    "contrast": (AdapterSpec("conv_lora", rank=2, bias="low_rank"), {}, {"contrast_copies": 2, "loss": "overlap"}),
    "batch norms": (None, {"norm": "batch"}, {"volumes": 2, "recompute": ("encoder",)}),
    "adapted batch norms": (
        AdapterSpec("dora_c", rank=2, train=selectors(["affine"])),
        {"norm": "batch"},
        {"recompute": ("decoder",), "volumes": 2},
    ),
    "unused": (None, {}, {"loss": "overlap", "weight_decay": 0.1}),
    "bf16": (AdapterSpec("dora_c", rank=2), {}, {"precision": "bf16"}),
    "converging": (None, {}, {"epochs": 60, "learning_rate": 1e-12, "stop_when_converged": True, "patches": 1}),
    "resumed": (AdapterSpec("dora_c", rank=2), {}, {"epochs": 4}),
}
NETWORKS = {"double": Double, "resumed": Double, "unused": Unused, "batch norms": Double, "adapted batch norms": Double}
TOLERANCE = {"contrast": 1e-5, "unused": 1e-5, "converging": 1e-5, "bf16": 1e-2}
"""How far losses may differ; the others, in float64, by 1e-9."""


def cohort(folder: Path) -> list[Case]:
    """Scans of 16 x 16 x 16 voxels with a bright ball, which is label 1."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(CASES):
        ball = np.linalg.norm(np.indices((16,) * 3).T - rng.integers(5, 11, 3), axis=-1) < 4
        image, label = rng.normal(0, 10, ball.shape) + 60 * ball, ball.astype(np.uint8)
        paths = [folder / kind / f"p{number}.nii.gz" for kind in ("imagesTr", "labelsTr")]
        for path, voxels in zip(paths, (image.astype(np.float32), label), strict=True):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
        found.append(Case(f"p{number}", f"p{number}", paths[:1], paths[1]))
    return found


class Copying(EpochCheckpoint):
    """Keeps the state after the second epoch, from which a training with more processes goes on."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch == 1:
            shutil.copy(self.path, self.path.with_name("second.ckpt"))


def train_all(folder: Path, devices: int) -> dict[str, Any]:
    """Every training above: its losses, whether it converged, and what it trained."""
    patches = {
        number: PatchSource(cohort(folder), Preparation(patch=(8, 8, 8)), [1], seed=0, patches_per_volume=number)
        for number in (1, 2)
    }
    results = {}
    for name, (spec, arguments, values) in TRAININGS.items():
        torch.manual_seed(0)
        kind = NETWORKS.get(name, UNet)
        net = kind(**({"spatial_dims": 3, "widths": (4, 8), "norm": "instance"} | arguments))
        if spec is not None:
            graft(net, spec)
        made = {"epochs": 3, "learning_rate": 0.01, "volumes": 4, "device": "cpu", "devices": devices} | values
        settings = check_settings(**made)
        checkpoint, resume = folder / f"{devices}" / f"{name}.ckpt", False
        if name == "resumed" and devices == 1:
            fitting.EpochCheckpoint = Copying  # type: ignore[misc]
        elif name == "resumed":
            checkpoint, resume = folder / "second.ckpt", True
        result = fit(net, patches[settings.patches], settings, checkpoint=checkpoint, resume=resume)
        fitting.EpochCheckpoint = EpochCheckpoint  # type: ignore[misc]
        results[name] = {
            "losses": result.losses,
            "converged": result.converged,
            "processes": result.processes,
            "trained": {key: value.detach().clone() for key, value in net.named_parameters() if value.requires_grad},
            "buffers": {key: value.clone() for key, value in net.named_buffers()},
        }
    return results


def script(folder: Path, devices: int) -> None:
    results = train_all(folder, devices)
    torch.save(results, folder / f"{'first' if is_first_process() else 'second'}.pt")


# --- the trainings above


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    """Results of one process, and of the first and the second of two."""
    folder = tmp_path_factory.mktemp("together")
    cohort(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting, "EpochCheckpoint", EpochCheckpoint)
        alone = train_all(folder, 1)
    shutil.copy(folder / "1" / "second.ckpt", folder / "second.ckpt")
    done = started([__file__, folder, 2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return alone, *(torch.load(folder / f"{name}.pt") for name in ("first", "second"))


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"}}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def started(arguments: list[object], **more: str) -> subprocess.CompletedProcess[str]:
    """A script in a process (and group) of its own, to its end."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env=environment(**more), start_new_session=True
    )


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one(together, name):
    alone, first, second = (results[name] for results in together)
    tolerance = TOLERANCE.get(name, 1e-9)
    assert (alone["processes"], first["processes"], second["processes"]) == (1, 2, 2)
    assert first["losses"] == pytest.approx(alone["losses"], abs=tolerance)
    assert first["converged"] == alone["converged"] == (name == "converging")
    assert list(first["trained"]) == list(alone["trained"])
    if name != "bf16":
        for key, value in (alone["trained"] | alone["buffers"]).items():
            torch.testing.assert_close((first["trained"] | first["buffers"])[key], value, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", TRAININGS)
def test_all_processes_end_with_the_same(together, name):
    _, first, second = (results[name] for results in together)
    assert first["losses"] == second["losses"]
    for kind in ("trained", "buffers"):
        assert all(torch.equal(value, second[kind][key]) for key, value in first[kind].items())


# --- the command line

COMMAND = "from segraft.cli import main\n\nif __name__ == '__main__':\n    main()\n"
NETWORKS_OF_A_USER = """
import os, signal
from segraft.errors import SegraftError
from segraft.jobs import adapt, pretrain
from segraft.jobs.adapting import adapting_settings
from segraft.networks import UNet

class Failing(UNet):
    calls = 0
    def forward(self, image):
        self.calls += self.training
        if self.calls == 3 and os.environ["LOCAL_RANK"] == "1":
            raise SegraftError("the second process has a problem: solve it.")
        return super().forward(image)

class Interrupted(UNet):
    calls = 0
    def forward(self, image):
        self.calls += self.training
        if self.calls == 8 and os.environ.get("LOCAL_RANK") == "0":
            os.killpg(0, signal.SIGINT)  # as Ctrl-C in a terminal does
        return super().forward(image)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of five, a base from it, an adapter made by one process; the command, and networks of a user."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "command.py").write_text(COMMAND)
    (folder / "networks_of_a_user.py").write_text(NETWORKS_OF_A_USER)
    pairs = [{"image": str(case.image), "label": str(case.label)} for case in cohort(folder)]
    listing = {"name": "Balls", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "ball"}, "training": pairs}
    (folder / "dataset.json").write_text(json.dumps(listing))
    pretrain(folder, folder / "base", settings=check_settings(epochs=1, device="cpu"), **TINY)
    adapt(folder / "base", folder, folder / "alone", spec=AdapterSpec("conv_lora", rank=2), settings=SHORT)
    return folder


TINY: dict[str, Any] = {"network_arguments": {"widths": [4, 8]}, "preparation": {"patch": [8, 8, 8]}}
SHORT = adapting_settings(epochs=3, device="cpu")


def adapting(work: Path, out: str, *more: object) -> list[object]:
    return [
        *(work / "command.py", "adapt", "--base", work / "base", "--data", work, "--method", "conv_lora"),
        *("--rank", 2, "--epochs", 3, "--device", "cpu", "--out", work / out, "--json", *more),
    ]


def adapter_of(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its record, and its tensors."""
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        return json.loads(file.metadata()["segraft"])["record"], {key: file.get_tensor(key) for key in [*file.keys()]}


@pytest.fixture(scope="module")
def devices(work: Path) -> subprocess.CompletedProcess[str]:
    """An adaptation by two processes on one machine."""
    return started(adapting(work, "devices", "--devices", 2))


def test_two_processes_on_one_machine_make_the_adapter_of_one(work, devices):
    assert devices.returncode == 0, devices.stderr
    told = json.loads(devices.stdout)["training"]  # of the first process alone: one object
    (alone, tensors), (record, values) = (adapter_of(work / name) for name in ("alone", "devices"))
    assert told == record["training"]
    assert told["processes"] == 2
    assert told["losses"] == pytest.approx(alone["training"]["losses"], abs=1e-5)
    assert record["settings"] == alone["settings"]
    assert {path.name for path in (work / "devices").iterdir()} == {"adapter.safetensors", "run.json"}
    assert (work / "devices" / "run.json").read_text() == (work / "alone" / "run.json").read_text()
    for key, value in tensors.items():
        torch.testing.assert_close(values[key], value, atol=1e-5, rtol=0)


def test_two_machines_with_a_process_each_make_the_same_bytes(work, devices):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [
        subprocess.Popen(
            [sys.executable, *map(str, adapting(work, "nodes", "--nodes", 2))],
            env=environment(**address, NODE_RANK=str(rank)),
            **PIPES,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [node.communicate(timeout=SECONDS) for node in nodes]
    finally:
        for node in nodes:
            node.kill()  # where it has not ended
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert json.loads(outputs[0][0])["training"]["losses"] == json.loads(devices.stdout)["training"]["losses"]
    assert outputs[1] == ("", "")
    first, second = (adapter_of(work / name)[1] for name in ("devices", "nodes"))
    assert list(first) == list(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def pretraining(work: Path, network: str, *more: object) -> list[object]:
    return [
        *(work / "command.py", "pretrain", "--data", work, "--network", f"networks_of_a_user:{network}"),
        *("--network-args", '{"spatial_dims": 3, "widths": [4, 8]}', "--patch", 8, 8, 8, "--device", "cpu"),
        *("--epochs", 4, "--out", work / network, *more),
    ]


def test_a_process_that_fails_ends_all_with_its_sentence(work):
    done = started(pretraining(work, "Failing", "--devices", 2, "--json"), PYTHONPATH=str(work))
    sentence = "the second process has a problem: solve it."
    assert done.returncode == 2, done
    assert json.loads(done.stdout) == {"error": f"process 1 of 2 stopped: {sentence}"}
    assert sorted(done.stderr.splitlines()) == [
        f"segraft: process 1 of 2 stopped: {sentence}",
        f"segraft: {sentence}",
    ]


def test_ctrl_c_ends_all_and_one_process_goes_on(work, monkeypatch):
    """Interrupted in the third of four epochs (of three steps each)."""
    done = started(pretraining(work, "Interrupted", "--devices", 2), PYTHONPATH=str(work))
    assert done.returncode == 130, done
    assert done.stderr.splitlines() == ["segraft: interrupted; a training (pretrain, adapt) goes on with --resume."]
    assert {path.name for path in (work / "Interrupted").iterdir()} == {"last.ckpt", "run.json"}
    monkeypatch.syspath_prepend(work)
    options: dict[str, Any] = {
        "network": "networks_of_a_user:Interrupted",
        "network_arguments": {"spatial_dims": 3, "widths": [4, 8]},
        "preparation": {"patch": (8, 8, 8)},
        "settings": check_settings(epochs=4, device="cpu"),
    }
    resumed = pretrain(work, work / "Interrupted", resume=True, **options)
    whole = pretrain(work, work / "whole", **options)
    assert resumed.training.losses == pytest.approx(whole.training.losses, abs=1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("values", "variables", "says"),
    [
        ({"volumes": 3, "devices": 2}, {}, "3 volumes per step cannot be divided among 2 processes.*use --volumes 4"),
        ({"volumes": 2, "devices": 2, "nodes": 2}, {}, "2 volumes per step .* 4 processes"),
        ({"nodes": 2}, {"MASTER_ADDR": "a"}, "MASTER_PORT, NODE_RANK missing"),
        ({"devices": 2}, TORCHRUN | {"WORLD_SIZE": "3"}, r"--devices 2 and --nodes 1 do not fit .*\(3\)"),
        ({}, TORCHRUN | {"WORLD_SIZE": "2"}, "--devices 1 and --nodes 1 do not fit"),
        ({"devices": 2}, SLURM | {"SLURM_NTASKS_PER_NODE": "1"}, "ntasks-per-node=1"),
    ],
)
def test_processes_that_do_not_fit_are_one_sentence(monkeypatch, values, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SegraftError, match=says) as caught:
        Team.join(check_settings(**({"device": "cpu"} | values)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "says"),
    [
        (1, False, "auto", "2 devices were asked for, but this machine has 1 GPUs"),
        (1, False, "cuda", "has 1 GPUs"),
        (0, True, "auto", "mps trains in one process"),
        (0, True, "mps", "mps trains in one process"),
        (1, True, "cpu", None),
        (2, False, "auto", None),
    ],
)
def test_there_must_be_a_device_per_process(monkeypatch, cuda, mps, device, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(sys, "argv", [__file__])  # pytest-xdist's processes were started from no file
    settings = check_settings(device=device, devices=2)
    if says is None:
        assert (Team.join(settings).rank, Team.join(settings).size) == (0, 2)
        return
    with pytest.raises(SegraftError, match=says):
        Team.join(settings)


@pytest.mark.parametrize(("rank", "devices", "refused"), [(0, 1, False), (1, 1, True), (0, 4, True), (1, 2, False)])
def test_a_script_keeps_its_processes(monkeypatch, rank, devices, refused):
    """Once two processes train together, a training of one is for the first, and one of four for none."""
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": rank}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(sys, "argv", [__file__])
    settings = check_settings(device="cpu", devices=devices, volumes=4)
    if not refused:
        assert Team.join(settings).size == devices
        return
    with pytest.raises(SegraftError, match=f"{devices} processes .* where 2 train together already"):
        Team.join(settings)


def test_without_a_script_there_is_nothing_to_start_again(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["-c"])
    with pytest.raises(SegraftError, match="write a script"):
        Team.join(check_settings(device="cpu", devices=2))


def test_running_statistics_of_instance_norms_are_refused():
    net = nn.Sequential(nn.InstanceNorm3d(2), nn.InstanceNorm3d(2, track_running_stats=True))
    together = Together(Team(0, 2), CASES, check_settings())
    with pytest.raises(SegraftError, match="instance norm '1' tracks"), batch_norms_together(net, together):
        pass
    with batch_norms_together(net, None):
        pass


# --- shares


@given(st.integers(0, 50), st.integers(1, 8))
def test_shares_are_even(count, ranks):
    sizes = shares(count, ranks)
    assert (sum(sizes), len(sizes)) == (count, ranks)
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(size=st.integers(1, 30), each=st.integers(1, 4), ranks=st.integers(1, 4), epoch=st.integers(0, 3))
def test_batches_of_several_processes_are_those_of_one(size, each, ranks, epoch):
    batch = each * ranks
    alone = EpochSampler(size, seed=1)
    samplers = [EpochSampler(size, seed=1, batch=batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    for sampler in (alone, *samplers):
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
    order, parts = list(alone), [list(sampler) for sampler in samplers]
    wanted = [order[start : start + batch] for start in range(0, size, batch)]
    for step, whole in enumerate(wanted):
        sizes = shares(len(whole), ranks)
        given = [part[step * each : (step + 1) * each] for part in parts]
        assert [key for keys, count in zip(given, sizes, strict=True) for key in keys[:count]] == whole
        assert all(keys == whole[:1] for keys, count in zip(given, sizes, strict=True) if not count)
    assert all(-(-len(part) // each) == len(wanted) for part in parts)


if __name__ == "__main__":
    script(Path(sys.argv[1]), int(sys.argv[2]))
