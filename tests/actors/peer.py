"""A peer that says to a pager what it is told: a process with guest memory of its own, led by a test line by line."""

import json
import sys
from pathlib import Path
from typing import Any

from actors import peer_process
from actors.lines import Line, LineProcess

PAGE = 4096


class Peer(LineProcess):
    """The test's side of the peer process."""

    def __init__(self, **options: Any) -> None:
        under: tuple[str, ...] = options.pop("under", ())
        super().__init__([*under, sys.executable, "-S", peer_process.__file__], **options)
        self.hva = 0
        self.size = 0
        self.page_size = PAGE
        self.backing = ""

    def ask(self, what: str, **arguments: Any) -> Line:
        """Has it do something, and waits for its answer."""
        self.send(do=what, **arguments)
        return self.wait_for(lambda line: line["did"] == what, what)

    def map(self, size: int, backing: str = "anonymous") -> None:
        """Makes guest memory, registered with a userfaultfd."""
        answer = self.ask("map", size=size, backing=backing)
        self.hva, self.page_size = answer["hva"], answer["page_size"]
        self.size, self.backing = size, backing

    def connect(self, socket: Path) -> None:
        self.ask("connect", path=str(socket))

    def say(self, body: str, *descriptors: str) -> None:
        """Sends text and descriptors: `userfaultfd`, `memory`, or `other` (a pipe).

        Nobody waits for it: what it says may be the death of the peer.
        """
        self.send(do="say", body=body, descriptors=descriptors)

    def firecracker(self) -> list[dict[str, int]]:
        """The regions as Firecracker's handshake has them."""
        return [{"base_host_virt_addr": self.hva, "size": self.size, "offset": 0, "page_size": self.page_size}]

    def introduce(self, socket: Path, *, form: str = "firecracker", name: str | None = None) -> str:
        """Shakes hands in one of the two forms, with the memory that `map` made; the name that it goes by."""
        self.connect(socket)
        if form == "firecracker":
            self.say(json.dumps(self.firecracker()), "userfaultfd")
            return f"vm-{self.pid}"
        name = name or f"peer-{self.pid}"
        descriptors = ["userfaultfd", "memory"] if self.backing == "shared" else ["userfaultfd"]
        regions = [{"hva": self.hva, "size": self.size, "offset": 0, "page_size": self.page_size}]
        hello = {"version": 1, "delivery": "uffd", "vcpus": 1, "name": name, "backing": self.backing}
        self.say(json.dumps({**hello, "descriptors": descriptors, "regions": regions}), *descriptors)
        return name

    def touch(self, page: int) -> None:
        """Has a thread of it read a byte of that page; `touched` waits for it. This may be its death."""
        self.send(do="touch", page=page)

    def touched(self, page: int) -> Line:
        """What the touch of that page gave: `value` or `error`."""
        return self.wait_for(lambda line: line["did"] == "touched" and line["page"] == page, f"touch of {page}")

    def read(self, page: int) -> int:
        """The first byte of that page."""
        self.touch(page)
        line = self.touched(page)
        assert "value" in line, line
        return int(line["value"])

    def read_all(self) -> list[int]:
        """The first byte of every page."""
        count = self.size // self.page_size
        return [self.read(page) for page in range(count)]

    def discard(self, page: int, pages: int = 1) -> None:
        """Gives pages back, as a balloon does."""
        self.ask("discard", page=page, pages=pages)

    def hung_up(self) -> None:
        """Waits until the pager has closed the connection."""
        self.ask("hung_up")
