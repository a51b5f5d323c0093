"""The real client of the Hub, pointed at the stand-in."""

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

standin = runpy.run_path(str(Path(__file__).with_name("hub_standin.py")))


@contextmanager
def pointed_at_standin(patch: pytest.MonkeyPatch, home: Path) -> Iterator[Any]:
    """The stand-in's server; the client's settings, which it reads when it is imported, name it."""
    with standin["Server"]() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", standin["WRITER"])
        patch.setattr("time.sleep", lambda _: None)  # between the client's attempts
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
