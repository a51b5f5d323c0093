"""The command line. Commands only translate: options in, one call of `segraft.jobs`, tables or JSON out."""

import json
import os
import sys

from segraft.cli.app import app, one_line
from segraft.cli.exporting import export
from segraft.cli.importing import import_
from segraft.cli.look import inspect, params
from segraft.cli.prepare import prepare
from segraft.cli.sharing import pull, push
from segraft.cli.study import study
from segraft.cli.train import adapt, pretrain
from segraft.cli.use import demo, evaluate, predict
from segraft.errors import SegraftError

__all__ = ["app", "main"]

INTERRUPTED = 130  # what Typer turns Ctrl-C into

for _command in (prepare, pretrain, adapt, predict, evaluate, params, inspect, export, push, pull, demo):
    app.command()(_command)
app.command("import")(import_)
app.add_typer(study, name="study")


def _leave_others(code: int) -> None:
    """End here where processes train together: their connections' threads do not always survive an orderly end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Run the command line; bad input is one sentence on standard error and exit code 2."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except Exception as error:
        # What the parser refuses is a ClickException, which Typer keeps in another place in each of its versions.
        if not (isinstance(error, SegraftError) or hasattr(error, "format_message")):
            raise
        text = str(error) if isinstance(error, SegraftError) else f"{error.format_message().rstrip('.')}: see --help."
        sentence = one_line(text)  # what a library said inside it may run over several lines
        if "--json" in sys.argv:
            print(json.dumps({"error": sentence}))  # noqa: T201
        print(f"segraft: {sentence}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    if code == INTERRUPTED:
        print("segraft: interrupted; a training (pretrain, adapt) goes on with --resume.", file=sys.stderr)  # noqa: T201
    _leave_others(code or 0)
    raise SystemExit(code)
