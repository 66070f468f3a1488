"""`latepage serve` as a process."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from actors.lines import LineProcess


class Serve(LineProcess):
    """A pager process; its log lines are its `lines`."""

    def __init__(self, socket: Path, source: Path, *flags: str, **options: Any) -> None:
        under: tuple[str, ...] = options.pop("under", ())
        command: list[str | Path] = [
            *under,
            sys.executable,
            "-m",
            "latepage",
            "serve",
            socket,
            source,
            "--json",
            *flags,
        ]
        self.stderr_path: Path = options.pop("stderr_path", socket.with_suffix(".stderr"))
        super().__init__(command, stderr_file=self.stderr_path.open("wb"), **options)
        self.socket = socket

    def said(self) -> str:
        return self.stderr_path.read_text()

    def descriptors(self) -> dict[str, str]:
        """What its descriptors are, by number."""
        folder = Path(f"/proc/{self.pid}/fd")
        found = {}
        for link in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found[link.name] = str(link.readlink())
        return found

    def threads(self) -> list[str]:
        """The names of its threads."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sorted((task / "comm").read_text().strip() for task in tasks)

    def mappings(self) -> list[str]:
        """Its mappings of memory files, a line each."""
        return [line for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines() if "memfd:" in line]

    def held(self) -> tuple[list[str], int, list[str]]:
        """What it holds for its VMs and for itself: descriptors, how many threads, mappings of memory files."""
        # A thread that was only just made may not have its name yet.
        return sorted(self.descriptors().values()), len(self.threads()), self.mappings()

    def resident(self) -> int:
        """Bytes of its anonymous resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))
