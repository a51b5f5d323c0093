"""The real client of the Hub, pointed at the stand-in, and an adapter with its base to push."""

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import segraft
from segraft.data.labels import Labels
from segraft.data.preparation import Preparation, Window
from segraft.errors import SegraftError
from segraft.jobs.task import task_record
from segraft.networks import save_base

standin = runpy.run_path(str(Path(__file__).with_name("hub_standin.py")))
ARGUMENTS = {"in_channels": 1, "out_channels": 1, "widths": [4, 8], "spatial_dims": 3}
PREPARATION = Preparation(spacing=(1, 1, 2), intensity=Window(low=-40, high=160), patch=(16, 16, 16))
TASK = task_record(Labels.of({2: "rim | of <it>"}), PREPARATION)
CASES = {"dataset": "Saint Elsewhere", "patient_pattern": "(.*)_", "cases": {"Smith_1": "b" * 16, "Jones_2": "a" * 16}}


@contextmanager
def pointed_at_standin(patch: pytest.MonkeyPatch, home: Path) -> Iterator[Any]:
    """The stand-in's server; the client's settings, which it reads when it is imported, name it."""
    with standin["Server"]() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", standin["WRITER"])
        patch.setattr("time.sleep", lambda _: None)  # between the client's attempts
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def served(monkeypatch, tmp_path):
    with pointed_at_standin(monkeypatch, tmp_path / "home") as server:
        yield server


@pytest.fixture
def hub(served):
    return served.hub


@pytest.fixture
def run(tmp_path) -> Path:
    """mine/run/adapter.safetensors, which looks for its base at mine/base/base.safetensors."""
    torch.manual_seed(3)
    net = segraft.networks.build("unet", in_channels=1, out_channels=1, arguments={"widths": [4, 8], "spatial_dims": 3})
    mine = tmp_path / "mine"
    base = save_base(net, mine / "base", network="unet", arguments=ARGUMENTS, record=TASK | CASES)
    segraft.graft(net, segraft.AdapterSpec("dora_c", rank=2, train="head"))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    described = {"network": "unet", "arguments": ARGUMENTS, "path": "../base/base.safetensors"}
    record = TASK | CASES | {"base": described | {"fingerprint": base.fingerprint}, "versions": {"torch": "2.0"}}
    segraft.save(net, mine / "run" / "adapter.safetensors", record=record)
    return mine / "run"


def header(path: Path):
    return segraft.adapters.read_header(path / "adapter.safetensors")


def says(error: pytest.ExceptionInfo[SegraftError], *words: str) -> None:
    text = str(error.value)
    assert text.endswith((".", "?"))
    assert "\n" not in text
    for word in words:
        assert word in text, text
