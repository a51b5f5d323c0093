"""A folder that PEFT itself saved gives, as an adapter file, the outputs that it gives in PEFT."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from segraft.adapters import AdapterSpec, read_header
from segraft.data.labels import Labels
from segraft.data.preparation import Preparation
from segraft.errors import SegraftError
from segraft.exchange import opening
from segraft.jobs import export, import_peft, load_model
from segraft.networks import load_base, save_base

CONVS = ["encoder.0.0", "encoder.0.2", "bottleneck.0", "decoder.0.2"]


def trained(net: nn.Module, config: peft.PeftConfig, folder, *, seed: int = 3) -> nn.Module:
    """The network in PEFT, everything trainable moved from its start, and saved."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is said about training
        model = peft.get_peft_model(net, config)
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:
                    value.add_(torch.randn_like(value) * 0.1)
        model.save_pretrained(str(folder))
    return model.eval()


def check(base, config, folder, out, image, **options):
    """Train in PEFT, import, and hold Segraft against PEFT as it loads the folder."""
    trained(load_base(base)[0], config, folder)
    result = import_peft(folder, out, base=base, **options)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = peft.PeftModel.from_pretrained(load_base(base)[0], str(folder)).eval()(image)
        torch.testing.assert_close(load_model(result.path).net(image), expected, rtol=0, atol=1e-5)
        assert (load_base(base)[0].eval()(image) - expected).abs().max() > 1e-3
    return result


def lora(**settings):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": CONVS, **settings})


CONFIGS = {
    "lora": lora(),
    "rs_lora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "rs_dora": lora(use_dora=True, use_rslora=True),
    "head": lora(modules_to_save=["head"]),
    "transposed whole": lora(use_dora=True, modules_to_save=["upsampling.0", "head"]),
    "ranks": lora(rank_pattern={"encoder.0.0": 2, "^bottleneck": 7, r"decoder\.0\.\d": 1}),
    "alphas": lora(alpha_pattern={"encoder.0.0": 1, "0.2": 11}),
    "ranks and alphas, rooted": lora(use_rslora=True, rank_pattern={"0.0": 2}, alpha_pattern={"0.2": 11}),
    "expression": lora(target_modules=r"(encoder|decoder)\..*\.\d", exclude_modules=["encoder.0.0", "0.1", "0.3"]),
    "layers": lora(target_modules=["0", "2"], layers_to_transform=[0], layers_pattern="encoder"),
    "biases": lora(bias="all"),
    "biases of its layers": lora(bias="lora_only"),
    "biases and a head": lora(bias="all", modules_to_save=["head"]),
    "bias of B": lora(lora_bias=True),
    "bias of B and of its layers": lora(lora_bias=True, bias="lora_only"),
    "dropout": lora(lora_dropout=0.2),
    "gaussian": lora(init_lora_weights="gaussian"),
    "not at its start": lora(init_lora_weights=False),
    "fan_in_fan_out": lora(fan_in_fan_out=True),
    "no factors": lora(target_modules="dummy-target-modules", modules_to_save=["head"]),
}


@pytest.mark.parametrize("settings", CONFIGS)
def test_settings(make, tmp_path, settings):
    made = make("unet")
    result = check(made.base, CONFIGS[settings], tmp_path / "p", tmp_path / "a.safetensors", made.image)
    assert result.labels == {1: "core", 2: "rim"}
    assert load_model(result.path).preparation == made.preparation
    assert any("taken on trust" in note for note in result.notes)
    assert any("dropout 0.2" in note for note in result.notes) == (settings == "dropout")


@pytest.mark.parametrize(
    ("network", "targets", "saved"),
    [
        ("unet3d", ["0.0", "0.3", "head"], None),
        ("swin_unetr", ["qkv", "linear1", "conv1.conv"], ["out"]),
        ("unetr", ["qkv", "out_proj", "patch_embeddings.1"], None),
        ("segresnet", ["conv1.conv", "convInit.conv"], ["conv_final"]),
    ],
)
def test_networks(make, tmp_path, network, targets, saved):
    made = make(network)
    names = [name for name, _ in made.plain().named_modules() if name]
    found = [name for name in targets if any(each == name or each.endswith(f".{name}") for each in names)]
    if network == "swin_unetr":
        saved = None  # "out" would be PEFT's own lora_dropout
    config = peft.LoraConfig(r=2, target_modules=found, use_dora=True, modules_to_save=saved)
    check(made.base, config, tmp_path / "p", tmp_path / "a.safetensors", made.image)


def test_several_channels(make, tmp_path):
    made = make("unet", channels=3)
    result = check(made.base, lora(), tmp_path / "p", tmp_path / "a.safetensors", made.image)
    assert load_model(result.path).channels == ("C0", "C1", "C2")


def test_batch_norms(make, tmp_path):
    made = make("unet", norm="batch")
    config = peft.LoraConfig(r=2, target_modules=["encoder.0.0"], modules_to_save=["encoder.0.1"])
    check(made.base, config, tmp_path / "p", tmp_path / "a.safetensors", made.image)


def test_a_pickle_is_read_without_running_it(make, tmp_path):
    made = make("unet")
    torch.manual_seed(1)
    net = trained(made.plain(), lora(), tmp_path / "p")
    with torch.no_grad():
        expected = net(made.image)
    (tmp_path / "p" / "adapter_model.safetensors").unlink()
    state = peft.get_peft_model_state_dict(net)
    torch.save(state, tmp_path / "p" / "adapter_model.bin")
    result = import_peft(tmp_path / "p", tmp_path / "a.safetensors", base=made.base)
    with torch.no_grad():
        torch.testing.assert_close(load_model(result.path).net(made.image), expected, rtol=0, atol=1e-5)
    torch.save({"x": Harmful()}, tmp_path / "p" / "adapter_model.bin")
    with pytest.raises(SegraftError, match=r"adapter_model\.bin"):
        import_peft(tmp_path / "p", tmp_path / "b.safetensors", base=made.base)
    assert not Harmful.run


class Harmful:
    run = False

    def __reduce__(self):
        return (setattr, (Harmful, "run", True))


@pytest.mark.parametrize("method", ["lora", "dora_c", "cp_dora", "arena"])
def test_what_left_comes_back(make, tmp_path, method):
    """Segraft to PEFT to Segraft: the same outputs, labels and preparation, and its base is known."""
    made = make("unet", AdapterSpec(method, rank=2, train="head"), norm="batch")
    export(made.path, tmp_path / "out", format="peft")
    result = import_peft(tmp_path / "out", tmp_path / "back" / "a.safetensors", base=made.base)
    with torch.no_grad():
        back = load_model(result.path).net(made.image)
    torch.testing.assert_close(back, made.logits(), rtol=0, atol=1e-5)
    assert not any("trust" in note for note in result.notes)
    assert read_header(result.path).fingerprint == read_header(made.path).fingerprint


def test_another_base_is_refused(make, tmp_path):
    made = make("unet")
    export(made.path, tmp_path / "out", format="peft")
    net, info = load_base(made.base)
    with torch.no_grad():
        net.head.bias += 1
    other = save_base(net, tmp_path / "other", network=info.network, arguments=info.arguments, record=info.record)
    with pytest.raises(SegraftError, match="was written for a base with fingerprint"):
        import_peft(tmp_path / "out", tmp_path / "a.safetensors", base=other.path)


def test_a_base_of_another_tool(make, tmp_path, monkeypatch):
    made = make("unet")
    trained(made.plain(), lora(), tmp_path / "p")
    save_file(made.plain().state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(opening.SCHEMES, "toy", f"{__name__}:open_toy")
    result = import_peft(tmp_path / "p", tmp_path / "of_toy", base=f"toy:{tmp_path}")
    model = load_model(result.path)
    assert dict(model.labels) == {3: "core", 5: "rim"}
    assert model.preparation.patch == (16, 16, 1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = peft.PeftModel.from_pretrained(made.plain(), str(tmp_path / "p")).eval()(made.image)
        torch.testing.assert_close(model.net(made.image), expected, rtol=0, atol=1e-5)


def open_toy(path, fold):
    return opening.Opened(
        network="unet",
        arguments={"in_channels": 1, "widths": [4, 8]},
        weights=path / "weights.safetensors",
        labels=Labels({3: "core", 5: "rim"}),
        background=False,
        channels=("",),
        preparation=Preparation(patch=(16, 16, 1)),
    )


def test_labels_and_preparation_of_ones_own(make, tmp_path):
    made = make("unet")
    trained(made.plain(), lora(), tmp_path / "p")
    result = import_peft(
        *(tmp_path / "p", tmp_path / "new"),
        base=made.base.parent,
        labels=("left", "right"),
        preparation={"spacing": (2.0, 2.0, 2.0)},
    )
    assert result.path == tmp_path / "new" / "adapter.safetensors"
    model = load_model(result.path)
    assert dict(model.labels) == {1: "left", 2: "right"}
    assert model.preparation.spacing == (2.0, 2.0, 2.0)
    assert model.preparation.patch == made.preparation.patch


def test_a_base_that_does_not_say_its_task(make, tmp_path):
    made = make("unet")
    trained(made.plain(), lora(), tmp_path / "p")
    net, info = load_base(made.base)
    bare = save_base(net, tmp_path / "bare", network=info.network, arguments=info.arguments)
    with pytest.raises(SegraftError, match="does not say what its outputs are: name them, in order, with --labels"):
        import_peft(tmp_path / "p", tmp_path / "a.safetensors", base=bare.path)
    with pytest.raises(SegraftError, match="does not say how scans are prepared"):
        import_peft(tmp_path / "p", tmp_path / "a.safetensors", base=bare.path, labels=("a", "b"))
    with pytest.raises(SegraftError, match="3"):
        import_peft(
            *(tmp_path / "p", tmp_path / "a.safetensors"),
            base=bare.path,
            labels=("a", "b", "c"),
            preparation={"patch": (16, 16, 1)},
        )
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lora(init_lora_weights="pissa", target_modules=["fc"]), "init_lora_weights 'pissa' changed the weights"),
        (lora(init_lora_weights="olora", target_modules=["fc"]), "path_initial_model_for_weight_conversion"),
        (peft.LoHaConfig(target_modules=["conv"]), "PEFT's type LOHA"),
        (peft.IA3Config(target_modules=["fc"], feedforward_modules=[]), "PEFT's type IA3"),
        (lora(r=2, target_modules=["grouped"]), "mix the groups"),
        (lora(target_modules=["reflected"]), "pad with zeros"),
        (lora(target_modules=["twice"]), r"twice, which the network also calls again\.0"),
        (lora(target_modules=["conv"], modules_to_save=["twice"]), "also calls"),
        (lora(target_modules=["embedding"]), "lora_embedding_A"),
        (lora(target_modules=None, target_parameters=["fc.weight"]), "target_parameters"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.peft_type.value,
)
def test_what_has_no_counterpart_is_refused(tmp_path, make, config, says):
    made = make(f"{__name__}:Odd", AdapterSpec("lora", targets="conv"), patch=(8, 8, 1))
    trained(made.plain(), config, tmp_path / "p")
    with pytest.raises(SegraftError, match=says) as refused:
        import_peft(tmp_path / "p", tmp_path / "a.safetensors", base=made.base)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a.safetensors").exists()


class Odd(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(4, 4, 1)
        self.again = nn.Sequential(self.twice)
        self.fc = nn.Linear(4, out_channels)
        self.embedding = nn.Embedding(3, 4)

    def forward(self, image):
        x = self.twice(self.reflected(self.grouped(self.conv(image))))
        return self.fc(x.movedim(1, -1) + self.embedding.weight[0]).movedim(-1, 1)


def change_config(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "not a readable safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: change_config(folder, r=0), "r is 0, and should be greater than 0"),
        (lambda folder: change_config(folder, lora_alpha="much"), "lora_alpha is 'much'"),
        (lambda folder: change_config(folder, r=4), "whose rank is 4"),
        (lambda folder: change_config(folder, use_dora=True), "do not agree on DoRA"),
        (lambda folder: change_config(folder, use_magic={"of": 1}), "no counterpart of use_magic"),
        (lambda folder: change_config(folder, modules_to_save=["head"]), "lacks head.weight"),
        (lambda folder: change_config(folder, rank_pattern={"(": 2}), "is not a valid regular expression"),
    ],
    ids=["no-weights", "no-safetensors", "half", "list", "r", "alpha", "rank", "dora", "unknown", "whole", "pattern"],
)
def test_a_spoilt_folder_is_refused(make, tmp_path, spoil, says):
    made = make("unet")
    trained(made.plain(), lora(), tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(SegraftError, match=says) as refused:
        import_peft(tmp_path / "p", tmp_path / "a.safetensors", base=made.base)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a.safetensors").exists()


def test_another_network_is_refused(make, tmp_path):
    made = make("unet", widths=[4, 8, 16])
    trained(made.plain(), lora(target_modules=["encoder.1.0"]), tmp_path / "p")
    trained(made.plain(), lora(), tmp_path / "q")
    trained(made.plain(), lora(modules_to_save=["encoder.2"]), tmp_path / "r")
    shutil.rmtree(made.base.parent)
    other = make("unet")
    for folder, says in (("p", "UNet has no such layer"), ("q", "whose weight is"), ("r", "is --base the network")):
        with pytest.raises(SegraftError, match=says):
            import_peft(tmp_path / folder, tmp_path / "a.safetensors", base=other.base)


def test_a_file_that_is_there_is_kept(make, tmp_path):
    made = make("unet")
    trained(made.plain(), lora(), tmp_path / "p")
    before = made.path.read_bytes()
    with pytest.raises(SegraftError, match="--overwrite"):
        import_peft(tmp_path / "p", made.path, base=made.base)
    assert made.path.read_bytes() == before
    import_peft(tmp_path / "p", made.path, base=made.base, overwrite=True)
    assert made.path.read_bytes() != before
