"""Bases made of weights from elsewhere, adapted and used as any other."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from segraft.adapters import AdapterSpec, fingerprint, read_header
from segraft.data.cohort import Cohort
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.jobs import adapt, evaluate, import_base, load_model, pretrain
from segraft.jobs.base_source import BaseSource
from segraft.jobs.bases import load_base_of, named_as_loaded
from segraft.jobs.cases import Served
from segraft.jobs.evaluating import on_cohort
from segraft.networks import Loaded, build, load_base, read_base, save_base
from segraft.networks.layouts import BTCV, FSEFT
from segraft.networks.swin import PATH, merges_as_before
from segraft.training.settings import TrainingSettings

SMALL = {"feature_size": 12, "window_size": 2}
UNET = {"widths": [4, 8]}
SHORT = TrainingSettings(epochs=1, device="cpu", volumes=1, patches=1, augmentation="none")
PREPARED = {"patch": (16, 16, 16)}
ONE_CHANNEL = Cohort("Toy", Path("dataset.json"), {1: "spleen"}, ("CT",), ())
SWIN_PREPARED = {"patch": (64, 32, 32)}


def swin(outputs: int, seed: int = 0):
    torch.manual_seed(seed)
    return build("swin_unetr", in_channels=1, out_channels=outputs, arguments=SMALL)


def unet(outputs: int, seed: int = 0):
    torch.manual_seed(seed)
    return build("unet3d", in_channels=1, out_channels=outputs, arguments=UNET)


@pytest.fixture
def scans(tmp_path) -> Path:
    """Four scans with a spleen (1), a left kidney (2) and a left atrium (3)."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "D"
    folder.mkdir()
    for name in "abcd":
        label = np.zeros((16, 16, 16), np.uint8)
        for value in (1, 2, 3):
            label[4 * value - 3 : 4 * value, 4:12, 4:12] = value
        image = rng.normal(0, 1, label.shape).astype(np.float32) + 3 * label
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{name}.nii")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{name}_seg.nii")
    content = {
        "name": "Toy",
        "labels": {"0": "background", "1": "spleen", "2": "kidney_left", "3": "heart_atrium_left"},
        "training": [{"image": f"{name}.nii", "label": f"{name}_seg.nii"} for name in "abcd"],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def fseft(tmp_path) -> Path:
    """A small checkpoint of the few-shot paper's foundation model."""
    state = swin(len(FSEFT), 1).state_dict()
    path = tmp_path / "fseft.pth"
    torch.save({f"module.{k.replace('out.conv.conv.', 'classifier.')}": v for k, v in state.items()}, path)
    return path


@pytest.fixture
def encoder(tmp_path) -> Path:
    """A small checkpoint of MONAI's self-supervised encoder."""
    state = {k: v for k, v in swin(1, 1).state_dict().items() if k.startswith("swinViT.")}
    state = {f"module.{k.removeprefix('swinViT.').replace('linear', 'fc')}": v for k, v in state.items()}
    torch.save({"state_dict": {**state, "module.rotation_head.bias": torch.zeros(4)}}, tmp_path / "model_swinvit.pt")
    return tmp_path / "model_swinvit.pt"


@pytest.fixture
def organs(tmp_path) -> Path:
    """A plain U-Net of four organs."""
    torch.save(unet(4, 1).state_dict(), tmp_path / "organs.pt")
    return tmp_path / "organs.pt"


ORGANS = ("liver", "left kidney", "spleen", "aorta")


# --- making a base


def test_a_foundation_model_becomes_a_base(tmp_path, fseft):
    made = import_base(fseft, tmp_path / "base", network="swin_unetr", network_arguments=SMALL)
    net, info = load_base(tmp_path / "base")
    assert made.labels == dict(enumerate(FSEFT, start=1))
    assert list(info.record["labels"].values()) == list(FSEFT)
    assert "preparation" not in info.record
    assert (made.path, made.fingerprint) == (info.path, fingerprint(net))
    assert info.network == PATH  # as it was trained
    assert info.arguments == {"in_channels": 1, "out_channels": 29, **SMALL}
    wanted = swin(29, 1).state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in net.state_dict().items())
    assert made.report.layout in made.notes[0]


def test_the_networks_own_arguments_are_written_down():
    """`swin_unetr` is one of feature size 48, MONAI's class by its path is not."""
    original, plain = (Loaded(Path("w.pt"), "", 1, original_merging=flag) for flag in (True, False))
    given, net = {"out_channels": 2, "window_size": 4}, swin(2)
    assert named_as_loaded(net, "swin_unetr", given, original) == (PATH, {"feature_size": 48, **given})
    assert named_as_loaded(net, "monai.networks.nets:SwinUNETR", given, original) == (PATH, given)
    assert named_as_loaded(net, "swin_unetr", given, plain) == ("swin_unetr", given)


def test_some_of_its_labels(tmp_path, fseft):
    import_base(fseft, tmp_path / "b", network="swin_unetr", network_arguments=SMALL, labels=["aorta", "kidney_left"])
    net, info = load_base(tmp_path / "b")
    assert list(info.record["labels"].items()) == [("1", "aorta"), ("2", "kidney_left")]
    rows = [FSEFT.index("aorta"), FSEFT.index("left kidney")]
    assert torch.equal(net.out.conv.conv.weight, swin(29, 1).out.conv.conv.weight[rows])


@pytest.mark.parametrize("labels", [("btcv",), BTCV])
def test_a_softmax_loses_its_background(tmp_path, labels):
    source = swin(14, 1)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pt")
    made = import_base(tmp_path / "w.pt", tmp_path / "b", network="swin_unetr", network_arguments=SMALL, labels=labels)
    assert tuple(made.labels.values()) == BTCV[1:]
    weight = source.out.conv.conv.weight
    assert torch.equal(load_base(tmp_path / "b")[0].out.conv.conv.weight, weight[1:] - weight[:1])
    assert any("softmax" in note for note in made.notes)


def test_outputs_without_names_are_numbered(tmp_path, organs):
    made = import_base(organs, tmp_path / "b", network="unet3d", network_arguments=UNET)
    assert made.labels == {n: f"output {n}" for n in (1, 2, 3, 4)}
    named = import_base(organs, tmp_path / "n", network="unet3d", network_arguments=UNET, labels=ORGANS)
    assert tuple(named.labels.values()) == ORGANS
    assert named.fingerprint == made.fingerprint == fingerprint(unet(4, 1))


def test_what_cannot_be_imported(tmp_path, organs, encoder):
    def refuse(match, weights=organs, network="unet3d", arguments=UNET, **options):
        with pytest.raises(SegraftError, match=match):
            import_base(weights, tmp_path / "b", network=network, network_arguments=arguments, **options)
        assert not (tmp_path / "b").exists()

    refuse(r"4 outputs \(of unknown labels\), and 2 labels were named, of which 'liver'", labels=["liver", "spleen"])
    refuse("does not exist", weights=tmp_path / "no.pt")
    refuse("do not fit UNet", arguments={"widths": [4, 8, 16]})
    refuse("holds no head", weights=encoder, network="swin_unetr", arguments=SMALL)
    refuse("name the network swin_unetr", weights=encoder)
    import_base(organs, tmp_path / "b", network="unet3d", network_arguments=UNET)
    with pytest.raises(SegraftError, match="--overwrite"):
        import_base(organs, tmp_path / "b", network="unet3d", network_arguments=UNET)
    import_base(organs, tmp_path / "b", network="unet3d", network_arguments=UNET, overwrite=True)


# --- adapting


def adapted(base, scans, out, *labels, spec=None, prepared=PREPARED, **options):
    return adapt(
        base,
        scans,
        out,
        spec=spec or AdapterSpec("lora", rank=2),
        labels=labels,
        shots=["a", "b"],
        preparation=prepared,
        settings=SHORT,
        **options,
    )


def rebuilt(path):
    """The base of an adapter, as `predict` makes it again."""
    header = read_header(path)
    net, _ = load_base_of(header, None)
    assert fingerprint(net) == header.fingerprint
    return net, header.record["base"]


def test_an_imported_base_is_adapted_by_name(tmp_path, scans, organs):
    import_base(organs, tmp_path / "base", network="unet3d", network_arguments=UNET, labels=ORGANS)
    made = adapted(tmp_path / "base", scans, tmp_path / "run", "kidney_left", "heart_atrium_left", "spleen")
    net, record = rebuilt(made.path)
    assert record["outputs"] == [1, None, 2]
    assert "background" not in record
    source = unet(4, 1)
    assert torch.equal(net.head.weight[[0, 2]], source.head.weight[[1, 2]])
    assert "outputs that start new, as the base has none of their names: heart_atrium_left." in made.notes
    image = load_model(made.path).segment(scans / "d.nii", device="cpu").mask
    assert set(np.unique(image)) <= {0, 1, 2, 3}


def test_outputs_by_position_are_not_recorded(tmp_path, scans):
    one = tmp_path / "one.pt"
    torch.save(unet(1, 1).state_dict(), one)
    import_base(one, tmp_path / "single", network="unet3d", network_arguments=UNET, labels=["liver"])
    made = adapted(tmp_path / "single", scans, tmp_path / "run", "spleen")
    _, record = rebuilt(made.path)
    assert set(record) == {"network", "arguments", "path", "fingerprint"}
    assert record["fingerprint"] == fingerprint(unet(1, 1))
    (note,) = made.notes
    assert note.startswith(f"outputs of {tmp_path / 'single'} that go on under other names: liver as spleen; let them")


def test_a_new_output_needs_training(tmp_path, scans, organs):
    import_base(organs, tmp_path / "base", network="unet3d", network_arguments=UNET, labels=ORGANS)
    frozen = AdapterSpec("lora", rank=2, targets="encoder")
    with pytest.raises(SegraftError, match=r"output for heart_atrium_left, .*--train head or --train decoder"):
        adapted(tmp_path / "base", scans, tmp_path / "run", "spleen", "heart_atrium_left", spec=frozen)
    assert not (tmp_path / "run").exists()
    adapted(tmp_path / "base", scans, tmp_path / "known", "spleen", spec=frozen)
    probe = AdapterSpec("none", train="head")
    assert rebuilt(adapted(tmp_path / "base", scans, tmp_path / "probe", "heart_atrium_left", spec=probe).path)


def test_weights_and_their_labels(tmp_path, scans, organs):
    source = BaseSource("unet3d", organs, UNET, labels=ORGANS)
    made = adapted(source, scans, tmp_path / "run", "spleen")
    net, record = rebuilt(made.path)
    assert record["outputs"] == [2]
    assert torch.equal(net.head.weight, unet(4, 1).head.weight[[2]])
    with pytest.raises(SegraftError, match="leave --network-args out"):
        adapted(BaseSource(tmp_path / "run", arguments=UNET), scans, tmp_path / "no")


def test_an_encoder_alone(tmp_path, scans, encoder):
    """What it does not hold starts the same when the base is built again, whatever was drawn in between."""
    torch.manual_seed(99)
    source = BaseSource("swin_unetr", encoder, SMALL)
    spec = AdapterSpec("lora", rank=2, targets=r".*\.attn\.qkv", train=("decoder", "head"))
    before = torch.get_rng_state()
    loaded = source.load({1: "spleen"}, ONE_CHANNEL)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.new == {0}
    made = adapted(source, scans, tmp_path / "run", "spleen", spec=spec, prepared=SWIN_PREPARED)
    torch.manual_seed(3)
    rebuilt(made.path)
    assert "the decoder starts at random: train it, with --train decoder." in made.notes
    frozen = AdapterSpec("lora", targets=r".*\.attn\.qkv", train="head")
    with pytest.raises(SegraftError, match=r"no trained decoder, so it starts at random, .*--train decoder"):
        adapted(source, scans, tmp_path / "no", "spleen", spec=frozen, prepared=SWIN_PREPARED)
    frozen = AdapterSpec("lora", targets=r".*\.attn\.qkv", train=r"decoder\d\..*")
    with pytest.raises(SegraftError, match="no trained output for spleen"):
        adapted(source, scans, tmp_path / "no", "spleen", spec=frozen, prepared=SWIN_PREPARED)


def test_an_imported_encoder_says_what_was_never_trained(tmp_path, scans, encoder):
    made = import_base(encoder, tmp_path / "b", network="swin_unetr", network_arguments=SMALL, labels=["spleen"])
    assert read_base(made.path).record["untrained"] == {"outputs": [0], "parts": ["decoder"]}
    with pytest.raises(SegraftError, match=r"start at random \(decoder; the outputs spleen\): adapt it first"):
        load_model(made.path)
    with pytest.raises(SegraftError, match="no trained decoder"):
        adapted(tmp_path / "b", scans, tmp_path / "no", "spleen", spec=AdapterSpec("lora", targets="encoder"))
    with pytest.raises(SegraftError, match="parts were never trained: give it as --base, without --weights"):
        BaseSource("swin_unetr", made.path, SMALL).load({1: "spleen"}, ONE_CHANNEL)
    loaded = BaseSource(tmp_path / "b").load({1: "spleen"}, ONE_CHANNEL)
    assert loaded.notes == ("the decoder starts at random: train it, with --train decoder.",)


def test_outputs_for_weights_without_a_head_may_be_named_in_case(tmp_path, encoder, organs):
    made = import_base(encoder, tmp_path / "e", network="swin_unetr", network_arguments=SMALL, without_head=["spleen"])
    assert made.labels == {1: "spleen"}
    whole = {"network": "unet3d", "network_arguments": UNET, "without_head": ["spleen"]}
    assert len(import_base(organs, tmp_path / "o", **whole).labels) == len(ORGANS)


def test_a_base_of_ours_keeps_its_names_and_merging_as_weights(tmp_path):
    """Its header says what its tensors do not: which outputs it has, and how its tokens are joined."""
    torch.manual_seed(5)
    net = build("swin_unetr", in_channels=1, out_channels=2, arguments=SMALL)
    for network in (PATH, "swin_unetr"):
        arguments = {"in_channels": 1, "out_channels": 2, **SMALL}
        record = {"labels": {"1": "spleen", "2": "liver"}}
        base = save_base(net, tmp_path / network[-4:], network=network, arguments=arguments, record=record)
        loaded = BaseSource("swin_unetr", base.path, SMALL).load({7: "liver"}, ONE_CHANNEL)
        assert loaded.described["outputs"] == [1]
        assert merges_as_before(loaded.net) == (network == PATH)
        assert not any("since 1.5" in note for note in loaded.notes)


def test_a_base_of_ours_knows_its_cases_as_weights(tmp_path, scans):
    """Of the four that trained it none is adapted to as long as there are others, nor measured."""
    arguments = {"network": "unet3d", "network_arguments": UNET, "labels": ["1"], "preparation": PREPARED}
    base = pretrain(scans, tmp_path / "base", cases=2, settings=TrainingSettings(epochs=1), **arguments)
    loaded = BaseSource("unet3d", base.path, UNET).load({1: "aorta"}, Cohort.read(scans))
    assert loaded.served == Served.of(read_base(base.path).record)
    assert set(loaded.served.digests) == set(base.cases)
    assert not loaded.served.unlabelled
    torch.save(unet(1, 1).state_dict(), tmp_path / "theirs.pt")
    assert BaseSource("unet3d", tmp_path / "theirs.pt", UNET).load({1: "aorta"}, ONE_CHANNEL).served == Served()


def test_labels_of_which_only_some_names_match_never_go_by_number(tmp_path, scans):
    """The base's 1 is no label of the cohort; the cohort's 1 must not be measured with it."""
    torch.save(unet(2, 1).state_dict(), tmp_path / "two.pt")
    names = ["aorta", "kidney_left"]
    made = import_base(tmp_path / "two.pt", tmp_path / "t", network="unet3d", network_arguments=UNET, labels=names)
    model = load_model(made.path, preparation=Preparation(**PREPARED))
    picked, notes = on_cohort(model, Cohort.read(scans), ())
    assert picked.labels == {2: "kidney_left"}
    assert notes == ("labels of base.safetensors that Toy does not have are left out: aorta.",)


def test_pretraining_from_a_published_encoder(tmp_path, scans, encoder):
    made = pretrain(
        scans,
        tmp_path / "b",
        network="swin_unetr",
        network_arguments=SMALL,
        weights=encoder,
        labels=["spleen"],
        cases=["a"],
        preparation=SWIN_PREPARED,
        settings=SHORT,
    )
    assert read_base(made.path).network == PATH
    assert "model_swinvit.pt" in made.notes[0]
    load_model(made.path)


# --- without adapting


@pytest.fixture
def base(tmp_path, organs) -> Path:
    return import_base(organs, tmp_path / "base", network="unet3d", network_arguments=UNET, labels=ORGANS).path


def test_a_base_is_measured_on_the_labels_that_both_have(tmp_path, scans, base):
    result = evaluate(base, scans, cases=["a"], device="cpu", out=tmp_path, preparation=Preparation(**PREPARED))
    assert {each.label for each in result.results} == {1, 2}
    assert result.notes == ("labels of base.safetensors that Toy does not have are left out: liver, aorta.",)
    model = load_model(base, preparation=Preparation(**PREPARED)).pick({2: "kidney_left", 1: "spleen"}, [1, 2])
    mask = model.segment(scans / "a.nii", device="cpu").mask
    assert set(np.unique(mask)) <= {0, 1, 2}
    single = evaluate(
        base, scans, labels=["spleen"], cases=["a"], device="cpu", out=tmp_path, preparation=Preparation(**PREPARED)
    )
    assert {each.label for each in single.results} == {1}


def test_labels_that_a_base_does_not_have(tmp_path, scans, base):
    with pytest.raises(SegraftError, match=r"4 labels, but 1 were asked for, of which 'heart_atrium_left'"):
        evaluate(base, scans, labels=["3"], cases=["a"], out=tmp_path, preparation=Preparation(**PREPARED))


def test_numbers_do_not_count_where_names_say_otherwise(tmp_path, scans, organs):
    """The base's 1 is the cohort's 2: by number the kidney's mask would be held against the spleen."""
    names = ["left kidney", "spleen", "heart atrium left"]
    torch.save(unet(3, 1).state_dict(), tmp_path / "three.pt")
    made = import_base(tmp_path / "three.pt", tmp_path / "t", network="unet3d", network_arguments=UNET, labels=names)
    model = load_model(made.path, preparation=Preparation(**PREPARED))
    picked, notes = on_cohort(model, Cohort.read(scans), ())
    assert picked.labels == {2: "kidney_left", 1: "spleen", 3: "heart_atrium_left"}
    assert notes == ()


def test_an_imported_base_needs_a_preparation(base):
    with pytest.raises(SegraftError, match="does not say how scans are prepared"):
        load_model(base)
