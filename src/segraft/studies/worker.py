"""One run in a process of its own: `python -m segraft.studies.worker FOLDER`."""

import sys
from pathlib import Path


def main() -> None:
    """Do the run whose folder is named; what goes wrong in it stands in the folder."""
    from segraft.allocation import keep_freed_memory
    from segraft.studies.executing import execute

    keep_freed_memory()
    execute(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
