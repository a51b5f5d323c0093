"""A study's file names networks of the user's own: refused, and built where the user vouches for their package."""

import os
import sys
from types import SimpleNamespace

import pytest

from segraft.errors import SegraftError
from segraft.studies import engines
from segraft.studies.engines import ENGINES
from segraft.studies.reading import read_study
from segraft.studies.run import Outcome, Run, write_json

VIT = {"patch_size": 4, "hidden_size": 12, "mlp_dim": 24, "num_layers": 2, "num_heads": 2}
NETS = """
from segraft.networks import UNet
from segraft.networks.mae import MaskedAutoencoder

class Net(UNet): pass

class Encoder(MaskedAutoencoder): pass
"""


@pytest.fixture
def ward(tmp_path, monkeypatch):
    """A package of the user's, here and in processes that are started: ward.nets:Net and ward.nets:Encoder."""
    (tmp_path / "site" / "ward").mkdir(parents=True)
    (tmp_path / "site" / "ward" / "nets.py").write_text(NETS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("SEGRAFT_TRUST", "")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "ward"]:
        del sys.modules[name]


@pytest.fixture
def study(write_study):
    """Four runs: one base on the user's network, one whose encoder is the user's, which its file then names."""
    encoder = {"network": "ward.nets:Encoder", "arguments": {**VIT, "decoder_layers": 1, "decoder_size": 32}}
    unetr = {"network": "unetr_channelwise", "arguments": {**VIT, "img_size": [16, 16, 4], "feature_size": 4}}
    return write_study(
        shots=[2],
        folds=None,
        test_patients=1,
        preparation={"patch": [16, 16, 4]},
        bases={
            "net": {"network": "ward.nets:Net", "arguments": {"widths": [2, 4], "spatial_dims": 3}, "random": True},
            "vit": {**unetr, "encoder": encoder, "training": {"epochs": 1, "volumes": 4, "patches": 1}},
        },
        arms=[{"base": "net", "strategies": ["full"]}, {"base": "vit", "strategies": ["decoder"]}],
        training={"epochs": 1, "volumes": 2, "patches": 1},
    )


@pytest.mark.usefixtures("one_thread", "ward")
@pytest.mark.parametrize("workers", [1, 2])
def test_by_the_option(segraft, study, tmp_path, workers):
    command = ("run", study, "--out", tmp_path / "out", "--device", "cpu", "--workers", workers)
    code, said, err = segraft(*command)
    assert (code, said) == (2, "")
    assert err == (
        f"segraft: the study {study} names the network 'ward.nets:Net', which no file may choose by itself, as its "
        "code may do anything: if you trust both, pass --trust ward or set SEGRAFT_TRUST=ward.\n"
    )
    assert "ward" not in sys.modules
    assert not (tmp_path / "out").exists()

    code, said, err = segraft(*command, "--trust", "ward")
    assert code == 0, err
    assert ": 4 runs done, 0 before, 0 failed" in said

    os.environ["SEGRAFT_TRUST"] = ""
    assert "--trust ward" in segraft(*command)[2], "the study's folder keeps no word of the user's"
    assert segraft("show", tmp_path / "out")[0] == 0, "which builds no network"
    assert ": 0 runs done, 4 before" in segraft(*command, "--trust", "ward.nets")[1]


@pytest.mark.usefixtures("ward")
def test_other_files(write_study, monkeypatch):
    encoder = {"network": "ward.nets:Encoder"}
    path = write_study(bases={"b": {"network": "unetr", "encoder": encoder}}, arms=[{"base": "b"}])
    with pytest.raises(SegraftError, match=r"'ward\.nets:Encoder', which no file may choose"):
        read_study(path)
    dense = {"network": "monai.networks.nets:DenseNet121", "arguments": {"pretrained": True}}
    with pytest.raises(SegraftError, match="with pretrained True, by which it may fetch"):
        read_study(write_study(bases={"b": dense}, arms=[{"base": "b"}]))
    monkeypatch.setenv("SEGRAFT_TRUST", "ward")
    write_study(bases={"b": {"network": "unetr", "encoder": encoder}}, arms=[{"base": "b"}])
    read_study(path)


@pytest.mark.parametrize("trusted", [None, "", "ward,other.nets"])
def test_machines_of_a_cluster_have_it_too(tmp_path, monkeypatch, trusted):
    """Their own environment says nothing of it. Stands for Ray: what it is asked for."""
    asked = []

    def remote(do):
        return SimpleNamespace(options=lambda **options: asked.append(options) or SimpleNamespace(remote=do))

    library = SimpleNamespace(
        is_initialized=lambda: True,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}],
        remote=remote,
        wait=lambda refs, **_: (refs[:1], refs[1:]),
        get=lambda ref: ref,
        exceptions=SimpleNamespace(RayError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "ray", library)
    monkeypatch.setattr("segraft.studies.worker.do", Outcome)
    monkeypatch.delenv("SEGRAFT_TRUST") if trusted is None else monkeypatch.setenv("SEGRAFT_TRUST", trusted)
    run = Run("pretrain", {"settings": {"device": "cpu"}}, "/D", None, ("a",))
    write_json(tmp_path / "request.json", vars(run))
    with ENGINES["ray"](1) as do:
        assert list(do([tmp_path])) == [Outcome(str(tmp_path))]
    given = asked[0]["runtime_env"]["env_vars"]
    assert given.pop("SEGRAFT_TRUST", None) == (trusted or None)
    assert given == engines.threads_of(2)
