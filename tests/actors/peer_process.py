"""The peer process: takes a line of JSON, does it, answers in a line. Standard library only: it starts at once."""

import array
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import threading

USERFAULTFD_IOC_NEW = 0xAA00
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFD_FEATURE_MINOR_SHMEM = 1 << 10
MISSING, MINOR = 1, 4
F_ADD_SEALS, F_SEAL_SEAL, F_SEAL_SHRINK = 1033, 1, 2
MAP_HUGETLB, MAP_NORESERVE = 0x40000, 0x4000


class Peer:
    """Its guest memory, its userfaultfd and its connection."""

    def __init__(self) -> None:
        self.descriptors: dict[str, int] = {"other": os.pipe()[0]}
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.memory: mmap.mmap
        self.sink = os.open(os.devnull, os.O_WRONLY)

    def map(self, size: int, backing: str) -> dict[str, object]:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        uffd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(device)
        features = UFFD_FEATURE_EVENT_REMOVE | (UFFD_FEATURE_MINOR_SHMEM if backing == "shared" else 0)
        fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("QQQ", 0xAA, features, 0)))
        self.page = 2 << 20 if backing == "hugetlb" else 4096
        self.shared = backing == "shared"
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if backing == "anonymous":
            self.memory = mmap.mmap(-1, size, private)
        elif backing == "hugetlb":
            # Nothing is reserved: where the pool is empty, there is no page to be had.
            self.memory = mmap.mmap(-1, size, private | MAP_HUGETLB | MAP_NORESERVE)
        else:
            file = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(file, size)
            if backing != "unsealed":
                fcntl.fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_SEAL)
            kind = mmap.MAP_PRIVATE if backing == "private" else mmap.MAP_SHARED
            self.memory = mmap.mmap(file, size, kind)
            self.descriptors["memory"] = file
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        mode = MISSING | (MINOR if backing == "shared" else 0)
        fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(struct.pack("QQQQ", hva, size, mode, 0)))
        self.descriptors["userfaultfd"] = uffd
        return {"hva": hva, "page_size": self.page}

    def connect(self, path: str) -> dict[str, object]:
        self.connection.connect(path)
        return {}

    def say(self, body: str, descriptors: list[str]) -> dict[str, object]:
        numbers = array.array("i", [self.descriptors[name] for name in descriptors])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if descriptors else []
        data = body.encode()
        sent = self.connection.sendmsg([data], ancillary)
        while sent < len(data):
            sent += self.connection.send(data[sent:])
        return {}

    def become(self, uid: int) -> dict[str, object]:
        os.setuid(uid)
        return {}

    def end_of_message(self) -> dict[str, object]:
        self.connection.shutdown(socket.SHUT_WR)
        return {}

    def hung_up(self) -> dict[str, object]:
        try:
            while self.connection.recv(4096):
                pass
        except ConnectionResetError:
            pass
        return {}

    def touch(self, page: int) -> dict[str, object]:
        threading.Thread(target=self._touch, args=(page,), daemon=True).start()
        return {"page": page}

    def _touch(self, page: int) -> None:
        # The kernel reads the page for the pipe: the fault is taken without the GIL, and a poisoned page is EFAULT.
        read, write = os.pipe()
        view = memoryview(self.memory)[page * self.page : page * self.page + 1]
        try:
            os.write(write, view)
            answer({"did": "touched", "page": page, "value": os.read(read, 1)[0]})
        except OSError as error:
            answer({"did": "touched", "page": page, "error": error.errno})
        finally:
            view.release()
            os.close(read)
            os.close(write)

    def discard(self, page: int, pages: int) -> dict[str, object]:
        advice = mmap.MADV_REMOVE if self.shared else mmap.MADV_DONTNEED
        self.memory.madvise(advice, page * self.page, pages * self.page)
        return {}


def answer(line: dict[str, object]) -> None:
    """One write, so that threads' lines never mix."""
    os.write(1, json.dumps(line).encode() + b"\n")


def main() -> None:
    peer = Peer()
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("do")
        try:
            answer({"did": what, **getattr(peer, what)(**order)})
        except OSError as error:
            answer({"did": what, "error": error.errno})


if __name__ == "__main__":
    main()
