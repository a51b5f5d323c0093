"""Two tiny cohorts, a study of eleven runs that takes seconds, and processes that are started without their imports."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from segraft.studies.reading import checked
from segraft.studies.spec import Study

SHAPE = (16, 16, 4)
PRETRAINING = {"epochs": 12, "volumes": 8, "patches": 4, "learning_rate": 0.05, "foreground": 1, "augmentation": "none"}
NETWORK = {"network": "unet", "arguments": {"widths": [2, 4], "norm": "instance"}}
TRAINING = {"epochs": 2, "volumes": 3, "patches": 1, "learning_rate": 0.02}


def write_scan(folder: Path, name: str, rng: np.random.Generator) -> None:
    """Noise with a bright block of its own size and place (label 1) and a brighter spot (label 2)."""
    image, label = rng.normal(0, 1, SHAPE).astype(np.float32), np.zeros(SHAPE, np.uint8)
    x, y, size = *rng.integers(1, 6, 2), rng.integers(3, 8)
    label[x : x + size, y : y + size, 1:3], label[12:15, 12:15] = 1, 2
    image += 4.0 * label
    for kind, data in (("imagesTr", image), ("labelsTr", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.diag([5, 5, 10, 1])), folder / kind / f"{name}.nii.gz")


def write_cohort(folder: Path, names: list[str], *, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name in names:
        write_scan(folder, name, rng)
    content = {
        "name": folder.name,
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "core", "2": "rim"},
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target`: p0-s0 … p8-s0, a scan each; `source`: q0-s0, q0-s1, q1-s0, … two scans each of four patients."""
    folder = tmp_path_factory.mktemp("cohorts")
    write_cohort(folder / "target", [f"p{patient}-s0" for patient in range(9)], seed=1)
    write_cohort(folder / "source", [f"q{patient}-s{scan}" for patient in range(4) for scan in (0, 1)], seed=2)
    return folder


@pytest.fixture
def own_cohorts(cohorts: Path, tmp_path: Path) -> Path:
    """Copies for a test that changes them."""
    return shutil.copytree(cohorts, tmp_path / "cohorts")


def content_of(cohorts: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "title": "Tiny",
        "data": str(cohorts / "target" / "dataset.json"),
        "pretrain_data": str(cohorts / "source" / "dataset.json"),
        "labels": ["core"],
        "pretrain_labels": ["core"],
        "patient_pattern": "^([pq][0-9]+)",
        "folds": 3,
        "preparation": {"patch": [16, 16, 1]},
        "bases": {"unet": {**NETWORK, "training": PRETRAINING}},
        "training": TRAINING,
        "arms": [
            {"base": "unet", "methods": ["conv_lora"], "ranks": [1]},
            {"base": "unet", "strategies": ["none", "all"]},
        ],
        "strata_ml": "tertiles",
        **changes,
    }


@pytest.fixture(scope="session")
def make_study(cohorts: Path) -> Callable[..., Study]:
    """make_study(cohorts, **changes): of the tiny cohorts, or of copies of them."""

    def make(own: Path | None = None, **changes: Any) -> Study:
        return checked(content_of(own or cohorts, **changes), "tiny")

    return make


@pytest.fixture
def write_study(cohorts: Path, tmp_path: Path) -> Callable[..., Path]:
    """write_study(**changes): the same as a YAML file."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content_of(cohorts, **changes)))
        return path

    return write


ODD = """
import json, os, signal, time
from pathlib import Path
from segraft.networks import UNet

HERE = Path(__file__).parent

class Odd(UNet):
    \"\"\"A U-Net that does, in a certain training step, what `orders.json` says.\"\"\"

    steps = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
            orders = HERE / "orders.json"
            if orders.is_file():
                self.obey(**json.loads(orders.read_text()))
        return super().forward(x)

    def obey(self, step, kind, node=None):
        if self.steps != step or (node is not None and node != self.node()):
            return
        (HERE / f"{kind}-{os.getpid()}").touch()
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while kind == "wait" and not (HERE / "go").exists():
            time.sleep(0.01)

    @staticmethod
    def node():
        import ray
        return ray.get_runtime_context().get_node_id()
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a network `odd:Odd`, here and in processes that are started: a U-Net that obeys `orders.json`.

    Such as {"step": 3, "kind": "die"}. It leaves a file `die-1234`, with its process, where it does so.
    """
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "odd.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SEGRAFT_TRUST", "tests,odd")  # as studies in files name it
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("odd", None)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums are rounded as in any process with one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def traces_below(out: Path) -> dict[str, str]:
    """Digests of all that a study found, without what holds times: tables, masks, tensors."""
    from safetensors.torch import load_file, save

    runs = out / "runs"
    files = [out / "results.json", out / "scores.csv", *runs.glob("*/evaluation.*"), *runs.glob("*/masks/*")]
    contents = {path: path.read_bytes() for path in files if path.is_file()}
    contents |= {path: save(load_file(path)) for path in runs.glob("*/*.safetensors")}
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(content).hexdigest()
        for path, content in sorted(contents.items())
    }


@pytest.fixture(scope="session")
def traces() -> Callable[[Path], dict[str, str]]:
    """traces(out): digests of all that a study found, by file."""
    return traces_below


@pytest.fixture(scope="session")
def undisturbed(make_study: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the study, done in one go in this process with one thread."""
    from segraft.studies.report import write_study_report
    from segraft.studies.running import run_study

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("undisturbed")
    result = run_study(make_study(), out, device="cpu")
    torch.set_num_threads(before)
    assert (result.done, result.failures) == (11, {})
    write_study_report(out)
    return out


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the runs that were trained in this process since."""
    from segraft.studies import executing

    keys: list[str] = []
    for name in ("pretrain", "adapt"):
        whole, folder = getattr(executing, name), {"pretrain": 1, "adapt": 2}[name]

        def train(*arguments: Any, whole: Any = whole, folder: int = folder, **options: Any) -> Any:
            keys.append(Path(arguments[folder]).name)
            return whole(*arguments, **options)

        monkeypatch.setattr(executing, name, train)
    return keys


class Started:
    """A process of the test's own, in a process group of its own, that ended up with these imports already done."""

    def __init__(self, code: str, log: Path, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["segraft.cli", "segraft.studies.report", "segraft.studies.running"])
        start = (
            "import os, sys\n"
            "os.setsid()\n"
            f"os.environ.update({dict(environment)!r})\n"
            f"log = os.open({str(log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
            "os.dup2(log, 1), os.dup2(log, 2)\n"
            "import torch\n"
            "torch.set_num_threads(1)\n"
        )
        self.log = log
        self.process = context.Process(target=exec, args=(start + code, {"__name__": "started"}))
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def wait(self, seconds: float) -> int | None:
        """The exit code, None if it has not ended within that time."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self, *, group: bool = True) -> None:
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.join(30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """start(code, **environment): run code in a process of its own; what still runs after the test is killed."""
    started: list[Started] = []

    def begin(code: str, **environment: str) -> Started:
        whole = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        started.append(Started(code, tmp_path / f"{len(started)}.log", whole))
        return started[-1]

    yield begin
    for each in started:
        each.kill()
        each.process.close()


@pytest.fixture
def segraft(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """segraft(*arguments): (exit code, standard output, standard error) of the command line in this process."""
    from segraft.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        monkeypatch.setattr(sys, "argv", ["segraft", "study", *map(str, arguments)])
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()

    return call


def call_of_segraft(*arguments: object) -> str:
    """Code that is the command line with these arguments."""
    return f"sys.argv = {['segraft', *map(str, arguments)]!r}\nfrom segraft.cli import main\nmain()\n"


@pytest.fixture(scope="session")
def segraft_code() -> Callable[..., str]:
    return call_of_segraft


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """until(condition, seconds): wait for another process, but not for ever."""

    def wait(condition: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "another process did not do its part in time"
            time.sleep(0.01)

    return wait
