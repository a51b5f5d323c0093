"""`segraft push` and `segraft pull` as a user calls them; what they do is tested in tests/exchange/test_hub.py."""

import json
import runpy
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from segraft.cli.app import show_notes, show_table

CLIENT = runpy.run_path(str(Path(__file__).resolve().parents[1] / "exchange" / "hub_client.py"))
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # in the client itself


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    with CLIENT["pointed_at_standin"](monkeypatch, tmp_path_factory.mktemp("home")) as server:
        yield server.hub


def test_push_and_pull(hub, segraft, work, tmp_path):
    done = segraft("push", work / "run", "ward/rim", "--json", "--without-cases", "--license", "mit")
    assert done.err == ""
    pushed = done.json
    assert pushed["private"] is False
    assert pushed["files"] == {name: len(content) for name, content in hub.files("ward/rim").items() if name[0] != "."}
    pulled = segraft("pull", "ward/rim", "-o", tmp_path / "pulled", "--json").json
    assert pulled["commit"] == pushed["commit"]
    shown = segraft("inspect", tmp_path / "pulled", "--json").json
    assert list(shown["cases"]) == ["1", "2", "3"]
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    masks = [
        segraft("predict", where, scan, "-o", tmp_path / f"{n}.nii.gz", "--device", "cpu", "--json").json["masks"][0]
        for n, where in enumerate((work / "run", tmp_path / "pulled"))
    ]
    assert masks[0]["volumes_ml"] == masks[1]["volumes_ml"]


def test_what_is_printed(hub, segraft, work, tmp_path):
    shown = segraft("push", work / "run", "ward/rim", "--dry-run")
    assert "library_name: segraft" in shown.out
    assert "segraft pull ward/rim -o run" in shown.out
    assert "note: adapter.safetensors names its 3 cases (such as p" in shown.err
    pushed = segraft("push", work / "run", "ward/rim", "--private")
    assert "/ward/rim (private), commit " in pushed.out
    pulled = segraft("pull", "ward/rim", "-o", tmp_path / "pulled")
    assert "ward/rim, commit " in pulled.out
    assert pulled.err == ""


def test_digests_keep_cases_apart_after_a_pull(hub, segraft, work, tmp_path):
    for name, option, left_out in (("a", "--without-cases", True), ("b", "--without-digests", False)):
        segraft("push", work / "run", f"ward/{name}", option)
        segraft("pull", f"ward/{name}", "-o", tmp_path / name)
        found = segraft("evaluate", tmp_path / name, "--data", work / "D", "--device", "cpu", "--json")
        notes = " ".join(json.loads(found.out)["record"]["notes"])
        assert ("3 cases of Toy trained the adapter and are left out" in notes) == left_out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("push", "{run}", "rim"), "write owner/name"),
        (("push", "{run}", "ward/rim", "--base", "ward/base", "--with-base"), "leave that or --with-base out"),
        (("push", "{run}", "ward/rim", "--base", "ward/base"), "no model repository ward/base"),
        (("push", "{run}", "ward/rim", "--base-path", "{D}/none"), "say where it is with --base-path"),
        (("push", "{base}", "ward/base", "--without-base", "--base", "ward/x"), "is a base itself"),
        (("push", "{D}", "ward/rim"), "does not exist"),
        (("push", "{D}/dataset.json", "ward/rim"), "is not a readable safetensors file"),
        (("push", "{D}/imagesTr/p0.nii.gz", "ward/rim"), "is not a readable safetensors file"),
        (("pull", "ward/none", "-o", "{tmp}/x"), "no model repository ward/none"),
        (("pull", "https://huggingface.co/ward/none", "-o", "{tmp}/x"), "write owner/name"),
    ],
)
def test_refused(hub, refused, work, tmp_path, arguments, says):
    places = {"run": work / "run", "base": work / "base", "D": work / "D", "tmp": tmp_path}
    refused(*(word.format(**places) for word in arguments), says=[says])
    assert not hub.repos


def test_one_json_object_for_an_error(hub, segraft):
    done = segraft("pull", "ward/none", "-o", "nowhere", "--json")
    assert done.code == 2
    assert "no model repository ward/none" in done.json["error"]


def test_a_repository_says_nothing_to_the_terminal(hub, segraft, work, tmp_path):
    """Names of files and of networks there may hold any character; lines may not be forged, nor the screen wiped."""
    segraft("push", work / "run", "ward/rim")
    hub.repos["ward/rim"].commit("main", {"x\x1b[2J\nsegraft: all is well\u202e": b""})
    done = segraft("pull", "ward/rim", "-o", tmp_path / "x")
    assert done.code == 2
    assert "\x1b" not in done.err
    assert "\u202e" not in done.err
    assert "x\\x1b[2J segraft: all is well\\u202e" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("show", [show_notes, lambda texts: show_table("T", ["c"], [texts])])
def test_what_files_say_is_shown_as_text(capsys, show):
    show(["a\x1b[2Jb\x07\tc é"])
    shown = "".join(capsys.readouterr())
    assert "a\\x1b[2Jb\\x07 c é" in shown
    assert "\x1b" not in shown


def test_a_note_is_one_line(capsys):
    show_notes(["a\nnote: b\x85c"])
    assert capsys.readouterr().err == "note: a note: b c\n"


def test_trust_from_the_command_line(segraft, work, tmp_path):
    """A base that names a class of a package: refused, and read once the user vouches for it."""
    with safe_open(work / "base" / "base.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["segraft_base"])
    (tmp_path / "b").mkdir()
    metadata = {"segraft_base": json.dumps(header | {"network": "segraft.data:No"})}
    save_file(load_file(work / "base" / "base.safetensors"), tmp_path / "b" / "base.safetensors", metadata=metadata)
    scan = work / "D" / "imagesTr" / "p7.nii.gz"
    refused = segraft("predict", tmp_path / "b", scan, "-o", tmp_path / "m.nii.gz")
    assert "--trust segraft.data:No or set SEGRAFT_TRUST=segraft.data:No" in refused.err
    tried = segraft("predict", tmp_path / "b", scan, "-o", tmp_path / "m.nii.gz", "--trust", "segraft.data:No")
    assert "'segraft.data:No' cannot be imported" in tried.err
    assert "no package to trust" in segraft("inspect", work / "run", "--trust", "a b").err
