"""Encrypted memory: a snapshot lies encrypted on the disk, and each page is decrypted as it arrives, in memory only.

    python examples/encrypted.py encrypt key.bin base.mem base.enc
    python examples/encrypted.py serve key.bin base.enc /run/vms.sock
    latepage vm restore base.state --pager /run/vms.sock

AES-GCM, page by page: a page that was changed, cut off, or put in another one's place is no page, and fails closed.
"""

import os
import signal
import sys
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from latepage import CallbackSource, Pager, Policy

PAGE, TAG = 4096, 16


def nonce(page: int) -> bytes:
    """Each page has its own under the key, which is used for one file and never again."""
    return page.to_bytes(12, "little")


def encrypt(key_file: str, plain: str, encrypted: str) -> None:
    """Writes the encrypted file: every page with its tag behind it; and a new key, which nobody else may read."""
    key = AESGCM.generate_key(256)
    with open(key_file, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(key)
    cipher = AESGCM(key)
    with Path(plain).open("rb") as pages, Path(encrypted).open("xb") as out:
        numbered = enumerate(iter(lambda: pages.read(PAGE), b""))
        out.writelines(cipher.encrypt(nonce(page), contents, None) for page, contents in numbered)


class Encrypted:
    """An encrypted memory file."""

    def __init__(self, key_file: str, encrypted: str) -> None:
        self._cipher = AESGCM(Path(key_file).read_bytes())
        self._file = os.open(encrypted, os.O_RDONLY)
        self.size = os.fstat(self._file).st_size // (PAGE + TAG) * PAGE

    def __call__(self, offset: int, length: int) -> bytes:
        """These pages, or InvalidTag if one of them is not what was encrypted there."""
        first, count = offset // PAGE, length // PAGE
        sealed = os.pread(self._file, count * (PAGE + TAG), first * (PAGE + TAG))
        parts = (sealed[at * (PAGE + TAG) :][: PAGE + TAG] for at in range(count))
        return b"".join(self._cipher.decrypt(nonce(first + at), part, None) for at, part in enumerate(parts))


def serve(key_file: str, encrypted: str, socket: str) -> None:
    """Serves until SIGTERM or Ctrl-C, then gives the VMs that live all that they lack."""
    memory = Encrypted(key_file, encrypted)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Pager(log=1) as pager:
        pager.listen(socket, CallbackSource(memory, size=memory.size, name=encrypted), Policy(populate="background"))
        try:
            for _ in pager.events():
                pass  # they stand in the log
        except KeyboardInterrupt:
            pager.drain()
            any(event.event == "drained" for event in pager.events(timeout=60))


if __name__ == "__main__":
    {"encrypt": encrypt, "serve": serve}[sys.argv[1]](*sys.argv[2:])
