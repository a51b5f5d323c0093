"""What each command does, for use from Python: `segraft.jobs.adapt(...)`, `predict`, `evaluate`, `pretrain`.

Imported when first used: counting parameters or reading a header does not wait for MONAI and Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segraft.jobs.adapting import adapt
    from segraft.jobs.evaluating import evaluate
    from segraft.jobs.exporting import export
    from segraft.jobs.importing import import_base
    from segraft.jobs.importing_peft import import_peft
    from segraft.jobs.model import Model, load_model
    from segraft.jobs.predicting import predict
    from segraft.jobs.pretraining import pretrain
    from segraft.jobs.pulling import pull
    from segraft.jobs.pushing import push

_HOMES = {
    "Model": "model",
    "adapt": "adapting",
    "evaluate": "evaluating",
    "export": "exporting",
    "import_base": "importing",
    "import_peft": "importing_peft",
    "load_model": "model",
    "predict": "predicting",
    "pretrain": "pretraining",
    "pull": "pulling",
    "push": "pushing",
}

__all__ = [
    "Model",
    "adapt",
    "evaluate",
    "export",
    "import_base",
    "import_peft",
    "load_model",
    "predict",
    "pretrain",
    "pull",
    "push",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'segraft.jobs' has no attribute {name!r}")
    return getattr(import_module(f"segraft.jobs.{_HOMES[name]}"), name)
