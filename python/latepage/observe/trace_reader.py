"""Trace files, read one record at a time: a file is never trusted, and never held but for its records."""

import os
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from latepage.errors import TraceError
from latepage.memory import Region
from latepage.observe import trace_format as form

__all__ = ["Contents", "read_contents"]

CHUNK = 4096 * form.RECORD.size


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds, checked.

    Attributes:
        kind: `KIND_TRACE` or `KIND_MERGED`.
        header: the fields of its header.
        regions: the regions among them.
        records: its records, each of 16 bytes, without the end mark.
        end: the fields of the end mark; None where the file was cut off before it.
        readable: bytes from its start up to the end of what could be read.
        size: bytes of the file.
    """

    kind: int
    header: dict[str, Any]
    regions: tuple[Region, ...]
    records: bytes
    end: dict[str, Any] | None
    readable: int
    size: int


def read_contents(path: Path) -> Contents:
    """Reads a trace file of either kind.

    Raises:
        TraceError: it is no trace, of another version, or damaged; or it cannot be opened. The message names the byte.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for whoever writes to it.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG((status := os.fstat(file.fileno())).st_mode):
                raise TraceError(f"{path}: not a file; name one that `serve --record` wrote")
            return _Reader(path, file, status.st_size).read()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}", call="open", errno=error.errno) from None


class _Reader:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._size = size
        self._at = 0
        self._checksum = 0

    def read(self) -> Contents:
        kind, header = self._header()
        try:
            regions = form.parse_regions(header)
        except ValueError as error:
            raise self._trouble(form.FRONT.size, f"its header makes no sense: {error}") from None
        parts = []
        end = None
        check = _checker(kind, sum(region.pages for region in regions))
        while chunk := self._file.read(CHUNK):
            whole, stop = self._records(chunk, check)
            parts.append(chunk[:whole])
            self._checksum = zlib.crc32(parts[-1], self._checksum)
            self._at += whole
            if stop:
                end = self._end(chunk[whole:], sum(map(len, parts)) // form.RECORD.size)
            if whole < len(chunk):
                break
        return Contents(kind, header, regions, b"".join(parts), end, self._at, self._size)

    def _header(self) -> tuple[int, dict[str, Any]]:
        front = self._file.read(form.FRONT.size)
        if not front:
            raise self._trouble(0, "the file is empty; the pager had not written anything yet, or it is no trace")
        if front[: len(form.MAGIC)] != form.MAGIC[: len(front)]:
            raise self._trouble(0, "not a trace file; name one that `serve --record` or `trace merge` wrote")
        if len(front) < form.FRONT.size:
            raise self._trouble(len(front), "the file ends inside its header: nothing of the trace is there")
        _, version, kind, length = form.FRONT.unpack(front)
        if version != form.VERSION:
            raise self._trouble(8, f"its format has version {version}; this latepage reads version {form.VERSION}")
        if kind not in (form.KIND_TRACE, form.KIND_MERGED):
            raise self._trouble(10, f"it is of kind {kind}, which is none that there is")
        if length > form.MOST_TEXT:
            raise self._trouble(12, f"damaged: a header of {length:,} bytes")
        rest = self._file.read(length + form.CHECKSUM.size)
        if len(rest) < length + form.CHECKSUM.size:
            raise self._trouble(len(front) + len(rest), "the file ends inside its header: nothing of the trace is there")
        text, checksum = rest[:length], rest[length:]
        if form.CHECKSUM.unpack(checksum)[0] != zlib.crc32(front + text):
            raise self._trouble(form.FRONT.size, "damaged: the header is not the one that was written (its checksum differs)")
        self._checksum = zlib.crc32(front + rest)
        self._at = len(front) + len(rest)
        return kind, self._object(text, form.FRONT.size)

    def _records(self, chunk: bytes, check: Callable[[int, int, int], str | None]) -> tuple[int, bool]:
        """How many bytes of the chunk are whole records, and whether the end mark follows."""
        at = 0
        for page, what, _ in form.RECORD.iter_unpack(chunk[: len(chunk) // form.RECORD.size * form.RECORD.size]):
            if what >> 24 == form.END:
                return at, True
            if not what and chunk.startswith(bytes(form.RECORD.size), at):
                # Space that the file system had set aside, and that nothing was written to before the machine stopped.
                return at, False
            if wrong := check(page, what >> 24, what & 0xFFFFFF):
                raise self._trouble(self._at + at, f"damaged: {wrong}")
            at += form.RECORD.size
        return at, False

    def _end(self, begun: bytes, records: int) -> dict[str, Any] | None:
        length, what, said = form.RECORD.unpack_from(begun)
        if what != form.END << 24 or said != records or length > form.MOST_TEXT:
            raise self._trouble(self._at, f"damaged: an end mark for {said:,} records after {records:,}")
        whole = form.RECORD.size + length + form.CHECKSUM.size
        # One byte more, if there is one, must not be there.
        mark = begun + self._file.read(max(0, whole + 1 - len(begun)))
        if len(mark) < whole:
            return None
        text = mark[form.RECORD.size : whole - form.CHECKSUM.size]
        checksum = zlib.crc32(mark[: whole - form.CHECKSUM.size], self._checksum)
        if form.CHECKSUM.unpack_from(mark, whole - form.CHECKSUM.size)[0] != checksum:
            raise self._trouble(self._at + whole - form.CHECKSUM.size, "damaged: the checksum of the whole file differs")
        if len(mark) > whole:
            raise self._trouble(self._at + whole, "damaged: it goes on after its end mark")
        fields = self._object(text, self._at + form.RECORD.size)
        self._at += whole
        return fields

    def _object(self, text: bytes, offset: int) -> dict[str, Any]:
        try:
            return form.parse_object(text)
        except ValueError as error:
            raise self._trouble(offset, f"damaged: {str(error)[:200]}") from None

    def _trouble(self, offset: int, what: str) -> TraceError:
        return form.trouble(self._path, offset, what)


def _checker(kind: int, pages: int) -> Callable[[int, int, int], str | None]:
    """Says what is wrong with a record, of a file of that kind about a VM with so many pages."""

    def trace(page: int, what: int, more: int) -> str | None:
        if what == form.LOST:
            return None
        if what not in form.REASONS:
            return f"a record of a kind ({what}) that there is not"
        if page + more >= pages:
            return f"page {page + more:,} of a VM that has {pages:,}"
        return "a touch of several pages" if more and what in form.TOUCHES else None

    def merged(page: int, what: int, _more: int) -> str | None:
        if what != form.MERGED:
            return f"a record of a kind ({what}) that there is not"
        return f"page {page:,} of a VM that has {pages:,}" if page >= pages else None

    return trace if kind == form.KIND_TRACE else merged
