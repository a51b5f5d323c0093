"""Runs in a process of their own: `python -m segraft.studies.worker`.

The process is given folders of runs on standard input, each as a line of JSON, and says on standard output how each
went. Without a parent there is no more input, so it ends after the run that it is at.
"""

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from segraft.errors import SegraftError
from segraft.studies.run import Outcome, Run


def do(folder: str) -> Outcome:
    """Do the run of a folder in this process, which is one's own; what goes wrong in it stands in the folder.

    Raises:
        SegraftError: the folder is of no run, or not there.
    """
    from segraft.allocation import keep_freed_memory
    from segraft.studies.executing import execute

    if not Path(folder).is_dir():
        raise SegraftError(
            f"{folder} is not there on the machine {platform.node()}: all machines must see the study's folder and the "
            "scans under the same paths."
        )
    if not Run.read(Path(folder)).recomputes:  # else memory is short
        keep_freed_memory()
    return execute(Path(folder))


def main() -> None:
    """Until there is no more input."""
    # What a library prints must not be taken for an answer.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            print(json.dumps(asdict(do(json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
