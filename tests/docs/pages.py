"""The commands of a page of the documentation."""

import re
from pathlib import Path


def commands(page: Path) -> list[str]:
    """Each command in a page's ```bash blocks, in order; lines that end in a backslash go on in the next."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
