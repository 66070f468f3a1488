"""Where the sockets of a restore are: in a private folder with a short path, unless the user says otherwise."""

import contextlib
import os
import shutil
import socket
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from latepage.errors import FirecrackerError
from latepage.reach import READ, SEARCH, WRITE, Owner, obstacle

__all__ = ["Folder", "Place", "check_socket_path", "numbered"]

LONGEST = 107
"""Bytes that a Unix socket's path may have: `sun_path` has 108, with its closing zero."""


@dataclass(frozen=True)
class Place:
    """Where one VM's files are, for us and for its Firecracker, whose root folder may be another.

    Attributes:
        api_sock: the API socket, as we see it.
        pager_sock: the pager's socket, as we see it.
        api_sock_inside: the API socket, as Firecracker sees it.
        pager_sock_inside: the pager's socket, as Firecracker sees it.
        state_inside: the state file, as Firecracker sees it.
        made: files that were made for the load only.
    """

    api_sock: Path
    pager_sock: Path
    api_sock_inside: str
    pager_sock_inside: str
    state_inside: str
    made: tuple[Path, ...] = field(default=())


class Folder:
    """A private folder for sockets, reachable for the user as whom Firecracker runs, and for nobody else."""

    def __init__(self, owner: Owner | None) -> None:
        """Makes it.

        Raises:
            FirecrackerError: there is no folder that both can reach.
        """
        told: list[str] = []
        for base in _bases(owner):
            if owner is not None:
                blocked = obstacle(base, owner, SEARCH, more_groups=())
                if blocked is not None:
                    told.append(f"user {owner.uid} {blocked}")
                    continue
            try:
                self.path = Path(tempfile.mkdtemp(prefix="latepage-", dir=base))
            except OSError as error:
                told.append(f"{base}: {error.strerror}")
                continue
            if owner is not None and owner.uid != os.geteuid():
                try:
                    os.chown(self.path, owner.uid, owner.gid)
                except OSError as error:
                    self.path.rmdir()
                    raise FirecrackerError(
                        f"a folder cannot be given to {owner}: {error.strerror}; that takes root, or leave --owner out",
                        call="chown",
                        errno=error.errno,
                    ) from None
            return
        raise FirecrackerError("there is no folder for the sockets: " + "; ".join(told))

    def remove(self) -> None:
        """Removes it and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """Removes it unless something is in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def numbered(path: Path, clone: int, clones: int) -> Path:
    """The path for one of many clones.

    >>> numbered(Path("/run/vm.sock"), 2, 8), numbered(Path("/run/vm.sock"), 1, 1)
    (PosixPath('/run/vm-2.sock'), PosixPath('/run/vm.sock'))
    """
    return path if clones == 1 else path.with_name(f"{path.stem}-{clone}{path.suffix}")


def check_socket_path(path: Path, what: str, owner: Owner | None = None, wanted: int = WRITE | SEARCH) -> None:
    """Refuses a path at which no socket can be made, or that `owner` cannot reach.

    A socket at which nobody listens any more is removed.

    Args:
        path: where a socket is to be made.
        what: what it is, for messages.
        owner: as whom Firecracker runs; None for ourselves.
        wanted: the rights that it needs to the folder: to make a socket there, or SEARCH to connect to it.

    Raises:
        FirecrackerError: it says which folder is missing, which right, or what is in the way.
    """
    check_text(path, what)
    length = len(os.fsencode(path))
    if length > LONGEST:
        raise FirecrackerError(
            f"{what} {path}: the path has {length} bytes and a socket's can have {LONGEST}; "
            "choose a shorter one, or a relative one"
        )
    try:
        if not path.parent.is_dir():
            raise FirecrackerError(f"{what} {path}: there is no folder {path.parent}; make it first")
        if owner is not None:
            blocked = obstacle(path.parent, owner, wanted, more_groups=())
            if blocked is not None:
                raise FirecrackerError(f"{what} {path}: Firecracker runs as user {owner.uid}, which {blocked}")
        elif not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
            raise FirecrackerError(f"{what} {path}: no right to make a file in {path.parent}; choose another folder")
        _clear(path, what)
    except OSError as error:
        raise FirecrackerError(f"{what} {path}: {error.strerror}; choose another path", errno=error.errno) from None


def _clear(path: Path, what: str) -> None:
    """Removes a socket at which nobody listens."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(there.st_mode):
        raise FirecrackerError(f"{what} {path}: there is a file of that name, which is not replaced; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except PermissionError:
            raise FirecrackerError(
                f"{what} {path}: there is a socket of another user, who may listen there; choose another path"
            ) from None
        except OSError:
            # One of another kind, or one whose queue is full.
            pass
    raise FirecrackerError(f"{what} {path}: another process listens there; stop it, or choose another path")


def check_text(path: Path, what: str) -> None:
    """Refuses a path that JSON cannot have.

    Raises:
        FirecrackerError: its bytes are no UTF-8.
    """
    if not _is_text(path):
        raise FirecrackerError(f"{what} {os.fsencode(path)!r}: its bytes are no UTF-8, and Firecracker takes no other paths")


def _is_text(path: Path) -> bool:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def check_readable(path: Path, what: str, owner: Owner | None) -> None:
    """Refuses a file that Firecracker's user cannot read.

    Raises:
        FirecrackerError: it says which folder or right is in the way.
    """
    if owner is None:
        return
    blocked = obstacle(path, owner, READ, more_groups=())
    if blocked is not None:
        raise FirecrackerError(f"{what} {path}: Firecracker runs as user {owner.uid}, which {blocked}")


def _bases(owner: Owner | None) -> list[str]:
    """Folders to try. That of the login session is shortest and private, but nobody else's."""
    named = ("XDG_RUNTIME_DIR", "TMPDIR") if owner is None else ("TMPDIR",)
    told = filter(_is_text, (Path(os.environ.get(name, "")) for name in named))
    # A folder's name adds 18 bytes, and a socket's in it 16 at most.
    fit = [str(base) for base in told if base.is_absolute() and len(os.fsencode(base)) <= LONGEST - 40]
    return list(dict.fromkeys([*fit, "/tmp"]))  # noqa: S108 (mkdtemp makes a private folder in it)
