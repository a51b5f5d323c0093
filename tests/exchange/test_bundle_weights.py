"""Which file of a MONAI bundle the weights are read from."""

from pathlib import Path

import pytest

from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config, read_config
from segraft.exchange.bundle_weights import weights_of


def loader(load_path, **more):
    return {"_target_": "CheckpointLoader", "load_path": load_path, **more}


USUAL = loader("$@bundle_root + '/models/model.pt'")
OTHER = "$@bundle_root + '/models/pre.pt'"


def found(folder: Path, entries) -> Path:
    (folder / "models").mkdir(exist_ok=True)
    for name in ("model.pt", "pre.pt"):
        (folder / "models" / name).touch()
    return weights_of(folder, Config(entries, folder / "inference.json", {"bundle_root": str(folder)}))


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({}, "model.pt"),
        ({"a": loader(OTHER)}, "pre.pt"),
        ({"a": loader("$os.path.join(@bundle_root, 'models', 'pre.pt')")}, "pre.pt"),
        ({"a": loader("$os.path.join(@bundle_root, @name)"), "name": "models/pre.pt"}, "pre.pt"),
        ({"a": loader("models/pre.pt")}, "pre.pt"),  # from the bundle's folder
        ({"a": loader(OTHER, _disabled_=True), "b": USUAL}, "model.pt"),
        ({"a": loader(OTHER, _disabled_="$not @off"), "b": USUAL, "off": False}, "model.pt"),
        ({"a": loader(OTHER, _disabled_="True")}, "model.pt"),
        ({"a": loader("@b#load_path"), "b": USUAL}, "model.pt"),  # the same file twice
        ({"a": loader("$@bundle_root + '/models/no.pt'", _disabled_="$not os.path.exists(@a#load_path)")}, "model.pt"),
        ({"a": loader(OTHER, _disabled_="$not os.path.exists(@a#load_path)")}, "pre.pt"),
    ],
)
def test_the_file_that_is_loaded(entries, name, tmp_path):
    assert found(tmp_path, entries) == tmp_path / "models" / name


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"a": loader("$@bundle_root + '/models/model_v2.pt'")}, r"has no models/model_v2\.pt: download"),
        ({"a": loader("$str(pathlib.Path(@bundle_root) / 'x.pt')")}, "expressions of bundles are not run"),
        ({"a": loader("$os.path.join(@bundle_root, __file__)")}, "expressions of bundles are not run"),
        ({"a": loader("$os.path.join(@bundle_root, 5)")}, "expressions of bundles are not run"),
        ({"a": loader(OTHER, _disabled_="$not torch.cuda.is_available()")}, "expressions of bundles are not run"),
        ({"a": USUAL, "b": [loader(OTHER)]}, r"from several files \(.*model\.pt, .*pre\.pt\)"),
        ({"a": loader("x" * 5000)}, "is no path of a file"),
        ({"a": loader("a\0b")}, "is no path of a file"),
        ({"a": loader(5)}, "is 5, which is no path of a file"),
        ({"a": loader("")}, "is no path of a file"),
        ({"a": loader("/etc/hostname")}, "outside of the bundle"),
    ],
)
def test_weights_that_cannot_be_told_are_refused(entries, told, tmp_path):
    with pytest.raises(SegraftError, match=told) as refused:
        found(tmp_path, entries)
    assert len(str(refused.value)) < 500


def nested(depth):
    return '{"a": ' + "[" * depth + "]" * depth + "}"


DOUBLED = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 90))


@pytest.mark.parametrize(("name", "content"), [("c.json", nested(90)), ("c.yaml", DOUBLED)])
def test_configurations_with_an_end_are_read(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert "a" in read_config(tmp_path / name).values or name == "c.yaml"


@pytest.mark.parametrize(
    ("name", "content"),
    [("c.json", nested(150)), ("c.json", nested(100_000)), ("c.yaml", "a: &a [*a]\n"), ("c.yaml", "a: " + "[" * 5000)],
)
def test_configurations_nested_without_end_are_refused(name, content, tmp_path):
    """Deeper than Python follows, and a list that holds itself."""
    (tmp_path / name).write_text(content)
    with pytest.raises(SegraftError, match=name):
        read_config(tmp_path / name)
