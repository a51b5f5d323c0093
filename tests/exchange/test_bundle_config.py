"""Configurations of bundles are data: references and arithmetic are followed, and nothing is run."""

import json
from pathlib import Path

import pytest

from segraft.errors import SegraftError
from segraft.exchange.bundle_config import Config, read_config

VALUES = {
    "size": 4,
    "sizes": [1, 2, "@size"],
    "highres": True,
    "nested": {"a": {"b": [7, 8]}, "again": "@sizes#2"},
    "root": "/bundle",
    "text": "%root",
}


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("@size", 4),
        ("@nested#a#b#1", 8),
        ("@nested::a::b::0", 7),
        ("@nested#again", 4),
        ("@sizes", [1, 2, 4]),
        ("$@size * 2 + 1", 9),
        ("$-@size / 8", -0.5),
        ("$[@size, (1.5, 2)]", [4, [1.5, 2]]),
        ("$[1.5] * 1 if @highres and not False else [3.0]", None),
        ("$[1.5, 1.5] if @highres else [3.0]", [1.5, 1.5]),
        ("$'low' if @size == 3 else 'high'", "high"),
        ("$@root + '/models/model.pt'", "/bundle/models/model.pt"),
        ("$None", None),
        ("%root", "/bundle"),
        ({"in": "@size", "list": ["@highres", "plain @ text"]}, {"in": 4, "list": [True, "plain @ text"]}),
    ],
)
def test_values(raw, value):
    if value is None and raw != "$None":
        with pytest.raises(SegraftError, match="expressions of bundles are not run"):
            Config(VALUES, Path("c.json")).resolve(raw)
    else:
        assert Config(VALUES, Path("c.json")).resolve(raw) == value


@pytest.mark.parametrize(
    "text",
    [
        "$__import__('os').system('touch ran')",
        "$open('ran', 'w')",
        "$torch.device('cpu')",
        "$(lambda: 1)()",
        "$[x for x in (1, 2)]",
        "$9 ** 9 ** 9",
        "$'a' * 10 ** 9",
        "$'%s' % @size",
        "$[0] * 1000000000",
        "$import os",
        "$@size.__class__",
        "$@nested['a']",
        "$" + "(" * 300 + "1" + ")" * 300,
        "$1 / 0",
    ],
)
def test_nothing_is_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SegraftError, match="expressions of bundles are not run"):
        Config(VALUES, Path("c.json")).resolve(text)
    assert not any(tmp_path.iterdir())


def test_what_is_missing_or_leads_in_a_circle_is_told():
    with pytest.raises(SegraftError, match="refers to 'nowhere', which is not in it"):
        Config(VALUES, Path("c.json")).resolve("@nowhere")
    circle = Config({"a": "@b", "b": "$@a + 1"}, Path("c.json"))
    for asked in (lambda: circle.value("a"), lambda: Config({"a": "@a"}, Path("c.json")).followed("@a")):
        with pytest.raises(SegraftError, match="in a circle"):
            asked()


@pytest.mark.parametrize("name", ["c.json", "c.yaml"])
def test_files(name, tmp_path):
    path = tmp_path / name
    path.write_text(json.dumps(VALUES) if name.endswith("json") else "size: 4\nsizes:\n- 1\n- '@size'\n")
    config = read_config(path, {"root": "/here"})
    assert config.value("sizes#1") in (2, 4)
    assert config.value("root") == "/here"
    for content in ("[1, 2]", "{", "!!python/object/apply:os.getcwd []"):
        path.write_text(content)
        with pytest.raises(SegraftError, match=name):
            read_config(path)
