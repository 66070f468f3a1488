"""KVM: who may use it, what it says it has, and what it does when that is tried on a VM of one page.

Numbers of capabilities are those of `linux/kvm.h`. Those of patches that are not in mainline (KVM Userfault, asynchronous
page faults that user space completes) belong to other things there, so they are tried and never asked for by number.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from latepage import _core
from latepage.check import userfaultfd
from latepage.check.access import Node
from latepage.check.items import Item, Need, known

__all__ = ["DEVICE", "kvm_items", "plain"]

DEVICE = "/dev/kvm"
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
SW_PROTECTED_VM = 1
"""KVM_X86_SW_PROTECTED_VM, a type of VM: the one whose pages may have attributes without special hardware."""

CAPABILITIES: dict[str, tuple[int, str, Need, str, str]] = {
    # key: (number, name, who needs it, what it brings, what to do where it lacks)
    "sync_mmu": (16, "memory follows the VMM's", "feature", "pages that are installed late reach the guest", ""),
    "memory_fault_info": (232, "memory-fault exits", "feature", "an exit says which page it wants", "Linux 6.8 has it"),
    "memory_attributes": (
        233,
        "memory attributes",
        "info",
        "pages of a VM can be marked, so that touching one is an exit",
        "needs Linux 6.8 built with CONFIG_KVM_SW_PROTECTED_VM=y (or SEV-SNP, TDX)",
    ),
    "guest_memfd": (234, "guest_memfd", "later", "memory that KVM keeps", "Linux 6.8 has it, built with CONFIG_KVM_GUEST_MEMFD"),
    "async_page_faults": (59, "asynchronous page faults", "info", "the guest may do something else while a page comes", ""),
    "dirty_ring": (192, "dirty ring", "later", "written pages are listed, for migration", "Linux 5.11 has it"),
}
GUEST_MEMFD_FLAGS = 244
"""KVM_CAP_GUEST_MEMFD_FLAGS (Linux 6.18)."""
FLAG_NAMES = ("mmap", "init_shared", "no_direct_map", "write")


def plain(text: str) -> str:
    """What a call said, without the number that follows it.

    >>> plain("KVM_CREATE_VM: Invalid argument (os error 22)")
    'KVM_CREATE_VM: Invalid argument'
    """
    return re.sub(r" \(os error \d+\)", "", text)


def kvm_items() -> Iterator[Item]:
    """The subject `kvm`."""
    opened: int | OSError
    try:
        opened = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        opened = error
    yield _device(opened)
    if isinstance(opened, OSError):
        yield from _items([])
        return
    with ExitStack() as stack:
        stack.callback(os.close, opened)
        asked = [opened]
        # Some capabilities are a VM's own, and differ by its type.
        for vm_type in (0, SW_PROTECTED_VM):
            with suppress(OSError):
                asked.append(fcntl.ioctl(opened, KVM_CREATE_VM, vm_type))
                stack.callback(os.close, asked[-1])
        yield from _items(asked)


def _device(opened: int | OSError) -> Item:
    node = Node.look(DEVICE)
    there = not isinstance(opened, OSError)
    todo = None
    if node is None:
        found = "not there"
        todo = "load kvm_intel or kvm_amd, or turn virtualization on for this machine; `latepage demo` runs without it"
    elif there:
        found = f"open to you ({node})"
    elif isinstance(opened, OSError) and opened.errno in (errno.EACCES, errno.EPERM):
        found = f"closed to you ({node})"
        todo = f"only the VMM's user needs it; for that one: setfacl -m u:USER:rw {DEVICE}, or its group"
    else:
        found = str(opened)
        todo = "see whether KVM works at all: dmesg | grep -i kvm"
    value = None if node is None else {"uid": node.uid, "gid": node.gid, "mode": f"{node.mode:04o}"}
    return Item(key="kvm.device", name=DEVICE, state=known(there), found=found, value=value, todo=todo)


def _items(asked: list[int]) -> Iterator[Item]:
    """All but the device itself; `asked` are descriptors of KVM and of VMs, none where it does not open."""
    kvm = asked[0] if asked else None
    yield _trial(kvm, "vm", "making a VM", "feature", "a VM of one page was made", "see what refuses it: dmesg | grep -i kvm")
    yield _trial(
        kvm,
        "userfaultfd",
        "userfaultfd under KVM",
        "feature",
        "a vCPU's access came as a fault, and went on with the page",
        "a VMM must be able to make a userfaultfd; see vmm and userfaultfd here",
    )
    for key, (number, name, need, brings, lack) in CAPABILITIES.items():
        there = _extension(asked, number)
        yield Item(
            key=f"kvm.{key}",
            name=name,
            state=known(None if there is None else there > 0),
            found=_not_tried(kvm) if there is None else brings if there else "not offered",
            need=need,
            value=there,
            todo=(lack or None) if there == 0 else None,
        )
    yield _trial(
        kvm,
        "attributes",
        "exits by memory attributes",
        "feature",
        "a vCPU's access to a marked page came back as an exit, and went on",
        "needs Linux 6.8 built with CONFIG_KVM_SW_PROTECTED_VM=y; the delivery exit takes this or KVM Userfault, uffd neither",
    )
    yield _trial(
        kvm,
        "userfault",
        "exits by KVM Userfault",
        "feature",
        "a vCPU's access to a page of the bitmap came back as an exit, and went on",
        "only some vendors' kernels carry these patches; the delivery exit takes this or memory attributes, uffd neither",
    )
    yield from _guest_memfd(kvm, asked)


def _extension(asked: list[int], number: int) -> int | None:
    """The most that any of them says of a capability; None where none says anything."""
    said = []
    for descriptor in asked:
        with suppress(OSError):
            said.append(fcntl.ioctl(descriptor, KVM_CHECK_EXTENSION, number))
    return max(said, default=None)


def _not_tried(kvm: int | None) -> str:
    return f"not tried: {DEVICE} does not open here" if kvm is None else "KVM did not say"


def _trial(kvm: int | None, what: str, name: str, need: Need, works: str, lack: str) -> Item:
    tried = None if kvm is None else _core.kvm_trial(what)
    there: bool | None = tried is None
    found = works if there else f"refused: {plain(tried or '')}"
    if kvm is None:
        there, found = None, _not_tried(kvm)
    elif what == "userfaultfd" and not userfaultfd.allowed():
        there, found = None, "not tried: no right to a userfaultfd here"
    key = {"vm": "vm", "userfaultfd": "userfaultfd"}.get(what, f"exit_by_{what}")
    return Item(
        key=f"kvm.{key}",
        name=name,
        state=known(there),
        found=found,
        need=need,
        value=there,
        todo=lack if there is False else None,
    )


def _guest_memfd(kvm: int | None, asked: list[int]) -> Iterator[Item]:
    flags = _extension(asked, GUEST_MEMFD_FLAGS)
    names = None if flags is None else [name for bit, name in enumerate(FLAG_NAMES) if flags >> bit & 1]
    yield Item(
        key="kvm.guest_memfd_flags",
        name="guest_memfd's flags",
        state=known(None if names is None else bool(names)),
        found=_not_tried(kvm) if names is None else ", ".join(names) or "none",
        need="later",
        value=names,
        todo="Linux 6.18 has the first two" if names == [] else None,
    )
    tried = {} if kvm is None else _core.guest_memfd()
    mapped = None if kvm is None else tried.get("made") is None and tried.get("mapped") is None
    why = plain(tried.get("made") or "") or (os.strerror(tried["mapped"]) if tried.get("mapped") else "")
    yield Item(
        key="kvm.guest_memfd_mapped",
        name="guest_memfd in user space",
        state=known(mapped),
        found=_not_tried(kvm) if kvm is None else "it was made and mapped" if mapped else why,
        need="later",
        value=mapped,
        todo="Linux 6.18 lets a VMM map it" if mapped is False else None,
    )
    modes = tried.get("modes")
    takes = bool(modes) if "registered" in tried else None
    if takes is None:
        found = _not_tried(kvm) if kvm is None else "not tried: none was mapped, or no right to a userfaultfd here"
    else:
        found = f"takes {' and '.join(modes)} faults" if modes else "cannot be registered"
    yield Item(
        key="kvm.guest_memfd_userfaultfd",
        name="userfaultfd on guest_memfd",
        state=known(takes),
        found=found,
        need="later",
        value=None if takes is None else modes or [],
        todo="only some vendors' kernels carry these patches" if takes is False else None,
    )
