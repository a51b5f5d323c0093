"""One run: done once, gone on with where it was, failed with a reason."""

import json
import shutil
from dataclasses import asdict, replace

import nibabel as nib
import numpy as np
import pytest
import torch

from segraft.errors import SegraftError
from segraft.networks import UNet
from segraft.studies import executing
from segraft.studies.executing import CHECKPOINT, MASKS, execute
from segraft.studies.planning import plan
from segraft.studies.run import FAILED, FINISHED, REQUEST, Outcome, Run, Runs, failure_of, is_finished, locked
from segraft.training import callbacks

pytestmark = pytest.mark.usefixtures("one_thread")

BASE, ADAPTED, AS_IT_IS = "unet", "all (unet)", "none (unet)"


@pytest.fixture
def folders(make_study, undisturbed, tmp_path):
    """Name of an arm -> the folder of its first run; of those done here, only the base is finished."""
    runs = Runs(tmp_path / "runs")
    planned = plan(make_study(), runs, device="cpu")
    first = {run.arm: runs.folder(run.key) for run in reversed(planned.runs)}
    shutil.copytree(undisturbed / "runs" / first[BASE].name, first[BASE], dirs_exist_ok=True)
    return first


@pytest.fixture
def empty(folders):
    """The folder of the base, with nothing done."""
    for path in folders[BASE].iterdir():
        if path.name != REQUEST:
            path.unlink()
    return folders[BASE]


def told(folder, traces):
    """What a run found, without times."""
    found = {name.partition("/")[2]: digest for name, digest in traces(folder.parent.parent).items()}
    return {name: digest for name, digest in found.items() if name.startswith(folder.name)}


def as_undisturbed(folder, undisturbed, traces):
    return told(folder, traces) == told(undisturbed / "runs" / folder.name, traces) != {}


def test_a_run_leaves_its_results(folders, undisturbed, traces):
    folder = folders[ADAPTED]
    outcome = execute(folder)
    assert outcome == Outcome(folder.name, outcome.seconds)
    assert outcome.seconds is not None
    assert outcome.seconds > 0
    found = json.loads((folder / FINISHED).read_text())
    assert found["trained"] == sum(p.numel() for p in UNet(widths=(2, 4), norm="instance").parameters())
    assert found["bytes"] == 4 * found["trained"], "instance norms have no running statistics"
    assert found["seconds"] == outcome.seconds
    assert found["versions"]["torch"] == torch.__version__
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors", "evaluation.csv", "evaluation.json", FINISHED, "lock", MASKS, REQUEST, "run.json",
    ]  # fmt: skip
    assert as_undisturbed(folder, undisturbed, traces)


def test_masks_and_scores_are_of_the_test_cases_on_their_own_grids(undisturbed):
    for path in (undisturbed / "runs").glob("*/" + MASKS):
        run = Run.read(path.parent)
        assert {mask.name for mask in path.iterdir()} == {f"{case}.nii.gz" for case in run.test}
        scores = json.loads((path.parent / "evaluation.json").read_text())["cases"]
        assert [each["case"] for each in scores] == list(run.test)
        for each in scores:
            mask = nib.load(path / f"{each['case']}.nii.gz")
            volume = np.count_nonzero(mask.dataobj) * 5 * 5 * 10 / 1000
            assert each["volume_ml"] == pytest.approx(volume)
            assert 0 < each["dice"] < 1, "a test of equal results needs results"


def test_what_trains_nothing_is_the_base(folders, trainings):
    assert execute(folders[AS_IT_IS]).failure is None
    assert trainings == []
    found = json.loads((folders[AS_IT_IS] / FINISHED).read_text())
    assert (found["trained"], found["bytes"], found["training"]) == (0, 0, None)


def test_a_finished_run_is_never_repeated(folders, trainings):
    before = {path: path.stat().st_mtime_ns for path in folders[BASE].iterdir()}
    assert execute(folders[BASE]) == Outcome(folders[BASE].name)
    assert trainings == []
    after = {path: path.stat().st_mtime_ns for path in folders[BASE].iterdir() if path.name != "lock"}
    assert after.items() <= before.items()


def test_a_run_whose_base_is_not_finished_fails(folders, empty):
    outcome = execute(folders[ADAPTED])
    assert empty.name in outcome.failure
    assert failure_of(folders[ADAPTED]) == outcome.failure
    assert not is_finished(folders[ADAPTED])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SegraftError("the scan x is bad:\n repair it."), "the scan x is bad: repair it."),
        (MemoryError("no more"), "MemoryError: no more"),
        (ValueError(), "ValueError:"),
    ],
)
def test_a_failed_run_says_why_and_is_tried_again(folders, trainings, monkeypatch, error, reason):
    whole = executing.adapt

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(executing, "adapt", refuse)
    outcome = execute(folders[ADAPTED])
    assert (outcome.failure, failure_of(folders[ADAPTED])) == (reason, reason)
    assert type(error).__name__ in json.loads((folders[ADAPTED] / FAILED).read_text())["traceback"]
    monkeypatch.setattr(executing, "adapt", whole)
    assert execute(folders[ADAPTED]).failure is None
    assert trainings == [folders[ADAPTED].name]
    assert failure_of(folders[ADAPTED]) is None


def test_an_interruption_is_no_failure(folders, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(executing, "adapt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        execute(folders[ADAPTED])
    assert failure_of(folders[ADAPTED]) is None


def test_a_training_that_diverges_is_told_with_the_same_words_when_it_goes_on(make_study, tmp_path):
    """It left a state, from which it diverges again: that is no reason to advise another state."""
    diverging = {"network": "unet", "arguments": {"widths": [2, 4]}, "training": {"epochs": 40, "learning_rate": 1e20}}
    runs = Runs(tmp_path)
    base = runs.folder(plan(make_study(bases={"unet": diverging}), runs, device="cpu").runs[0].key)
    first = execute(base)
    assert "learning rate" in first.failure
    assert execute(base).failure == first.failure


def test_a_label_that_is_wrong_in_a_test_scan_is_told(make_study, own_cohorts, undisturbed, tmp_path):
    """Not trained on, and of a value that nobody asked for: it still is a label that the cohort does not list."""
    runs = Runs(tmp_path / "runs")
    path = own_cohorts / "target" / "labelsTr" / "p4-s0.nii.gz"
    label = nib.load(path)
    wrong = np.asanyarray(label.dataobj).copy()
    wrong[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(wrong, label.affine), path)
    made = plan(make_study(own_cohorts), runs, device="cpu")
    shutil.copytree(undisturbed / "runs" / made.runs[0].key, runs.folder(made.runs[0].key), dirs_exist_ok=True)
    (run,) = [run.key for run in made.runs if run.arm == ADAPTED and run.held_out == (made.folds["p4"],)]
    outcome = execute(runs.folder(run))
    assert f"the label {path} holds the value 9" in outcome.failure


# Where a process is killed: code that runs in it first.
KILL = "import signal\ndie = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
AFTER_AN_EPOCH = """
from segraft.training.callbacks import EpochCheckpoint
whole = EpochCheckpoint.on_train_epoch_end
EpochCheckpoint.on_train_epoch_end = lambda *each: (whole(*each), die())
"""
IN_A_CHECKPOINT = """
import lightning
def half(self, path, *_, **__):
    open(path, 'wb').write(b'half')
    die()
lightning.Trainer.save_checkpoint = half
"""
BEFORE_THE_STATE_GOES = """
from segraft.jobs.run_folder import RunFolder
from pathlib import Path
whole = Path.unlink
Path.unlink = lambda path, *_, **__: die() if path.name == 'last.ckpt' else whole(path, *_, **__)
"""
IN_A_MASK = """
import segraft.studies.executing as executing
whole = executing.write_mask
executing.write_mask = lambda *each: (whole(*each), die())
"""
BEFORE_THE_END = """
import segraft.studies.executing as executing
executing.write_json = die
"""


@pytest.mark.parametrize(
    ("arm", "where", "left"),
    [
        (BASE, AFTER_AN_EPOCH, CHECKPOINT),
        (BASE, IN_A_CHECKPOINT, "run.json"),
        (BASE, BEFORE_THE_STATE_GOES, "base.safetensors"),
        (BASE, BEFORE_THE_END, "base.safetensors"),
        (ADAPTED, AFTER_AN_EPOCH, CHECKPOINT),
        (ADAPTED, BEFORE_THE_STATE_GOES, "adapter.safetensors"),
        (ADAPTED, IN_A_MASK, MASKS),
        (ADAPTED, BEFORE_THE_END, "evaluation.json"),
    ],
    ids=lambda value: value.strip().splitlines()[-1] if "\n" in value else value,
)
def test_a_killed_run_goes_on_to_the_same_result(folders, undisturbed, traces, start, arm, where, left, request):
    folder = folders[arm]
    if arm == BASE:
        request.getfixturevalue("empty")
    code = f"from pathlib import Path\nfrom segraft.studies.executing import execute\nexecute(Path({str(folder)!r}))\n"
    process = start(KILL + where + code)
    assert process.wait(120) == -9, process.log.read_text()
    assert (folder / left).exists()
    assert not is_finished(folder)
    assert execute(folder).failure is None
    assert as_undisturbed(folder, undisturbed, traces)
    assert not (folder / CHECKPOINT).exists()
    assert not list(folder.rglob(".*")), "what the killed process was writing"


def test_a_killed_run_takes_up_its_last_epoch(folders, empty, start, monkeypatch, undisturbed, traces):
    code = f"from pathlib import Path\nfrom segraft.studies.executing import execute\nexecute(Path({str(empty)!r}))\n"
    assert start(KILL + AFTER_AN_EPOCH + code).wait(120) == -9
    epochs = []
    whole = callbacks.EpochCheckpoint.on_train_epoch_end

    def count(self, trainer, module):
        epochs.append(trainer.current_epoch)
        whole(self, trainer, module)

    monkeypatch.setattr(callbacks.EpochCheckpoint, "on_train_epoch_end", count)
    assert execute(empty).failure is None
    assert epochs == list(range(1, 12))
    assert as_undisturbed(empty, undisturbed, traces)


def test_a_state_that_cannot_be_read_is_told_with_its_cure(empty, undisturbed, traces):
    (empty / CHECKPOINT).write_bytes(b"half")
    (empty / "run.json").write_text("{}")
    outcome = execute(empty)
    assert outcome.failure.endswith(f"remove {empty / CHECKPOINT} to begin anew.")
    (empty / CHECKPOINT).unlink()
    assert execute(empty).failure is None
    assert as_undisturbed(empty, undisturbed, traces)


def test_two_processes_with_the_same_run_train_it_once(empty, start, until, undisturbed, traces):
    code = (
        "from pathlib import Path\n"
        "from segraft.studies import executing\n"
        "whole = executing.pretrain\n"
        "executing.pretrain = lambda *each, **named: (print('trains', flush=True), whole(*each, **named))\n"
        "print('ready', flush=True)\n"
        f"print(executing.execute(Path({str(empty)!r})).seconds, flush=True)\n"
    )
    with locked(empty):  # so that both come while it is held
        both = [start(code), start(code)]
        until(lambda: all(each.log.exists() and "ready" in each.log.read_text() for each in both))
    for each in both:
        assert each.wait(120) == 0, each.log.read_text()
    said = sorted((each.log.read_text().split() for each in both), key=len)
    assert said[0] == ["ready", "None"]
    assert said[1][:2] == ["ready", "trains"]
    assert as_undisturbed(empty, undisturbed, traces)


def test_a_request_that_another_study_is_writing_is_left_alone(empty):
    being_written = empty / f".0123456789ab.{REQUEST}"
    being_written.touch()
    (empty / ".0123456789ab.finished.json").touch()
    execute(empty)
    assert list(empty.glob(".*")) == [being_written]


def test_the_size_of_an_adapter_does_not_depend_on_how_long_it_took(tmp_path):
    from safetensors.torch import save_file

    sizes = []
    for seconds in ("1.5", "1234567.890123456789"):
        save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2)}, tmp_path / "x", metadata={"seconds": seconds * 9})
        sizes.append((executing.bytes_of_tensors(tmp_path / "x"), (tmp_path / "x").stat().st_size))
    assert [size for size, _ in sizes] == [4 * 17, 4 * 17]
    assert sizes[0][1] != sizes[1][1]


def test_a_run_with_other_scans_under_the_same_names_is_another(undisturbed):
    """The key is of the content, so what a folder holds can be told from its request alone."""
    for folder in (undisturbed / "runs").iterdir():
        run = Run.read(folder)
        assert run.key == folder.name
        assert replace(run, identity={**run.identity, "format": 0}).key != run.key
        assert set(asdict(run)["identity"]["train"]) == set(run.train)
