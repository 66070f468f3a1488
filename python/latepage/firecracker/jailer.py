"""Firecracker's jailer: what it is told, and what its jail looks like from outside and from inside."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from latepage.errors import FirecrackerError, PolicyError
from latepage.firecracker.place import LONGEST, Folder, Place
from latepage.firecracker.state_file import LARGEST, StateFile
from latepage.memory import format_size
from latepage.reach import Owner

__all__ = ["Jail", "Jailer"]

_NOT_TAKEN = {
    "--daemonize": "latepage watches the VMM as its child and reads what it says",
    "--id": "use Jailer.id (--jail-id)",
    "--uid": "use Jailer.owner (--owner)",
    "--gid": "use Jailer.owner (--owner)",
    "--exec-file": "it is the Firecracker that is named",
    "--chroot-base-dir": "use Jailer.chroot_base (--chroot-base-dir)",
}
_BY_JAILER = ("dev/kvm", "dev/net/tun", "dev/urandom", "dev/userfaultfd", "run/firecracker.socket")
_FOLDERS_BY_JAILER = ("dev/net", "dev", "run")
_API_SOCK = "/run/firecracker.socket"
_PAGER_SOCK = "/pager.sock"
_STATE = "/latepage.state"
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True)
class Jailer:
    """How VMs are jailed. It takes root, as the jailer does.

    Attributes:
        program: the jailer, on PATH or with its path.
        owner: the user and group as whom Firecracker runs in the jail.
        chroot_base: the folder of the jails.
        id: the jail's name, letters, digits and hyphens; clones get a number after it. One is made up where it is empty.
        arguments: more for the jailer, as it takes them: `--cgroup`, `--netns`, `--resource-limit`, `--new-pid-ns`, …
    """

    program: str | os.PathLike[str] = "jailer"
    owner: Owner
    chroot_base: str | os.PathLike[str] = "/srv/jailer"
    id: str = ""
    arguments: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.id and not re.fullmatch(r"[A-Za-z0-9-]{1,60}", self.id):
            raise PolicyError(f"jail id {self.id!r}: it may have 1 to 60 letters, digits and hyphens")
        for argument in self.arguments:
            why = _NOT_TAKEN.get(argument.partition("=")[0])
            if why is not None:
                raise PolicyError(f"the jailer's {argument} cannot be passed on: {why}")

    @property
    def new_pid_namespace(self) -> bool:
        """Whether Firecracker gets a pid namespace of its own, and so is not our child."""
        return "--new-pid-ns" in self.arguments


class Jail:
    """One VM's jail: made before the jailer starts, so that the pager listens in it by then.

    Attributes:
        root: what Firecracker sees as `/`.
        place: where the VM's files are.
    """

    def __init__(self, jailer: Jailer, program: Path, state: StateFile, folder: Folder, clone: int, clones: int) -> None:
        """Makes it, with a copy of the state file, which is small.

        Raises:
            FirecrackerError: it is in use, or cannot be made.
        """
        self._jailer = jailer
        name = jailer.id or f"latepage-{os.getpid()}"
        self.id = name if clones == 1 and jailer.id else f"{name}-{clone}"
        # The jailer follows links to the program before it names the jail after it.
        self._program = program = program.resolve()
        if state.size > LARGEST:
            raise FirecrackerError(f"state file {state.path}: it has {format_size(state.size)}; is it the memory file?")
        base = Path(jailer.chroot_base)
        if not base.is_dir():
            raise FirecrackerError(f"the folder of the jails {base} is not there; make it first (--chroot-base-dir)")
        # As the jailer does: <base>/<name of the program>/<id>/root.
        self._whole = base.resolve() / program.name / self.id
        self.root = self._whole / "root"
        self._made_whole = not self._whole.exists()
        for link in (self.root / name for name in _FOLDERS_BY_JAILER if (self.root / name).is_symlink()):
            raise FirecrackerError(f"jail {self._whole}: {link} is a link, no folder; remove it, or choose another --jail-id")
        if any(os.path.lexists(self.root / name) for name in (program.name, f"{program.name}.pid", _API_SOCK[1:])):
            raise FirecrackerError(
                f"jail {self._whole}: a VM has been in it, and may still be; "
                "end it and remove the jail, or choose another --jail-id"
            )
        # With a long base, sockets are reached through a link with a short path.
        seen = self.root
        if len(os.fsencode(self.root)) + len(_API_SOCK) > LONGEST:
            seen = folder.path / f"jail-{clone}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if seen is not self.root:
                seen.symlink_to(self.root)
            copy = self.root / _STATE[1:]
            copy.unlink(missing_ok=True)
            # A jail that was made ready may be its owner's already: nothing that he put there is written through.
            with state.path.open("rb") as source, os.fdopen(os.open(copy, _NEW, 0o400), "wb") as file:
                shutil.copyfileobj(source, file)
                os.fchown(file.fileno(), jailer.owner.uid, jailer.owner.gid)
            os.chown(self.root, jailer.owner.uid, jailer.owner.gid)
            self.root.chmod(0o700)
        except OSError as error:
            self.remove()
            raise FirecrackerError(
                f"jail {self.root}: {error.strerror}; jails take root, as the jailer does", call="mkdir", errno=error.errno
            ) from None
        self.place = Place(
            api_sock=seen / _API_SOCK[1:],
            pager_sock=seen / _PAGER_SOCK[1:],
            api_sock_inside=_API_SOCK,
            pager_sock_inside=_PAGER_SOCK,
            state_inside=_STATE,
            made=(copy,),
        )

    @property
    def will_hand_over(self) -> bool:
        """Whether Firecracker will be another process than the jailer, and no child of ours."""
        return self._jailer.new_pid_namespace

    def command(self, jailer: Path) -> list[str]:
        """What starts the VMM."""
        owner = self._jailer.owner
        return [
            str(jailer),
            *("--id", self.id),
            *("--exec-file", str(self._program)),
            *("--uid", str(owner.uid)),
            *("--gid", str(owner.gid)),
            *("--chroot-base-dir", str(self._jailer.chroot_base)),
            *self._jailer.arguments,
            "--",
            *("--api-sock", _API_SOCK),
        ]

    def pid(self) -> int | None:
        """The process that the jailer wrote down, if it has."""
        try:
            return int((self.root / f"{self._program.name}.pid").read_text())
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        """Removes the jail, once its VM has ended; of one that was there before, only what we and the jailer put into it."""
        if self._made_whole:
            shutil.rmtree(self._whole, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._whole.parent.rmdir()
            return
        for name in (self._program.name, f"{self._program.name}.pid", _STATE[1:], _PAGER_SOCK[1:], *_BY_JAILER):
            _remove_inside(self.root, name, os.unlink)
        for name in _FOLDERS_BY_JAILER:
            _remove_inside(self.root, name, os.rmdir)


def _remove_inside(root: Path, name: str, remove: Callable[..., None]) -> None:
    """Removes a file or an empty folder of a jail, if it is there.

    No link is followed: the jail is its owner's, who may have put one there that leads to a folder of the host.
    """
    *folders, last = name.split("/")
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        inside: int | None = None
        for folder in (str(root), *folders):
            inside = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=inside)
            stack.callback(os.close, inside)
        remove(last, dir_fd=inside)
