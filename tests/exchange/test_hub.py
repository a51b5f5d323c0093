"""Adapters on the Hub: pushed and pulled by the real client, against a stand-in of its API."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import segraft
from segraft.errors import SegraftError
from segraft.jobs import pull, push
from segraft.networks import save_base

CLIENT = runpy.run_path(str(Path(__file__).with_name("hub_client.py")))
STANDIN = CLIENT["standin"]
served, hub, run = CLIENT["served"], CLIENT["hub"], CLIENT["run"]  # fixtures
header, says = CLIENT["header"], CLIENT["says"]
ARGUMENTS = CLIENT["ARGUMENTS"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # in the client itself


def predicted(model: Path, scan: Path, to: Path) -> np.ndarray:
    segraft.jobs.predict(model, [scan], to)
    return np.asanyarray(nib.load(to).dataobj)


def test_what_was_pulled_predicts_the_same(hub, run, tmp_path):
    scan = tmp_path / "scan.nii.gz"
    voxels = np.random.default_rng(0).normal(50, 60, (20, 18, 12)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, 2, 1])), scan)
    wanted = predicted(run, scan, tmp_path / "a.nii.gz")
    assert 0.02 < (wanted == 2).mean() < 0.98
    pushed = push(run, "ward/rim")
    shutil.rmtree(run.parent)
    pulled = pull("ward/rim", tmp_path / "pulled")
    assert pulled.commit == pushed.commit
    assert sorted(path.name for path in pulled.files) == ["README.md", "adapter.safetensors", "base.safetensors"]
    assert pulled.notes == ()
    np.testing.assert_array_equal(predicted(tmp_path / "pulled", scan, tmp_path / "b.nii.gz"), wanted)


def test_only_the_path_of_the_base_is_changed(hub, run):
    push(run, "ward/rim")
    there = hub.files("ward/rim")
    (run / "there").mkdir()
    (run / "there" / "adapter.safetensors").write_bytes(there["adapter.safetensors"])
    ours, theirs = header(run), header(run / "there")
    assert theirs.record == ours.record | {"base": ours.record["base"] | {"path": "base.safetensors"}}
    assert (theirs.fingerprint, theirs.spec, theirs.ranks) == (ours.fingerprint, ours.spec, ours.ranks)
    before, after = load_file(ours.path), load_file(theirs.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert there["base.safetensors"] == (run.parent / "base" / "base.safetensors").read_bytes()


def test_pushed_again_it_is_the_same_commit(hub, run, tmp_path):
    first = push(run, "ward/rim")
    again = push(run, "ward/rim")
    assert again.commit == first.commit
    assert any("held just this already" in note for note in again.notes)
    pull("ward/rim", tmp_path / "pulled")
    assert push(tmp_path / "pulled", "ward/rim").commit == first.commit


def test_a_replaced_file_and_older_revisions(hub, run, tmp_path):
    first = push(run, "ward/rim")
    net, _ = segraft.networks.load_base(run.parent / "base")
    segraft.load(net, run / "adapter.safetensors")
    with torch.no_grad():
        next(p for p in net.parameters() if p.requires_grad).add_(1)
    segraft.save(net, run / "adapter.safetensors", record=header(run).record)
    second = push(run, "ward/rim")
    assert first.commit != second.commit
    for revision, to in ((first.commit, "old"), (None, "new"), ("main", "main")):
        pull("ward/rim", tmp_path / to, revision=revision)
    old, new, main = ((tmp_path / to / "adapter.safetensors").read_bytes() for to in ("old", "new", "main"))
    assert old != new == main
    with pytest.raises(SegraftError, match="exists: choose another --out, or pass --overwrite"):
        pull("ward/rim", tmp_path / "old")
    pull("ward/rim", tmp_path / "old", overwrite=True)
    assert (tmp_path / "old" / "adapter.safetensors").read_bytes() == new


def test_a_branch_is_made_and_pulled(hub, run, tmp_path):
    push(run, "ward/rim", revision="trial")
    assert "adapter.safetensors" not in hub.files("ward/rim")
    pushed = push(run, "ward/rim", revision="trial", license="mit")
    assert pushed.url.endswith("/ward/rim/tree/trial")
    with pytest.raises(SegraftError, match="holds no adapter"):
        pull("ward/rim", tmp_path / "pulled")
    assert pull("ward/rim", tmp_path / "pulled", revision="trial").commit == pushed.commit
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "other", revision="trail")
    says(error, "ward/rim has no revision trail")


def test_private(hub, run, tmp_path, monkeypatch):
    assert push(run, "ward/rim", private=True).private is True
    assert hub.repos["ward/rim"].private
    pull("ward/rim", tmp_path / "pulled")
    monkeypatch.setenv("HF_TOKEN", STANDIN["STRANGER"])
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "other")
    says(error, "there is no model repository ward/rim", "HF_TOKEN")
    assert not (tmp_path / "other").exists()


def test_a_public_repository_does_not_pass_for_a_private_one(hub, run):
    assert push(run, "ward/rim").private is False
    before = dict(hub.files("ward/rim"))
    with pytest.raises(SegraftError) as error:
        push(run, "ward/rim", private=True, license="mit")
    says(error, "ward/rim is public", "or choose another name")
    assert hub.files("ward/rim") == before


def test_cases_are_named_unless_left_out(hub, run, tmp_path):
    notes = " ".join(push(run, "ward/rim").notes)
    assert "names its 2 cases (such as Smith_1)" in notes
    assert "Saint Elsewhere" in notes
    notes = " ".join(push(run, "ward/quiet", cases=False).notes)
    assert "holds numbers for the ids of its 2 cases" in notes
    push(run, "ward/silent", digests=False)
    everything = {name: b"".join(hub.files(f"ward/{name}").values()) for name in ("rim", "quiet", "silent")}
    secrets = (b"Smith", b"Jones", b"Elsewhere", b"(.*)_")
    assert all(secret in everything["rim"] for secret in secrets)
    assert not any(secret in everything[name] for secret in secrets for name in ("quiet", "silent"))
    assert b"a" * 16 in everything["quiet"]
    assert b"a" * 16 not in everything["silent"]
    pull("ward/quiet", tmp_path / "quiet")
    for record in (header(tmp_path / "quiet").record, segraft.networks.read_base(tmp_path / "quiet").record):
        assert record["cases"] == {"1": "a" * 16, "2": "b" * 16}
    segraft.networks.load_base(tmp_path / "quiet")  # its fingerprint holds


def test_the_page_never_names_cases(hub, run):
    card = push(run, "ward/rim").card
    assert "2 cases" in card
    assert not any(word in card for word in ("Smith", "Jones", "Elsewhere", "aaaa"))


@pytest.mark.parametrize(
    ("with_base", "limit", "along"), [(None, 10**9, True), (None, 10, False), (True, 10, True), (False, 10**9, False)]
)
def test_small_bases_go_along(hub, run, monkeypatch, tmp_path, with_base, limit, along):
    monkeypatch.setattr("segraft.jobs.pushing.SMALL", limit)
    pushed = push(run, "ward/rim", with_base=with_base)
    assert ("base.safetensors" in pushed.files) == ("base.safetensors" in hub.files("ward/rim")) == along
    assert ("--base BASE" in pushed.card) != along
    pulled = pull("ward/rim", tmp_path / "pulled")
    assert any("say where you have it" in note for note in pulled.notes) != along


def test_weights_made_elsewhere_go_along_only_when_asked(hub, run):
    net, base = segraft.networks.load_base(run.parent / "base")
    record = base.record | {"imported": {"weights": "x.pt", "layout": "state dict"}}
    save_base(net, run.parent / "base", network="unet", arguments=ARGUMENTS, record=record)
    assert "base.safetensors" not in push(run, "ward/rim").files
    asked = push(run, "ward/rim", with_base=True)
    assert "base.safetensors" in asked.files
    assert any("licence" in note for note in asked.notes)


def test_a_base_of_another_format_does_not_go_along(hub, run):
    net, _ = segraft.networks.load_base(run.parent / "base")
    torch.save(net.state_dict(), run / "weights.pt")
    segraft.load(net, run / "adapter.safetensors")
    record = header(run).record
    segraft.save(net, run / "adapter.safetensors", record=record | {"base": record["base"] | {"path": "weights.pt"}})
    assert list(push(run, "ward/rim").files) == ["adapter.safetensors", "README.md"]
    with pytest.raises(SegraftError) as error:
        push(run, "ward/rim", with_base=True)
    says(error, "weights.pt is no base file of Segraft", "segraft import")


def test_a_base_in_a_repository_of_its_own(hub, run, tmp_path):
    assert "## Use" in push(run.parent / "base", "ward/base").card
    pushed = push(run, "ward/rim", base="ward/base", license="cc-by-4.0")
    assert "base.safetensors" not in pushed.files
    assert "base_model: ward/base\nbase_model_relation: adapter\nlicense: cc-by-4.0\n" in pushed.card
    pulled = pull("ward/rim", tmp_path / "pulled")
    assert "its base is from ward/base" in pulled.notes[0]
    segraft.jobs.load_model(tmp_path / "pulled")
    assert not (tmp_path / "alone").exists()
    pull("ward/rim", tmp_path / "alone", with_base=False)
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["README.md", "adapter.safetensors"]
    pull("ward/base", tmp_path / "base")
    segraft.networks.load_base(tmp_path / "base")


def test_a_base_that_does_not_belong_is_not_left_beside(hub, run):
    push(run, "ward/rim")
    with pytest.raises(SegraftError, match="would take for this adapter's base"):
        push(run, "ward/rim", with_base=False)
    with pytest.raises(SegraftError) as error:
        push(run, "ward/other", base="ward/missing")
    says(error, "there is no model repository ward/missing")
    assert "ward/other" not in hub.repos


def test_a_moved_base(hub, run, tmp_path):
    (run.parent / "base").rename(tmp_path / "moved")
    assert any("not pushed along" in note for note in push(run, "ward/rim").notes)
    with pytest.raises(SegraftError, match="say where it is with --base-path"):
        push(run, "ward/rim", with_base=True)
    assert "base.safetensors" in push(run, "ward/rim", base_path=tmp_path / "moved").files


def test_a_page_changed_by_hand_stays_and_what_was_said_of_the_licence_too(hub, run):
    push(run, "ward/rim", license="cc-by-4.0")
    assert "license: cc-by-4.0" in push(run, "ward/rim").card
    repo = hub.repos["ward/rim"]
    repo.commit("main", hub.files("ward/rim") | {"README.md": b"mine"})
    pushed = push(run, "ward/rim", license="mit")
    assert pushed.card is None
    assert any("by hand" in note for note in pushed.notes)
    assert hub.files("ward/rim")["README.md"] == b"mine"


def test_dry_run_asks_the_hub_nothing(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    pushed = push(run, "ward/rim", dry_run=True)
    assert (pushed.url, pushed.commit) == (None, None)
    assert "rim" in pushed.card
    assert hub.asked == []


def test_only_files_of_segraft_are_fetched(hub, run, tmp_path):
    push(run, "ward/rim")
    hub.repos["ward/rim"].commit("main", hub.files("ward/rim") | {"pytorch_model.bin": b"\x80\x04cos\nsystem\n"})
    hub.asked.clear()
    pull("ward/rim", tmp_path / "pulled")
    assert not any("pytorch_model.bin" in asked for asked in hub.asked)
    hub.repos["ward/else"] = STANDIN["Repo"]()
    hub.repos["ward/else"].commit("main", {"pytorch_model.bin": b"\x80\x04cos\nsystem\n"})
    with pytest.raises(SegraftError) as error:
        pull("ward/else", tmp_path / "other")
    says(error, "ward/else holds no adapter.safetensors", "pytorch_model.bin")


def test_by_the_environment_alone(served, run, tmp_path):
    """A process of its own, with nothing set but what a user sets; importing the command line reaches for nothing."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": served.url,
        "HF_HOME": str(tmp_path / "other_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": STANDIN["WRITER"],
    }
    code = (
        "import sys; import segraft.cli; assert 'huggingface_hub' not in sys.modules\n"
        "for words in (['push', sys.argv[1], 'ward/rim', '--json'], ['pull', 'ward/rim', '-o', sys.argv[2]]):\n"
        "    sys.argv[1:] = words\n"
        "    try: segraft.cli.main()\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
    )
    code = code.replace("for words", "given = list(sys.argv)\nfor words").replace("sys.argv[2]", "given[2]")
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(tmp_path / "pulled")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["repository"] == "ward/rim"
    assert (tmp_path / "pulled" / "adapter.safetensors").is_file()


def test_left_out_cases_stay_in_earlier_commits(hub, run):
    push(run, "ward/rim")
    assert any("earlier commits of ward/rim stay" in note for note in push(run, "ward/rim", cases=False).notes)
    assert not any("earlier" in note for note in push(run, "ward/new", cases=False).notes)


def test_saved_from_python_without_a_record(hub, run, tmp_path):
    net, _ = segraft.networks.load_base(run.parent / "base")
    segraft.graft(net, segraft.AdapterSpec("lora", rank=1))
    path = segraft.save(net, tmp_path / "bare.safetensors")
    pushed = push(path, "ward/bare")
    assert any("does not name its base network" in note for note in pushed.notes)
    assert hub.files("ward/bare")["adapter.safetensors"] == path.read_bytes()
    pull("ward/bare", tmp_path / "pulled")
    segraft.load(segraft.networks.load_base(run.parent / "base")[0], tmp_path / "pulled" / "adapter.safetensors")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: None, None),
        (lambda path: os.utime(path, (1, 1)), "is older than adapter.safetensors"),
        (lambda path: path.write_text(path.read_text().replace("adapter.s", "other.s")), "is of another file"),
    ],
)
def test_the_evaluation_beside_the_adapter(hub, run, spoil, told):
    row = {"n": 5, "dice_mean": 0.7, "dice_sd": 0.1, "hausdorff95_mm_mean": 2.0, "hausdorff95_mm_sd": 1.0}
    content = {"cases": [], "summary": {"rim": row}, "record": {"model": "adapter.safetensors"}}
    (run / "evaluation.json").write_text(json.dumps(content))
    spoil(run / "evaluation.json")
    pushed = push(run, "ward/rim")
    assert ("| rim | 5 | 0.700 (0.10) |" in pushed.card) == (told is None)
    assert told is None or any(told in note for note in pushed.notes)
    assert "evaluation.json" not in hub.files("ward/rim")


@pytest.mark.parametrize("path", ["../base/liver.safetensors", "liver.safetensors", "C:\\\\ward\\\\liver.safetensors"])
def test_bases_of_other_names(hub, run, tmp_path, path):
    """Pushed along under the name that `pull` gives it; else the path is but the file's name."""
    net, _ = segraft.networks.load_base(run.parent / "base")
    base = run.parent / "base" / "base.safetensors"
    shutil.copyfile(base, run.parent / "base" / "liver.safetensors")
    segraft.load(net, run / "adapter.safetensors")
    record = header(run).record
    segraft.save(net, run / "adapter.safetensors", record=record | {"base": record["base"] | {"path": path}})
    push(run, "ward/along", base_path=base)
    push(run, "ward/alone", with_base=False)
    pull("ward/along", tmp_path / "along")
    segraft.jobs.load_model(tmp_path / "along")
    pull("ward/alone", tmp_path / "alone")
    assert header(tmp_path / "along").record["base"]["path"] == "base.safetensors"
    assert header(tmp_path / "alone").record["base"]["path"] == "liver.safetensors"


def test_an_adapter_of_others_that_looks_elsewhere_writes_nowhere_else(hub, run, tmp_path):
    """Where a pulled file says its base is, is never where anything is written."""
    push(run, "ward/rim")
    net, _ = segraft.networks.load_base(run.parent / "base")
    segraft.load(net, run / "adapter.safetensors")
    record = header(run).record
    outside = record | {"base": record["base"] | {"path": "../outside/base.safetensors"}}
    content = segraft.save(net, tmp_path / "x.safetensors", record=outside).read_bytes()
    hub.repos["ward/rim"].commit("main", hub.files("ward/rim") | {"adapter.safetensors": content})
    pulled = pull("ward/rim", tmp_path / "in" / "pulled")
    assert f"predict with --base {tmp_path / 'in' / 'pulled' / 'base.safetensors'}" in pulled.notes[0]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["pulled"]
    segraft.jobs.load_model(tmp_path / "in" / "pulled", base=tmp_path / "in" / "pulled")


def test_a_repository_made_on_the_hub_has_a_page_of_metadata_alone(hub, run):
    hub.repos["ward/rim"] = STANDIN["Repo"]()
    hub.repos["ward/rim"].commit("main", {"README.md": b"---\nlicense: mit\n---\n"})
    assert "license: mit" in push(run, "ward/rim").card


def test_a_base_does_not_take_the_place_of_an_adapters(hub, run):
    push(run, "ward/rim")
    before = hub.files("ward/rim")
    with pytest.raises(SegraftError, match="which needs its own base"):
        push(run.parent / "base", "ward/rim")
    assert hub.files("ward/rim") is before


def test_names_of_files_of_weights_stay_at_home(hub, run, tmp_path):
    """The file that weights came from may be called as a patient."""
    net = segraft.networks.build("unet", in_channels=1, out_channels=1, arguments={"widths": [4, 8], "spatial_dims": 3})
    torch.save(net.state_dict(), tmp_path / "Smith_John.weights.pt")
    segraft.jobs.import_base(
        *(tmp_path / "Smith_John.weights.pt", tmp_path / "imported"),
        network="unet",
        network_arguments={"widths": [4, 8], "spatial_dims": 3},
        labels=["rim"],
    )
    segraft.graft(net, segraft.AdapterSpec("lora", rank=2))
    described = {"network": "unet", "arguments": ARGUMENTS, "path": "../Smith_John.weights.pt"}
    record = CLIENT["TASK"] | CLIENT["CASES"] | {"base": described}
    segraft.save(net, tmp_path / "mine" / "run" / "adapter.safetensors", record=record)
    assert any("Smith_John.weights.pt: --without-cases" in note for note in push(tmp_path / "imported", "ward/a").notes)
    for name, options in {"b": {"cases": False}, "c": {"cases": False, "digests": False}}.items():
        pushed = push(tmp_path / "imported", f"ward/{name}", **options)
        assert "weights made elsewhere" in pushed.card
        adapted = push(run, f"ward/{name}2", **options)
        assert "`weights.pt` where it was trained" in adapted.card
        assert "2 cases" in adapted.card
        for repository in (f"ward/{name}", f"ward/{name}2"):
            assert not any(b"Smith" in content for content in hub.files(repository).values())


def test_metadata_that_a_person_added_stays(hub, run):
    push(run, "ward/rim", license="mit")
    page = hub.files("ward/rim")["README.md"].decode()
    added = page.replace(
        "license: mit", "license: mit\nextra_gated_prompt: sign the DUA\nlanguage: en\ninference: false"
    )
    hub.repos["ward/rim"].commit("main", hub.files("ward/rim") | {"README.md": added.encode()})
    card = push(run, "ward/rim", license="cc-by-4.0").card
    assert "license: cc-by-4.0\nextra_gated_prompt: sign the DUA\nlanguage: en\ninference: false\n---\n" in card
    assert card == hub.files("ward/rim")["README.md"].decode()
