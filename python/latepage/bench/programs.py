"""The minimal C programs of limit/, compiled when one is first asked for."""

import subprocess
from importlib.resources import as_file, files
from pathlib import Path

from latepage.bench.machine import LackingError, compiler

__all__ = ["Programs"]

FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-pthread")


class Programs:
    """Programs by name, in a folder that is somebody else's to remove."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        """Where a program lies.

        Raises:
            LackingError: it cannot be compiled here.
        """
        if name not in self._built:
            self._built[name] = self._compile(name)
        return self._built[name]

    def _compile(self, name: str) -> Path:
        output = self._folder / name
        with as_file(files("latepage.bench") / "limit") as sources:
            command = [compiler(), *FLAGS, "-o", str(output), str(sources / f"{name}.c")]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise LackingError(f"limit/{name}.c cannot be compiled: {done.stderr.strip().splitlines()[0]}")
        return output
