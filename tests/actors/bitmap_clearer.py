"""Another process than the VM's: for each page named on a line it writes the contents and clears the bit, and says so."""

import mmap
import struct
import sys

PAGE = 4096


def main(memory_fd: int, bitmap_fd: int, base: int, seed: int) -> None:
    memory, bitmap = mmap.mmap(memory_fd, 0), mmap.mmap(bitmap_fd, 0)
    for line in sys.stdin:
        page = int(line)
        memory[page * PAGE : (page + 1) * PAGE] = struct.pack("<I", (base + page * PAGE) ^ seed) * (PAGE // 4)
        bitmap[page // 8] &= ~(1 << page % 8)
        print(page, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
