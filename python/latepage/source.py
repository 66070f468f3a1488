"""Where the contents of guest memory come from."""

import os

from latepage import _core
from latepage.errors import SourceError

__all__ = ["Source", "open_source"]


class Source:
    """A memory file that was opened for serving. `open_source` makes one.

    A source may serve any number of VMs through any number of sockets; its holes and its zero pages become zero pages
    in the guest, never copies. While it is served, nobody should write to it: replace a snapshot by renaming a new file
    over the old one.
    """

    def __init__(self, native: _core.FileSource) -> None:
        self._native = native

    @property
    def size(self) -> int:
        """Bytes of guest memory that it holds."""
        return self._native.size

    def __str__(self) -> str:
        """What it is, as log lines name it."""
        return self._native.describe()

    def __repr__(self) -> str:
        return f"<latepage.Source {self}, {self.size} bytes>"


def open_source(reference: str | os.PathLike[str]) -> Source:
    """Opens what a VM's memory shall come from: the path of a memory file.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "guest.mem")
    >>> _ = path.write_bytes(bytes(1 << 20))
    >>> open_source(path).size
    1048576
    >>> open_source("/nowhere/guest.mem")
    Traceback (most recent call last):
    ...
    latepage.errors.SourceError: memory file /nowhere/guest.mem: ...

    Raises:
        SourceError: it is missing, unreadable, empty, or no regular file.
    """
    path = os.fspath(reference)
    if not path:
        raise SourceError("a source is the path of a memory file, and this one is empty; name the file")
    kind, colon, _ = path.partition(":")
    if colon and kind in ("image", "peer"):
        raise SourceError(f"{path}: a source is the path of a memory file; {kind}: is not known to this version")
    return Source(_core.open_file(path))
