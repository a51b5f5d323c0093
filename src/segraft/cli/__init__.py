"""The command line. Commands only translate: options in, one call of `segraft.jobs`, tables or JSON out."""

import json
import sys

from segraft.cli.app import app
from segraft.cli.look import inspect, params
from segraft.cli.train import adapt, pretrain
from segraft.cli.use import demo, evaluate, predict
from segraft.errors import SegraftError

__all__ = ["app", "main"]

INTERRUPTED = 130  # what Typer turns Ctrl-C into

for _command in (pretrain, adapt, predict, evaluate, params, inspect, demo):
    app.command()(_command)


def main() -> None:
    """Run the command line; bad input is one sentence on standard error and exit code 2."""
    try:
        app()
    except SegraftError as error:
        sentence = " ".join(str(error).split())  # what a library said inside it may run over several lines
        if "--json" in sys.argv:
            print(json.dumps({"error": sentence}))  # noqa: T201
        print(f"segraft: {sentence}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("segraft: interrupted; a training (pretrain, adapt) goes on with --resume.", file=sys.stderr)  # noqa: T201
        raise
