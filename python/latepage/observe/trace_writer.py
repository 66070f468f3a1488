"""Writes trace files: under a name of their own while they grow, and under their final name once they are whole."""

import json
import os
import re
import zlib
from contextlib import suppress
from io import FileIO
from pathlib import Path

from latepage.observe import trace_format as form

__all__ = ["MODE", "PARTIAL", "SUFFIX", "TraceWriter", "encode_end", "file_stem"]

SUFFIX = ".trace"
PARTIAL = ".part"
"""What follows the suffix as long as the end mark is missing."""
MODE = 0o600
"""Permissions of the files: what a guest touched is its owner's affair."""


def file_stem(vm: str) -> str:
    """A VM's name as the stem of a file's: it comes from a stranger, and must not choose the folder, or hide the file.

    >>> file_stem("vm-7"), file_stem("../../etc/passwd"), file_stem("vm-7#12"), file_stem("..")
    ('vm-7', 'etc_passwd', 'vm-7_12', 'vm')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", vm).lstrip("._-")[:100] or "vm"


def encode_end(fields: form.Fields, records: int, checksum: int) -> bytes:
    """The end mark that follows so many records, with the checksum of all that stands before it going on through it."""
    text = json.dumps(fields, allow_nan=False).encode()
    mark = form.RECORD.pack(len(text), form.END << 24, records) + text
    return mark + form.CHECKSUM.pack(zlib.crc32(mark, checksum))


class TraceWriter:
    """One file that grows. Every method may raise OSError; what was written until then stays readable.

    Attributes:
        path: the file as it is now: its final name once it is whole.
    """

    def __init__(self, folder: Path, vm: str, header: form.Fields) -> None:
        self._final, self._file = _create(folder, file_stem(vm))
        self.path = _partial(self._final)
        self._checksum = 0
        self._records = 0
        try:
            self._write(form.header(form.KIND_TRACE, header))
        except OSError:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise

    def write(self, records: bytes) -> None:
        """Adds records."""
        if records:
            self._write(records)
            self._records += len(records) // form.RECORD.size

    def lost(self, entries: int, seconds: float) -> None:
        """Marks the place where entries are missing."""
        entries = min(entries, (1 << 56) - 1)
        self.write(form.RECORD.pack(entries & 0xFFFFFFFF, form.LOST << 24 | entries >> 32, int(seconds * 1e9)))

    def finish(self, fields: form.Fields) -> None:
        """Writes the end mark, and gives the file its final name; if someone has taken that meanwhile, another one."""
        try:
            self._write(encode_end(fields, self._records, self._checksum))
        finally:
            self._file.close()
        self.path = _settle(self.path, self._final)

    def close(self) -> None:
        """Leaves the file as it is."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._checksum = zlib.crc32(data, self._checksum)


def _private(path: str, flags: int) -> int:
    """Opens a file that only its owner may read: it tells which pages a guest touched."""
    return os.open(path, flags | os.O_CLOEXEC, MODE)


def _partial(final: Path) -> Path:
    return final.with_name(final.name + PARTIAL)


def _numbered(folder: Path, stem: str, number: int) -> Path:
    return folder / (f"{stem}{SUFFIX}" if number == 1 else f"{stem}-{number}{SUFFIX}")


def _create(folder: Path, stem: str) -> tuple[Path, FileIO]:
    """The first name that is free, and its file, not whole yet. Whoever has the partial name owns the final one too."""
    number = 0
    while True:
        number += 1
        final = _numbered(folder, stem, number)
        with suppress(FileExistsError):
            # Unbuffered: what was taken from the ring is with the kernel at once, and survives this process.
            file = FileIO(_partial(final), "x", opener=_private)
            # Looked at only now: another pager that had the partial name has given it up by making the final one.
            if not os.path.lexists(final):
                return final, file
            file.close()
            _partial(final).unlink()


def _settle(partial: Path, final: Path) -> Path:
    """Renames, and never onto a file that is there."""
    number = 1
    stem = final.name.removesuffix(SUFFIX)
    while True:
        try:
            os.link(partial, final)
        except FileExistsError:
            number += 1
            final = _numbered(final.parent, stem, number)
        except OSError:
            # A file system without hard links: nothing better is to be had.
            partial.rename(final)
            return final
        else:
            partial.unlink()
            return final
