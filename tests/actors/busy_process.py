"""A pager in a Python process that keeps the GIL: nothing of Python runs there from `busy` until a byte comes."""

import ctypes
import os
import sys

from latepage import Pager, Policy, open_source


def main(socket: str, source: str) -> None:
    libc = ctypes.PyDLL(None)  # unlike CDLL it keeps the GIL
    with Pager(log=1) as pager:
        pager.listen(socket, open_source(source), Policy(stall_warning=0.1, fault_around=4096, mode=0o666))
        # One write each: the engine writes its lines to the same pipe.
        os.write(1, b'{"event": "busy"}\n')
        # A call that keeps the GIL for exactly as long as the test needs.
        libc.read(0, ctypes.create_string_buffer(1), 1)
        os.write(1, b'{"event": "free"}\n')
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
