"""Who else holds a VM's userfaultfds: whoever does may be serving it."""

import errno
from collections.abc import Iterable
from dataclasses import dataclass

from latepage import _core
from latepage.check import proc

__all__ = ["Holder", "Search", "search"]


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds one.

    Attributes:
        process: who.
        number: the descriptor's number there.
        of: its number in the VM's process.
        has_regions: whether memory of its own is registered, so that it is a VMM; None where that was not looked at.
    """

    process: proc.Status
    number: int
    of: int
    has_regions: bool | None


@dataclass(frozen=True, slots=True)
class Search:
    """What a look at all processes gave.

    Attributes:
        holders: those found.
        unseen: processes that could not be looked into.
        compared_by: `kcmp`, or `inode` where kcmp(2) is not to be had.
    """

    holders: tuple[Holder, ...]
    unseen: tuple[proc.Status, ...]
    compared_by: str


def search(pid: int, own: Iterable[proc.Descriptor], *, with_regions: bool) -> Search:
    """Looks into every process that may be looked into, for the userfaultfds `own` of process `pid`.

    Args:
        pid: the process that is not looked into.
        own: its userfaultfds.
        with_regions: look too whether those found have registered memory. This takes long where they map much.
    """
    own = tuple(own)
    holders: list[Holder] = []
    unseen: list[proc.Status] = []
    by_inode = False
    for other in proc.processes() if own else []:
        if other == pid:
            continue
        try:
            theirs = proc.descriptors(other)
        except PermissionError:
            unseen += _user_process(other)
            continue
        except OSError:
            continue
        for their in theirs:
            for our in own:
                same = _same((pid, our), (other, their))
                by_inode |= same is None
                if our.inode == their.inode if same is None else same:
                    holders += _holder(other, their.number, our.number, with_regions)
    return Search(tuple(holders), tuple(unseen), "inode" if by_inode else "kcmp")


def _same(one: tuple[int, proc.Descriptor], other: tuple[int, proc.Descriptor]) -> bool | None:
    """Whether they are one open file; None where the kernel does not say."""
    try:
        return _core.same_open_file((one[0], one[1].number), (other[0], other[1].number))
    except OSError as error:
        # Closed or ended meanwhile: then they are not.
        return None if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES) else False


def _holder(pid: int, number: int, of: int, with_regions: bool) -> list[Holder]:
    try:
        return [Holder(proc.status(pid), number, of, bool(proc.regions(pid)) if with_regions else None)]
    except OSError:
        return []


def _user_process(pid: int) -> list[proc.Status]:
    try:
        process = proc.status(pid)
    except OSError:
        return []
    return [] if process.is_kernel else [process]
