"""Memory from HTTP: VMs run from a snapshot on a web server or in an object store, and only what they touch is fetched.

python examples/http_ranges.py /run/vms.sock https://snapshots.example/base.mem
latepage vm restore base.state --pager /run/vms.sock
"""

import signal
import sys

import httpx

from latepage import CallbackSource, Pager, Policy


class Ranges:
    """A memory file on a server that answers range requests (RFC 9110, section 14)."""

    def __init__(self, url: str) -> None:
        # Compressed on its way, a range would have another length.
        self._client = httpx.Client(timeout=10, headers={"Accept-Encoding": "identity"})
        self._url = url
        head = self._client.head(url).raise_for_status()
        self.size = int(head.headers["Content-Length"])
        # A page of another upload would be wrong and look right: the server shall refuse (412) if it has another now.
        etag = head.headers.get("ETag", "W/")
        self._same = {} if etag.startswith("W/") else {"If-Match": etag}

    def __call__(self, offset: int, length: int) -> bytes:
        """These bytes of the file. Called on several threads at a time, which share the client's connections."""
        span = f"{offset}-{offset + length - 1}"
        with self._client.stream("GET", self._url, headers={"Range": f"bytes={span}", **self._same}) as answer:
            # A server that knows no ranges answers 200 and sends all there is: it is not listened to.
            came = answer.headers.get("Content-Range")
            if answer.status_code != 206 or came != f"bytes {span}/{self.size}":
                raise OSError(f"asked for bytes {span} of {self.size}, and the answer is {answer.status_code}, {came}")
            return answer.read()


def main(socket: str, url: str) -> None:
    """Serves until SIGTERM or Ctrl-C, then gives the VMs that live all that they lack."""
    memory = Ranges(url)
    source = CallbackSource(memory, size=memory.size, threads=8, time_limit=20, name=url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Pager(log=1) as pager:
        pager.listen(socket, source, Policy(populate="background"))
        try:
            for _ in pager.events():
                pass  # they stand in the log
        except KeyboardInterrupt:
            pager.drain()
            any(event.event == "drained" for event in pager.events(timeout=60))


if __name__ == "__main__":
    main(*sys.argv[1:])
