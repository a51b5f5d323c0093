"""What each command does, for use from Python: `segraft.jobs.adapt(...)`, `predict`, `evaluate`, `pretrain`."""

from segraft.jobs.adapt import adapt
from segraft.jobs.evaluate import evaluate
from segraft.jobs.model import Model, load_model
from segraft.jobs.predict import predict
from segraft.jobs.pretrain import pretrain

__all__ = ["Model", "adapt", "evaluate", "load_model", "predict", "pretrain"]
