"""`latepage restore` as a process."""

import sys
from pathlib import Path
from typing import Any

from actors.lines import LineProcess


class Restore(LineProcess):
    """The command, with `--json`; its lines are its `lines`."""

    def __init__(self, folder: Path, *flags: str | Path, **options: Any) -> None:
        self.stderr_path = folder / "restore.stderr"
        command = [sys.executable, "-m", "latepage", "restore", *flags, "--json"]
        super().__init__(command, stderr_file=self.stderr_path.open("wb"), **options)

    def said(self) -> str:
        return self.stderr_path.read_text()
