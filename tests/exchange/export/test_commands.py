"""The commands, as a user gives them."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from typer.testing import CliRunner

from segraft.adapters import AdapterSpec
from segraft.cli import app
from segraft.jobs import load_model
from segraft.networks import load_base


def segraft(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_there_and_back(make, tmp_path):
    made = make("unet", AdapterSpec("dora_c", rank=2, train="head"))
    done = segraft("export", made.path, "--format", "peft", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "saved whole (0.00 MB), as PEFT has no factors for ConvTranspose2d: upsampling.0." in done.output
    back = tmp_path / "back.safetensors"
    done = segraft("import", tmp_path / "out", "--base", made.base, "-o", back, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["labels"] == {"1": "core", "2": "rim"}
    with torch.no_grad():
        torch.testing.assert_close(load_model(back).net(made.image), made.logits(), rtol=0, atol=1e-5)
    assert segraft("import", tmp_path / "out", "--base", made.base, "-o", back, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("import", "{out}", "-o", "{tmp}/a.safetensors"), "name the base that it was trained on, with --base"),
        (("import", "{base}", "--base", "{base}", "-o", "{tmp}/x"), "is a file, and --base goes with a folder of PEFT"),
        (("import", "{out}/adapter_model.safetensors", "--base", "{base}", "-o", "{tmp}/x"), "give its folder, {out}."),
        (("import", "{tmp}/gone", "--base", "{base}", "-o", "{tmp}/x"), "{tmp}/gone does not exist: give a folder"),
        (("import", "{tmp}/gone", "-o", "{tmp}/x"), "{tmp}/gone does not exist: give a file of weights"),
        (("import", "{tmp}", "--base", "{base}", "-o", "{tmp}/x"), "{tmp} holds no adapter_config.json"),
        (
            ("import", "{out}", "--base", "{base}", "--network-args", '{"widths": [4]}', "-o", "{tmp}/x"),
            "--network-args goes with weights",
        ),
        (("import", "{out}", "--base", "{tmp}/nothing", "-o", "{tmp}/x"), "does not exist"),
        (("export", "{adapter}", "--format", "pfet", "-o", "{tmp}/x"), "unknown format 'pfet': choose "),
        (("export", "{base}", "--format", "peft", "-o", "{tmp}/x"), "is a base, and only adapters are exported"),
        (("export", "{adapter}", "--format", "peft", "-o", "{out}"), "pass --overwrite"),
    ],
)
def test_what_is_refused(make, tmp_path, arguments, says):
    made = make("unet", AdapterSpec("lora", rank=2, targets="encoder"))
    assert segraft("export", made.path, "--format", "peft", "-o", tmp_path / "out").exit_code == 0
    places = {"out": tmp_path / "out", "tmp": tmp_path, "base": made.base, "adapter": made.path}
    before = sorted(tmp_path.rglob("*"))
    done = segraft(*(argument.format(**places) if "widths" not in argument else argument for argument in arguments))
    assert done.exit_code != 0
    assert says.format(**places) in str(done.exception)
    assert "\n" not in str(done.exception)
    assert sorted(tmp_path.rglob("*")) == before


def test_neither_needs_peft(make, tmp_path):
    """The format is JSON and safetensors: PEFT is imported by neither command."""
    made = make("unet")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=["encoder.0.0"], init_lora_weights=False)
    peft.get_peft_model(load_base(made.base)[0], config).save_pretrained(str(tmp_path / "p"))
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from segraft.jobs import export, import_peft\n"
        f"export({str(made.path)!r}, {str(tmp_path / 'out')!r}, format='peft')\n"
        f"import_peft({str(tmp_path / 'p')!r}, {str(tmp_path / 'a.safetensors')!r}, base={str(made.base)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").is_file()
