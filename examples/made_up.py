"""A made-up memory for a test: every page is computed when it is touched, however large the VM is, and pages can be lost at will.

The guest of the reference VMM fills its memory with words that a seed decides (docs/vm.md). So its snapshot need not be kept:
the first 2 MiB and the seed are enough, and the guest itself verifies what it gets.

    latepage vm run --memory 1GiB --fill 7 --save vm.state vm.mem
    head -c 2M vm.mem > system.mem && rm vm.mem
    python examples/made_up.py /run/vms.sock system.mem 1024 7
    latepage vm restore vm.state --pager /run/vms.sock --verify random --compare

What does your VMM do when a page cannot be had? Name such pages at the end, and see: `… 1024 7 300 301`.
"""

import signal
import struct
import sys
from pathlib import Path

from latepage import CallbackSource, Pager, Policy

PAGE, SYSTEM, MASK = 4096, 2 << 20, (1 << 64) - 1


def spread(seed: int) -> int:
    """The finalizer of splitmix64, made odd."""
    z = (seed + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return (z ^ z >> 31) | 1


def made_up(page: int, seed: int) -> bytearray:
    """What the guest wrote: eight words, at places and with values that follow from the page's number and the seed."""
    contents = bytearray(PAGE)
    value = (page + 1) * seed & MASK
    value = (value ^ value >> 32) * 0x2545F491 & MASK
    struct.pack_into("<Q", contents, 0, value)
    for band in range(6):
        value = value * 0x7FEB352D & MASK
        struct.pack_into("<Q", contents, 8 * (1 + 85 * band + (value >> 58)), value)
    struct.pack_into("<Q", contents, PAGE - 8, value * 0x7FEB352D & MASK)
    return contents


def main(socket: str, system_file: str, mebibytes: str, seed: str, *lost: str) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    system, factor, missing = Path(system_file).read_bytes(), spread(int(seed)), {int(page) for page in lost}

    def supply(offset: int, length: int) -> bytes:
        first, end = (offset - SYSTEM) // PAGE, (offset + length - SYSTEM) // PAGE
        if gone := sorted(missing & set(range(first, end))):
            raise LookupError(f"page {gone[0]} is lost")
        pages = (made_up(page, factor) for page in range(max(first, 0), end))
        return system[offset : offset + length] + b"".join(pages)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Pager(log=1) as pager:
        pager.listen(socket, CallbackSource(supply, size=int(mebibytes) << 20), Policy(on_missing="kill"))
        try:
            for _ in pager.events():
                pass  # they stand in the log
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
