"""`segraft push` and `segraft pull` as a user calls them; what they do is tested in tests/exchange/test_hub.py."""

import json
import runpy
from pathlib import Path

import pytest

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
