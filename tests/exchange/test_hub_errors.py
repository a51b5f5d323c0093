"""What goes wrong with the Hub: one sentence each, and nothing half-written."""

import json
import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import segraft
from segraft.errors import SegraftError
from segraft.exchange import hub as hub_room
from segraft.jobs import pull, push

CLIENT = runpy.run_path(str(Path(__file__).with_name("hub_client.py")))
STANDIN = CLIENT["standin"]
served, hub, run = CLIENT["served"], CLIENT["hub"], CLIENT["run"]  # fixtures
says = CLIENT["says"]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # in the client itself


@pytest.mark.parametrize("name", ["adapter.safetensors", "base.safetensors"])
def test_a_file_that_is_none_is_not_put_in_place(hub, run, tmp_path, name):
    push(run, "ward/rim")
    hub.repos["ward/rim"].commit("main", hub.files("ward/rim") | {name: b"\x80\x04cos\nsystem\n"})
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "nothing was written", f"{name} of ward/rim cannot be used")
    assert not (tmp_path / "pulled").exists()


def test_a_download_that_breaks_off(hub, run, tmp_path):
    push(run, "ward/rim")
    hub.cut = 40
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "ward/rim could not be fetched", "try again")
    assert not (tmp_path / "pulled").exists()
    hub.cut = None
    pull("ward/rim", tmp_path / "pulled")
    segraft.jobs.load_model(tmp_path / "pulled")


PULLED = {
    "GET /api/models": {
        401: "does not accept the token",
        404: "refuses this (404",
        429: "too many requests",
        500: "has trouble of its own (500)",
    },
    "HEAD /ward/rim/resolve": {500: "has trouble of its own (500)", 403: "you may not read this"},
}


@pytest.mark.parametrize(("where", "status"), [(where, status) for where, told in PULLED.items() for status in told])
def test_what_the_hub_answers_when_pulling(hub, run, tmp_path, where, status):
    push(run, "ward/rim")
    hub.broken[where] = status
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, PULLED[where][status], "ward/rim")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    "where", ["POST /api/repos", "POST /ward/rim.git", "PUT /lfs", "POST /api/models/ward/rim/commit"]
)
@pytest.mark.parametrize(("status", "told"), [(403, "your token may not do this"), (500, "trouble of its own")])
def test_what_the_hub_answers_when_pushing(hub, run, where, status, told):
    hub.broken[where] = status
    with pytest.raises(SegraftError) as error:
        push(run, "ward/rim")
    says(error, told, "ward/rim")
    assert "ward/rim" not in hub.repos or "adapter.safetensors" not in hub.files("ward/rim")


def test_who_may_not_write(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", STANDIN["READER"])
    with pytest.raises(SegraftError, match="token may not do this"):
        push(run, "ward/rim")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SegraftError, match="does not accept the token"):
        push(run, "ward/rim")
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    with pytest.raises(SegraftError, match="nothing says who pushes: set HF_TOKEN"):
        push(run, "ward/rim")
    assert hub.asked == []


def test_gated(hub, run, tmp_path):
    push(run, "ward/rim")
    hub.repos["ward/rim"].gated = True
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "ward/rim is gated: ask for access at http://127.0.0.1")


def test_offline_and_no_connection(served, run, tmp_path, monkeypatch):
    push(run, "ward/rim")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "HF_HUB_OFFLINE says to stay offline: unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.server.shutdown()
    served.server.server_close()
    huggingface_hub.close_session()
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "check the connection")


@pytest.mark.parametrize("name", ["rim", "a/b/c", "ward/", "ward/r m", "ward/rim.git", "../etc", "", "ward/r..m"])
def test_names_that_are_none(hub, run, tmp_path, name):
    for what in (lambda: push(run, name), lambda: pull(name, tmp_path / "pulled")):
        with pytest.raises(SegraftError) as error:
            what()
        says(error, "is no name of a repository: write owner/name")
    assert hub.asked == []


def test_a_licence_that_the_hub_does_not_know(hub, run):
    with pytest.raises(SegraftError) as error:
        push(run, "ward/rim", license="my own")
    says(error, "refuses the model card", "give a --license that it knows")


def test_without_the_client(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SegraftError, match=r"pip install 'segraft\[hub\]'"):
        push(run, "ward/rim")


def test_errors_that_are_not_the_hubs_keep_their_trace(hub):
    with pytest.raises(KeyError), hub_room._telling("ward/rim", None):
        raise KeyError("a bug")


@pytest.mark.parametrize("content", ["{", "[]", '{"summary": {}}', '{"summary": 3, "record": {}}'])
def test_an_evaluation_that_is_none(hub, run, content):
    (run / "evaluation.json").write_text(content)
    with pytest.raises(SegraftError, match="evaluate again, or remove it"):
        push(run, "ward/rim")


def test_the_base_that_a_page_names_is_gone(hub, run, tmp_path):
    push(run.parent / "base", "ward/base")
    push(run, "ward/rim", base="ward/base")
    del hub.repos["ward/base"]
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "--without-base", "there is no model repository ward/base")
    assert not (tmp_path / "pulled").exists()
    pull("ward/rim", tmp_path / "pulled", with_base=False)


def test_somebody_else_pushed_meanwhile(hub, run, monkeypatch):
    push(run, "ward/rim")
    real = STANDIN["Handler"]._upload

    def meanwhile(handler, each):
        repo = hub.repos["ward/rim"]
        repo.commit("main", hub.files("ward/rim") | {"other": b"1"})
        return real(handler, each)

    monkeypatch.setattr(STANDIN["Handler"], "_upload", meanwhile)
    with pytest.raises(SegraftError, match="somebody else changed the repository meanwhile"):
        push(run, "ward/rim", license="mit")


def test_a_cache_that_cannot_be_written(hub, run, tmp_path, monkeypatch):
    push(run, "ward/rim")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "HF_HOME, can be written to")


def test_a_record_of_others_may_hold_anything(hub, run, tmp_path):
    net, _ = segraft.networks.load_base(run.parent / "base")
    segraft.load(net, run / "adapter.safetensors")
    content = segraft.save(net, tmp_path / "x.safetensors", record={"mine": [3]}).read_bytes()
    push(run, "ward/rim")
    hub.repos["ward/rim"].commit(
        "main", {"adapter.safetensors": content, "README.md": b"---\nbase_model: [a]\n---\n\xff"}
    )
    assert "network not recorded" in pull("ward/rim", tmp_path / "pulled").notes[0]
    with pytest.raises(SegraftError, match="does not name its base network"):
        segraft.jobs.load_model(tmp_path / "pulled")


def test_a_record_that_segraft_would_not_write_is_not_pulled(hub, run, tmp_path):
    net, _ = segraft.networks.load_base(run.parent / "base")
    segraft.load(net, run / "adapter.safetensors")
    content = segraft.save(net, tmp_path / "x.safetensors", record={"base": "/etc/passwd"}).read_bytes()
    push(run, "ward/rim")
    hub.repos["ward/rim"].commit("main", {"adapter.safetensors": content})
    with pytest.raises(SegraftError, match=r"nothing was written.*record\.base is no object"):
        pull("ward/rim", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("row", [{}, {"n": "x"}, {"n": None}, [], {"n": 1, "dice_mean": "x"}, {"n": [1]}])
def test_an_evaluation_with_other_rows(hub, run, row):
    found = {"summary": {"rim": row}, "record": {"model": "adapter.safetensors"}}
    (run / "evaluation.json").write_text(json.dumps(found))
    with pytest.raises(SegraftError, match="is not what `segraft evaluate` writes"):
        push(run, "ward/rim")


def test_forbidden_is_said_of_what_was_asked(hub, run, tmp_path):
    push(run, "ward/rim")
    hub.broken["GET /api/models"] = 403
    with pytest.raises(SegraftError) as error:
        pull("ward/rim", tmp_path / "pulled")
    says(error, "may not read this", "HF_TOKEN")
    assert "write" not in str(error.value)


def test_a_path_that_holds_the_name_of_an_option_stays(hub, run, tmp_path):
    folder = tmp_path / "my--base-run" / "run"
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes((run / "adapter.safetensors").read_bytes())
    with pytest.raises(SegraftError) as error:
        push(folder, "ward/rim", with_base=True)
    says(error, str(folder), "say where it is with --base-path.")
