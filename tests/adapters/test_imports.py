"""What importing costs: the adapter core needs torch alone, the package itself not even that."""

import subprocess
import sys

import pytest


def imported(statement: str) -> set[str]:
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"monai", "lightning", "pydantic", "safetensors", "pandas", "matplotlib", "nibabel", "scipy", "typer", "rich"}


@pytest.mark.parametrize("statement", ["import segraft.adapters", "import segraft; segraft.AdapterSpec('dora_c')"])
def test_the_adapter_core_needs_torch_alone(statement):
    modules = imported(statement)
    assert "torch" in modules
    assert not modules & HEAVY


def test_the_package_does_not_wait_for_torch():
    modules = imported("import segraft; segraft.__version__; segraft.SegraftError; dir(segraft)")
    assert not modules & (HEAVY | {"torch", "numpy"})


def test_public_names_exist():
    import segraft
    import segraft.adapters

    assert all(hasattr(segraft.adapters, name) for name in segraft.adapters.__all__)
    assert segraft.graft is segraft.adapters.graft
    assert {"graft", "load", "AdapterSpec", "SegraftError"} <= set(dir(segraft))
    with pytest.raises(AttributeError, match="no attribute 'grafted_on'"):
        _ = segraft.grafted_on
