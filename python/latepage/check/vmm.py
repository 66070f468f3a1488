"""What the VMM's user may do: it is the VMM that makes the userfaultfd and opens /dev/kvm, not the pager."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from latepage import _core
from latepage.check import kvm, userfaultfd
from latepage.check.access import Account, Node
from latepage.check.capabilities import read_setting
from latepage.check.items import Item, known

__all__ = ["vmm_items"]


@dataclass(frozen=True)
class _Rights:
    """How it was found out, and why each is not possible (None where it is)."""

    tried: bool
    userfaultfd: str | None
    kvm: str | None


def vmm_items(account: Account) -> Iterator[Item]:
    """The subject `vmm`, for that user."""
    rights = _try(account) or _read(account)
    how = "tried" if rights.tried else "read off its permissions; root could try it"
    name = account.name.partition(":")[0]
    yield Item(
        key="vmm.userfaultfd",
        name="the right to userfaultfd",
        state=known(rights.userfaultfd is None),
        found=f"may make one ({how})" if rights.userfaultfd is None else f"{rights.userfaultfd} ({how})",
        need="serve",
        value={"uid": account.uid, "tried": rights.tried, "allowed": rights.userfaultfd is None},
        todo=None if rights.userfaultfd is None else _give(userfaultfd.DEVICE, userfaultfd.grant(name)),
    )
    yield Item(
        key="vmm.kvm",
        name="the right to KVM",
        state=known(rights.kvm is None),
        found=f"may make VMs ({how})" if rights.kvm is None else f"{rights.kvm} ({how})",
        need="serve",
        value={"uid": account.uid, "tried": rights.tried, "allowed": rights.kvm is None},
        todo=None if rights.kvm is None else _give(kvm.DEVICE, f"setfacl -m u:{name}:rw {kvm.DEVICE}"),
    )


def _give(device: str, grant: str) -> str:
    if Node.look(device) is None:
        return f"there is no {device} here"
    return grant


def _try(account: Account) -> _Rights | None:
    """By becoming that user, where this process may."""
    if account.uid == os.geteuid():
        device, syscall = userfaultfd.ways()
        return _Rights(True, _why(device, syscall), _plain(_core.kvm_trial("vm")))
    try:
        device, syscall, vm = _core.rights_of_user(account.uid, account.gid, sorted(account.groups))
    except OSError:
        return None
    return _Rights(True, _why(device, syscall), _plain(vm))


def _why(device: int | None, syscall: int | None) -> str | None:
    if device is None or syscall is None:
        return None
    return f"{userfaultfd.DEVICE}: {os.strerror(device)}; userfaultfd(2): {os.strerror(syscall)}"


def _plain(said: str | None) -> str | None:
    if said is None:
        return None
    # The rest is advice for the reference VMM's users.
    return kvm.plain(said).partition(";")[0]


def _read(account: Account) -> _Rights:
    """By what the permissions of the two files say."""
    why: dict[str, str | None] = {}
    for path in (userfaultfd.DEVICE, kvm.DEVICE):
        node = Node.look(path)
        if node is None:
            why[path] = f"{path}: {os.strerror(errno.ENOENT)}"
        else:
            why[path] = None if node.lets(account) else f"{path} is closed to it ({node})"
    if read_setting(userfaultfd.SYSCTL) == 1 or account.uid == 0:
        why[userfaultfd.DEVICE] = None
    return _Rights(False, why[userfaultfd.DEVICE], why[kvm.DEVICE])
