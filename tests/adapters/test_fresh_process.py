"""An adapter trained in one process serves in another, with nothing but its file and the base."""

import hashlib
import subprocess
import sys

import pytest

SCRIPT = '''
import hashlib, sys
import torch
from torch import nn
from segraft.adapters import AdapterSpec, fingerprint, graft, load, merge, require_gradients, save

torch.use_deterministic_algorithms(True)
task, folder = sys.argv[1:]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.mha(tokens, tokens, tokens)[0]).chunk(3, -1)
        tokens = nn.functional.scaled_dot_product_attention(q, k, v)
        return tokens.transpose(1, 2).reshape(x.shape)


class Net(nn.Module):
    """Every kind of layer in one network; `stem` is registered under two names."""

    parts = {"head": ("head",)}

    def __init__(self):
        super().__init__()
        stem = nn.Conv3d(1, 4, 3, padding=1, padding_mode="circular")
        self.stem, self.layers = stem, nn.Sequential(
            stem,
            nn.BatchNorm3d(4),
            nn.Conv3d(4, 4, (1, 3, 3), stride=2, padding="valid", groups=2),
            nn.ConvTranspose3d(4, 4, 2, stride=2, groups=2),
            nn.Conv3d(4, 4, 3, dilation=2, padding="same"),
            Attention(),
        )
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.head(self.layers(x))


torch.manual_seed(11)
net = Net()
x = torch.randn(2, 1, 4, 7, 7)
if task == "train":
    mark = fingerprint(net)
    spec = AdapterSpec("dora_c", rank=3, bias="low_rank", train=("head", "norm:.*"),
                       slices={r".*\\.qkv": ("2/3", "3/3")}, ranks={"stem": 2})
    graft(net, spec)
    optimiser = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        net(x).square().mean().backward()
        require_gradients(net)
        optimiser.step()
    assert fingerprint(net) == mark
    save(net, f"{folder}/task.safetensors", record={"task": "demo"})
elif task == "load":
    load(net, f"{folder}/task.safetensors")
elif task == "merge":
    merge(load(net, f"{folder}/task.safetensors"))
    torch.save(net.state_dict(), f"{folder}/merged.pt")
elif task == "plain":
    net.load_state_dict(torch.load(f"{folder}/merged.pt"))
print(hashlib.sha256(net.eval()(x).detach().numpy().tobytes()).hexdigest())
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    file = folder / "script.py"
    file.write_text(SCRIPT, encoding="utf-8")

    def run(task: str) -> str:
        command = [sys.executable, "-W", "error", str(file), task, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_a_fresh_process_gives_the_same_bits(script):
    trained = script("train")
    assert len(trained) == len(hashlib.sha256().hexdigest())
    assert script("load") == trained
    assert script("merge") == trained
    assert script("plain") == trained
